"""A cache is written once, by one process, whatever happens to it on the way."""

from collections import Counter
from signal import SIGKILL

import pytest
import torch

from gkd_trainer.errors import GKDConfigError, GKDDataError, GKDTeacherError
from gkd_trainer.teachers.cache import CacheReader, CacheWriter, read_manifest
from gkd_trainer.teachers.cache.shards import Shard
from tests.teachers.cache.killed import death
from tests.teachers.cache.rows import batch_of, hidden_signal, make_rows, sequence_of, source, states_of, write

ROWS = make_rows(12)


def stored_rows(folder):
    """All rows of a cache: their tokens and positions."""
    shards = [Shard(folder, entry) for entry in read_manifest(folder).shards]
    rows = [shard.row(index) for shard in shards for index in range(shard.entry.rows)]
    return [(tuple(row.ids), tuple(row.positions)) for row in rows]


def assert_complete(folder, rows, dtype=torch.bfloat16):
    """The cache has each row once, and each is right."""
    expected = [(tuple(each.token_ids), tuple(each.targets_P - 1)) for each in (sequence_of(*row) for row in rows)]
    assert Counter(stored_rows(folder)) == Counter(set(expected))
    reader = CacheReader(folder, read_manifest(folder))
    for row in rows:
        [hidden_PH] = reader.read(sequence_of(*row))
        assert torch.equal(hidden_PH, states_of(sequence_of(*row), dtype))


def test_a_run_killed_at_any_of_its_file_operations_goes_on_without_a_row_wrong_doubled_or_lost(tmp_path):
    folders = (tmp_path / "first", tmp_path / "second")
    deaths = [death(folders[at > 10], at) for at in range(1, 21)]
    assert [signal for signal, _ in deaths] == [SIGKILL] * 20
    assert len({n_rows for _, n_rows in deaths}) > 5
    for folder in folders:
        rows = make_rows(40)
        write(folder, rows)
        assert_complete(folder, rows)
        assert not list(folder.glob("*.partial"))


def test_rows_are_stored_once_even_if_they_are_added_twice(tmp_path):
    manifest = write(tmp_path, [*ROWS, *ROWS[:5]], batch_size=3)
    assert manifest.is_complete
    assert_complete(tmp_path, ROWS)


def test_a_complete_cache_takes_the_rows_of_another_data_set(tmp_path):
    write(tmp_path, ROWS[:5])
    before = read_manifest(tmp_path)
    assert write(tmp_path, ROWS[:5]) == before
    more = write(tmp_path, ROWS)
    assert [entry.rows for entry in more.shards] == [5, 7]
    assert_complete(tmp_path, ROWS)


@pytest.mark.parametrize("kind", ["hidden", "hidden_int8", "topk"])
def test_shards_have_about_the_size_asked_for(tmp_path, kind):
    manifest = write(tmp_path, ROWS, kind=kind, dtype=torch.float32, shard_mb=0.002, batch_size=1)
    assert len(manifest.shards) > 1
    assert sum(entry.rows for entry in manifest.shards) == len(ROWS)


def test_a_continued_cache_of_integers_keeps_the_statistics_of_its_first_rows(tmp_path):
    write(tmp_path, ROWS[:6], kind="hidden_int8", dtype=torch.float32)
    files = read_manifest(tmp_path).files
    write(tmp_path, ROWS, kind="hidden_int8", dtype=torch.float32)
    assert read_manifest(tmp_path).files == files
    reader = CacheReader(tmp_path, read_manifest(tmp_path))
    for row in ROWS:
        [hidden_PH] = reader.read(sequence_of(*row))
        assert (hidden_PH - states_of(sequence_of(*row))).norm() < 0.02 * hidden_PH.norm()


def test_a_second_writer_is_refused_until_the_first_ends(tmp_path):
    with CacheWriter(tmp_path, source()) as first:
        with pytest.raises(GKDConfigError, match="another process writes the cache"):
            CacheWriter(tmp_path, source())
        batch = batch_of(ROWS[:3])
        first.add(batch, hidden_signal(batch))
    write(tmp_path, ROWS, dtype=torch.float32)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("weights", "xyz"),
        ("dtype", "float16"),
        ("vocab_size", 400),
        ("tokenizer", "xyz"),
        ("chat_template", "xyz"),
        ("max_length", 32),
        ("train_on", "last_turn"),
    ],
)
def test_a_cache_made_from_something_else_is_not_continued_and_the_field_is_named(tmp_path, field, value):
    write(tmp_path, ROWS[:3])
    with pytest.raises(GKDTeacherError, match=rf"was made with another {field}: .* there, '?{value}'? now"):
        CacheWriter(tmp_path, source(**{field: value}))
    write(tmp_path, ROWS, source=source(teacher="the same in another folder"))


def test_a_teacher_of_unknown_weights_continues_its_cache_only_under_its_name(tmp_path):
    served = {"weights": None, "vocab_size": None}
    write(tmp_path, ROWS[:3], kind="topk", source=source(teacher="a 72B model", **served))
    other = (
        r"another teacher \(its weights are unknown here, so its name counts\): 'a 72B model' there, 'a 7B model' now"
    )
    with pytest.raises(GKDTeacherError, match=other):
        CacheWriter(tmp_path, source(teacher="a 7B model", **served), kind="topk")
    write(tmp_path, ROWS, kind="topk", source=source(teacher="a 72B model", **served))
    assert len(stored_rows(tmp_path)) == len(ROWS)


def test_shards_beyond_the_99999th_do_not_overwrite_one_another(tmp_path, monkeypatch):
    write(tmp_path, ROWS[:1])
    # As if 99,999 shards came before.
    monkeypatch.setattr("gkd_trainer.teachers.cache.writer._SHARD", "rows-99998.safetensors")
    write(tmp_path, ROWS[:2])
    monkeypatch.undo()
    for count in (3, 4, 5):
        write(tmp_path, ROWS[:count])
    files = [entry.file for entry in read_manifest(tmp_path).shards]
    assert files[2:] == ["rows-99999.safetensors", "rows-100000.safetensors", "rows-100001.safetensors"]
    assert_complete(tmp_path, ROWS[:5])


def test_another_kind_dtype_or_number_of_top_tokens_is_refused(tmp_path):
    write(tmp_path / "hidden", ROWS[:3])
    with pytest.raises(GKDTeacherError, match="another kind: 'hidden' there, 'topk' now"):
        write(tmp_path / "hidden", ROWS, kind="topk")
    with pytest.raises(GKDTeacherError, match="another dtype: 'bfloat16' there, 'float32' now"):
        write(tmp_path / "hidden", ROWS, dtype=torch.float32)
    assert_complete(tmp_path / "hidden", ROWS[:3])


def test_another_head_is_refused(tmp_path):
    write(tmp_path, ROWS[:3])
    batch = batch_of(ROWS[3:])
    signal = hidden_signal(batch, torch.bfloat16)
    signal.head.weight_VH[5, 5] += 1
    with pytest.raises(GKDTeacherError, match="another head"), CacheWriter(tmp_path, source()) as writer:
        writer.add(batch, signal)
    assert_complete(tmp_path, ROWS[:3])


def test_damaged_shards_are_scored_again(tmp_path, caplog):
    write(tmp_path, ROWS, shard_mb=1e-6)
    manifest = read_manifest(tmp_path)
    first, second = (tmp_path / entry.file for entry in manifest.shards[:2])
    content = bytearray(first.read_bytes())
    content[-1] ^= 1
    first.write_bytes(content)
    second.write_bytes(second.read_bytes()[:-5])
    with pytest.raises(GKDTeacherError, match="is damaged"):
        CacheReader(tmp_path, manifest)
    with CacheWriter(tmp_path, source()):
        pass
    assert "Its 4 rows will be scored again" in caplog.text
    assert len(stored_rows(tmp_path)) == len(ROWS) - 8
    write(tmp_path, ROWS)
    assert_complete(tmp_path, ROWS)


def test_a_failed_run_leaves_no_complete_cache_and_can_go_on(tmp_path):
    class StopError(Exception):
        pass

    def fail(shard_mb):
        with CacheWriter(tmp_path, source(), shard_mb=shard_mb) as writer:
            for rows in (ROWS[:3], ROWS[3:6]):
                batch = batch_of(rows)
                writer.add(batch, hidden_signal(batch, torch.bfloat16))
            raise StopError

    with pytest.raises(StopError):
        fail(shard_mb=1e-6)
    assert not read_manifest(tmp_path).is_complete
    assert len(stored_rows(tmp_path)) == 6
    write(tmp_path, ROWS)
    assert_complete(tmp_path, ROWS)


def test_a_row_that_has_no_form_is_named(tmp_path):
    batch = batch_of(ROWS[:2])
    signal = hidden_signal(batch, torch.bfloat16)
    signal.hidden_NH[-1, 2] = torch.nan
    ids = str(ROWS[1][0][:4])[1:-1]
    problem = rf"row of {len(ROWS[1][0])} tokens, \[{ids}.*states are not finite"
    with pytest.raises(GKDTeacherError, match=problem), CacheWriter(tmp_path, source()) as writer:
        writer.add(batch, signal)


def test_a_cache_without_rows_and_a_size_of_nothing_are_refused(tmp_path):
    with pytest.raises(GKDDataError, match="expected at least one row"), CacheWriter(tmp_path, source()):
        pass
    with pytest.raises(GKDConfigError, match="shard_mb must be above 0; got 0"):
        CacheWriter(tmp_path, source(), shard_mb=0)


@pytest.mark.parametrize(
    ("kind", "dtype", "compress", "expected"),
    [
        ("hidden", torch.bfloat16, "auto", "zstd"),
        ("hidden", torch.bfloat16, "none", "none"),
        ("hidden", torch.float32, "auto", "none"),
        ("hidden_int8", torch.float32, "zstd", "zstd"),
        ("topk", torch.float32, "auto", "none"),
    ],
)
def test_compression_is_chosen_by_where_it_pays(tmp_path, kind, dtype, compress, expected):
    assert write(tmp_path, ROWS, kind=kind, dtype=dtype, compress=compress).compression == expected
