"""A cache gives what the teacher said, for a row and all its beginnings, and maps its files."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from gkd_trainer.errors import GKDTeacherError
from gkd_trainer.signals import Head, HiddenSignal
from gkd_trainer.teachers.cache import CacheReader, CacheWriter, read_manifest
from gkd_trainer.teachers.cache.reader import read_vocabulary
from gkd_trainer.teachers.prompt_scores import fully_scored
from tests.teachers.cache.rows import (
    VOCABULARY,
    WEIGHT_VH,
    K,
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

ROWS = make_rows(15, longest=20)


def reader_of(folder, rows=ROWS, **options):
    manifest = write(folder, rows, **options)
    return CacheReader(folder, manifest)


def has_targets(row):
    return any(label != -100 for label in row[1][1:])


def test_every_beginning_of_a_row_is_served_with_the_states_of_its_own_tokens(tmp_path):
    reader = reader_of(tmp_path, shard_mb=0.002)
    n_beginnings = 0
    for row in ROWS:
        for length in range(2, len(row[0]) + 1):
            if has_targets(beginning := cut(row, length)):
                sequence = sequence_of(*beginning)
                [hidden_PH] = reader.read(sequence)
                assert torch.equal(hidden_PH, states_of(sequence, torch.bfloat16))
                n_beginnings += 1
    assert n_beginnings > 2 * len(ROWS)


def test_some_positions_of_a_row_are_served_and_others_are_not_there(tmp_path):
    ids, labels = [9, 8, 7, 6, 5, 4], [-100, -100, 7, -100, 5, 4]
    reader = reader_of(tmp_path, [(ids, labels), (ids, [-100] * 5 + [4])])
    for wanted in ([-100] * 4 + [5, 4], [-100, -100, 7, -100, -100, 4], [-100] * 5 + [4]):
        sequence = sequence_of(ids, wanted)
        [hidden_PH] = reader.read(sequence)
        assert torch.equal(hidden_PH, states_of(sequence, torch.bfloat16))
    for wanted in ([-100, 8, 7, -100, 5, 4], [-100, -100, -100, 6, 5, 4]):
        assert reader.read(sequence_of(ids, wanted)) is None


def test_rows_that_differ_in_a_token_or_go_on_are_not_there(tmp_path):
    reader = reader_of(tmp_path)
    for ids, labels in ROWS:
        context = sequence_of(ids, labels).token_ids[:-1]
        for place in range(len(context)):
            other = [*ids[:place], ids[place] ^ 1, *ids[place + 1 :]]
            assert reader.read(sequence_of(other, labels)) is None
        assert reader.read(sequence_of([*ids, 5, 6], [*labels, 5, 6])) is None
        # The last token is what its position predicts, not what the prediction depends on.
        assert reader.read(sequence_of([*ids[:-1], ids[-1] ^ 1], [*labels[:-1], ids[-1] ^ 1])) is not None


def test_completions_of_one_prompt_are_told_apart(tmp_path):
    numbers = np.random.default_rng(1)
    rows = [([4, 5, *(tail := numbers.integers(4, 8, size=6).tolist())], [-100, -100, *tail]) for _ in range(60)]
    reader = reader_of(tmp_path, rows)
    for row in rows:
        sequence = sequence_of(*row)
        assert torch.equal(reader.read(sequence)[0], states_of(sequence, torch.bfloat16))


def test_top_tokens_are_those_of_the_teacher(tmp_path):
    reader = reader_of(tmp_path, kind="topk")
    for row in ROWS:
        ids_PK, log_p_PK = reader.read(sequence_of(*row))
        expected = top_signal(batch_of([row]))
        assert ids_PK.shape[1] == K
        assert torch.equal(ids_PK, expected.ids_NK)
        assert torch.allclose(log_p_PK, expected.log_p_NK, rtol=1e-5)  # scored in another batch


def test_the_head_and_the_vocabulary_are_the_teachers(tmp_path):
    head = reader_of(tmp_path).shared.head
    assert torch.equal(head.weight_VH, WEIGHT_VH.bfloat16())
    assert (head.bias_V, head.scale, head.softcap) == (None, 0.5, 30.0)
    assert read_vocabulary(tmp_path, read_manifest(tmp_path)) == VOCABULARY
    write(tmp_path / "other", ROWS, vocabulary=None)
    assert read_vocabulary(tmp_path / "other", read_manifest(tmp_path / "other")) is None


def test_a_cache_that_is_being_written_serves_the_rows_that_it_has(tmp_path):
    with CacheWriter(tmp_path, source(), shard_mb=1e-6) as writer:
        for rows in (ROWS[:4], ROWS[4:8]):
            batch = batch_of(rows)
            writer.add(batch, hidden_signal(batch, torch.bfloat16))
        reader = CacheReader(tmp_path, read_manifest(tmp_path))
    assert [reader.has(sequence_of(*row)) for row in ROWS] == [True] * 8 + [False] * 7
    for row in ROWS[:8]:
        assert torch.equal(reader.read(sequence_of(*row))[0], states_of(sequence_of(*row), torch.bfloat16))


def test_a_cache_whose_shards_were_all_lost_has_no_row(tmp_path):
    manifest = write(tmp_path, ROWS).model_copy(update={"shards": (), "is_complete": False})
    reader = CacheReader(tmp_path, manifest)
    assert not any(reader.has(sequence_of(*row)) for row in ROWS)


def test_it_has_exactly_the_rows_that_it_reads(tmp_path):
    reader = reader_of(tmp_path, ROWS[:10])
    ids, labels = ROWS[0]
    asked = [*ROWS, cut(ROWS[3], len(ROWS[3][0]) - 1), (ids, [-100, *ids[1:]]), ([*ids, 5], [*labels, 5])]
    sequences = [sequence_of(*row) for row in asked if has_targets(row)]
    found = [reader.has(sequence) for sequence in sequences]
    assert found == [reader.read(sequence) is not None for sequence in sequences]
    assert {True, False} == {*found}


@pytest.mark.parametrize("name", ["head.safetensors", "vocabulary.json", "rows-00000.safetensors"])
def test_a_file_that_is_edited_by_one_byte_cut_short_or_missing_is_refused(tmp_path, name):
    manifest, path = write(tmp_path, ROWS), tmp_path / name
    written = path.read_bytes()

    def read_all():
        reader = CacheReader(tmp_path, manifest)
        for row in ROWS:
            reader.read(sequence_of(*row))

    for changed in (written[:-1], written[:-1] + bytes([written[-1] ^ 64]), None):
        path.unlink() if changed is None else path.write_bytes(changed)
        with pytest.raises(GKDTeacherError, match=f"{name} is damaged"):
            read_all()


def anonymous_kib():
    """The memory of this process that does not map a file, which a cache larger than memory must not fill."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
    return int(line.split()[1])


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads Linux's /proc")
def test_reading_maps_files_instead_of_loading_them(tmp_path):
    width, length = 2048, 1500
    sequences = [fully_scored([index, *range(4, length)]) for index in range(10)]
    hidden_NH = torch.zeros(len(sequences[0].targets_P), width, dtype=torch.bfloat16)
    with CacheWriter(tmp_path, source(), compress="none") as writer:
        for sequence in sequences:
            row = (sequence.token_ids, [-100, *sequence.token_ids[1:]])
            writer.add(batch_of([row]), HiddenSignal(hidden_NH, Head(torch.zeros(4, width))))
    [entry] = writer.manifest.shards
    assert entry.size > 55 * 2**20
    del writer, hidden_NH
    before = anonymous_kib()
    reader = CacheReader(tmp_path, read_manifest(tmp_path))
    assert reader.read(sequences[3])[0].shape == (len(sequences[3].targets_P), width)
    assert anonymous_kib() - before < 20 * 2**10
