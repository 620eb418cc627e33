"""Caches that are read as one give what each of them has, and are of one teacher."""

import pytest
import torch

from gkd_trainer.errors import GKDTeacherError
from gkd_trainer.signals import Head, HiddenSignal, TopKSignal
from gkd_trainer.teachers.cache import CacheWriter, JoinedReader, read_manifests
from gkd_trainer.teachers.cache.format import StoredWitness
from gkd_trainer.teachers.cache.joined import NOISE
from tests.teachers.cache.rows import (
    WEIGHT_VH,
    H,
    K,
    V,
    batch_of,
    cut,
    hidden_signal,
    make_rows,
    sequence_of,
    source,
    states_of,
    top_signal,
    write,
)

ROWS = make_rows(12, longest=20)


def reader_of(*folders):
    return JoinedReader(read_manifests(folders))


@pytest.mark.parametrize(
    ("kind", "dtype", "tolerance"),
    [("hidden", torch.bfloat16, 0.0), ("hidden", torch.float32, 1e-3), ("hidden_int8", torch.float32, 0.2)],
)
def test_each_row_is_read_as_its_own_cache_stores_it(tmp_path, kind, dtype, tolerance):
    write(tmp_path / "a", ROWS[:5], kind=kind, dtype=dtype)
    # Channels of another mean and size, which the rows of this folder alone are stored by.
    write(tmp_path / "b", ROWS[5:], kind=kind, dtype=dtype, compress="zstd", shard_mb=0.002)
    reader = reader_of(tmp_path / "a", tmp_path / "b")
    for row in [*ROWS, cut(ROWS[8], len(ROWS[8][0]) - 1)]:
        sequence = sequence_of(*row)
        assert reader.has(sequence)
        [hidden_PH] = reader.read(sequence)
        expected_PH = states_of(sequence, dtype)
        assert (hidden_PH - expected_PH).norm() <= tolerance * expected_PH.norm()
    assert torch.equal(reader.head.weight_VH, WEIGHT_VH.to(dtype))
    other = sequence_of([5, 6, 7], [-100, 6, 7])
    assert not reader.has(other)
    assert reader.read(other) is None


def test_a_row_in_two_caches_is_the_first_ones(tmp_path):
    [row] = make_rows(1)
    for name, value in (("a", 1.0), ("b", 2.0)):
        with CacheWriter(tmp_path / name, source()) as writer:
            batch = batch_of([row])
            writer.add(batch, HiddenSignal(torch.full((batch.n_scored, H), value).bfloat16(), Head(WEIGHT_VH)))
    for names, value in (("ab", 1.0), ("ba", 2.0)):
        [hidden_PH] = reader_of(*(tmp_path / name for name in names)).read(sequence_of(*row))
        assert (hidden_PH == value).all()


def test_one_head_is_kept_for_all(tmp_path):
    folders = [tmp_path / name for name in "abc"]
    for index, folder in enumerate(folders):
        write(folder, ROWS[index::3])
    reader = reader_of(*folders)
    assert all(each.shared.head is reader.head for each in reader._readers)


@pytest.mark.parametrize(
    ("name", "changes", "values"),
    [
        ("kind", {"kind": "hidden_int8"}, "'hidden' and 'hidden_int8'"),
        ("dtype", {"dtype": torch.float16}, "'bfloat16' and 'float16'"),
        ("weights", {"source": source(weights="xyz")}, "'abc' and 'xyz'"),
        ("weights", {"source": source(weights=None)}, "'abc' and None"),
        ("dtype", {"source": source(dtype="float16")}, "None and 'float16'"),
        ("vocab_size", {"source": source(vocab_size=400)}, f"{V} and 400"),
        ("tokenizer", {"source": source(tokenizer="xyz")}, "None and 'xyz'"),
    ],
)
def test_caches_that_differ_are_refused_with_both_folders_and_the_field(tmp_path, name, changes, values):
    folders = [tmp_path / each for each in ("a", "b", "c")]
    write(folders[0], ROWS[:3])
    write(folders[1], ROWS[3:6])
    write(folders[2], ROWS[6:], **changes)
    message = f"the caches in {folders[0]} and {folders[2]} can't be read as one: they differ in {name}: {values}"
    with pytest.raises(GKDTeacherError, match=message):
        read_manifests(folders)


def test_caches_of_different_numbers_of_top_tokens_are_refused(tmp_path):
    write(tmp_path / "a", ROWS[:3], kind="topk")
    with CacheWriter(tmp_path / "b", source(), kind="topk") as writer:
        batch = batch_of(ROWS[3:])
        top = top_signal(batch)
        writer.add(batch, TopKSignal(top.ids_NK[:, :-1], top.log_p_NK[:, :-1], V))
    with pytest.raises(GKDTeacherError, match=f"they differ in top_k: {K} and {K - 1}"):
        read_manifests([tmp_path / "a", tmp_path / "b"])


@pytest.mark.parametrize(
    "changed", [Head(WEIGHT_VH + 1, scale=0.5, softcap=30.0), Head(WEIGHT_VH, torch.ones(V), 0.5, 30.0)]
)
def test_caches_of_different_heads_are_refused(tmp_path, changed):
    write(tmp_path / "a", ROWS[:3])
    with CacheWriter(tmp_path / "b", source()) as writer:
        batch = batch_of(ROWS[3:])
        head = Head(changed.weight_VH.bfloat16(), changed.bias_V, changed.scale, changed.softcap)
        writer.add(batch, HiddenSignal(hidden_signal(batch, torch.bfloat16).hidden_NH, head))
    with pytest.raises(GKDTeacherError, match=r"/a and .*/b can't be read as one: their teachers have different heads"):
        reader_of(tmp_path / "a", tmp_path / "b")


def test_datasets_may_be_cached_with_options_of_their_own(tmp_path):
    write(tmp_path / "a", ROWS[:3])
    write(tmp_path / "b", ROWS[3:], source=source(max_length=128, train_on="last_turn", teacher="elsewhere/oracle"))
    assert list(read_manifests([tmp_path / "a", tmp_path / "b"])) == [tmp_path / "a", tmp_path / "b"]


def test_teachers_of_unknown_weights_are_the_same_by_name_and_scores(tmp_path):
    def served(share, teacher="oracle"):
        witness = StoredWitness(token_ids=(4, 5), top_ids=((7, 9),), probabilities=((share, 0.3),))
        return source(weights=None, witness=witness, teacher=teacher)

    for name, made in {
        "a": served(0.6),
        "b": served(0.6 + NOISE),
        "other": served(0.1),
        "name": served(0.6, "another"),
    }.items():
        write(tmp_path / name, ROWS[:3], source=made)
    read_manifests([tmp_path / "a", tmp_path / "b"])
    with pytest.raises(GKDTeacherError, match=r"the scores that their teachers gave a fixed text differ by 0\.\d\d"):
        read_manifests([tmp_path / "a", tmp_path / "other"])
    with pytest.raises(GKDTeacherError, match="they differ in teacher: 'oracle' and 'another'"):
        read_manifests([tmp_path / "a", tmp_path / "name"])


def test_a_folder_that_is_named_twice_is_read_once(tmp_path):
    write(tmp_path, ROWS[:3])
    assert len(read_manifests([tmp_path, tmp_path])) == 1
    with pytest.raises(GKDTeacherError, match="expected at least one folder of a cache; got none"):
        read_manifests([])
