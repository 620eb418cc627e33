"""The parts of a cache: which rows and folder each has, and what is refused where they do not fit together."""

import re

import pytest
import torch

from gkd_trainer.errors import GKDConfigError, GKDTeacherError
from gkd_trainer.teachers import CachedTeacher
from gkd_trainer.teachers.cache import CacheWriter, Part, folder_to_write, read_manifest
from gkd_trainer.teachers.cache.format import write_manifest
from gkd_trainer.teachers.cache.parts import folders_to_read, parts_of, progress
from tests.teachers.cache.rows import batch_of, hidden_signal, make_rows, source, write

ROWS = make_rows(10)


def write_part(folder, part, rows=ROWS, **options):
    return write(folder_to_write(folder, part), rows[part.rows], **options)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 12])
def test_each_row_is_in_one_part_and_parts_differ_by_at_most_one_row(count):
    parts = [ROWS[part.rows] for part in parts_of(count)]
    assert sorted(row for rows in parts for row in rows) == sorted(ROWS)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_part_is_written_as_it_is_read():
    assert Part.parsed("2/4") == Part(number=2, count=4)
    assert str(Part.parsed(" 12/64 ")) == "12/64"


@pytest.mark.parametrize("text", ["0/4", "5/4", "1/0"])
def test_a_part_that_there_is_not_is_refused(text):
    with pytest.raises(GKDConfigError, match=f"part must be I/N, with I from 1 to N, such as 2/4; got {text}"):
        Part.parsed(text)


@pytest.mark.parametrize("text", ["2", "2 of 4", "-1/4", "1.0/2", ""])
def test_another_text_is_no_part(text):
    with pytest.raises(GKDConfigError, match=f"part must be I/N.*; got {re.escape(repr(text))}"):
        Part.parsed(text)


def test_all_parts_are_read_by_the_name_of_their_folder_in_order(tmp_path):
    for part in reversed(parts_of(11)):
        write(folder_to_write(tmp_path, part), make_rows(1, seed=part.number))
    assert folders_to_read(tmp_path) == [tmp_path / f"part-{number}-of-11" for number in range(1, 12)]
    assert [*CachedTeacher(tmp_path).manifests] == folders_to_read(tmp_path)


def test_missing_parts_are_named(tmp_path):
    for part in parts_of(4)[::2]:
        write_part(tmp_path, part)
    folder_to_write(tmp_path, Part(number=4, count=4)).mkdir()  # it has begun, and has no rows yet
    with pytest.raises(GKDTeacherError, match=rf"the cache in {tmp_path} lacks 2/4, 4/4 of 4 parts: .* --part 2/4"):
        CachedTeacher(tmp_path)
    CachedTeacher([tmp_path / "part-1-of-4", tmp_path / "part-3-of-4"])


def test_progress_names_the_parts_that_are_not_complete(tmp_path):
    for part in parts_of(3)[:2]:
        write_part(tmp_path, part)
    second = tmp_path / "part-2-of-3"
    write_manifest(second, read_manifest(second).model_copy(update={"is_complete": False}))
    assert progress(tmp_path, 3) == f"{tmp_path}: 1 of 3 parts are complete; still to be written: 2/3, 3/3"
    for part in parts_of(3)[1:]:
        write_part(tmp_path, part)
    assert progress(tmp_path, 3) == f"{tmp_path}: 3 of 3 parts are complete"


def test_a_part_is_continued_alone(tmp_path):
    whole = write_part(tmp_path, Part(number=1, count=2), shard_mb=1e-6, batch_size=1)
    part = Part(number=2, count=2)
    write(folder_to_write(tmp_path, part), ROWS[part.rows][:2])
    manifest = write_part(tmp_path, part)
    assert [shard.rows for shard in manifest.shards] == [2, 3]
    assert read_manifest(tmp_path / "part-1-of-2") == whole


def test_a_second_writer_of_a_part_is_refused_and_one_of_another_is_not(tmp_path):
    one, two = (folder_to_write(tmp_path, part) for part in parts_of(2))
    with CacheWriter(one, source()) as writer:
        with pytest.raises(GKDConfigError, match=f"another process writes the cache in {one}: .* write a part"):
            CacheWriter(one, source())
        write(two, ROWS[1::2], dtype=torch.float32)
        batch = batch_of(ROWS[::2])
        writer.add(batch, hidden_signal(batch))
    assert [*CachedTeacher(tmp_path).manifests] == [one, two]


def test_a_folder_is_divided_in_one_way(tmp_path):
    write_part(tmp_path / "divided", Part(number=1, count=2))
    with pytest.raises(GKDConfigError, match="holds a cache in 2 parts: write each with --part"):
        folder_to_write(tmp_path / "divided", None)
    with pytest.raises(GKDConfigError, match="holds a cache in 2 parts, so part 1/3 can't be written there"):
        folder_to_write(tmp_path / "divided", Part(number=1, count=3))
    write(tmp_path / "whole", ROWS)
    with pytest.raises(GKDConfigError, match="holds a cache that is not divided, so part 1/2 can't be written there"):
        folder_to_write(tmp_path / "whole", Part(number=1, count=2))
    write(tmp_path / "divided" / "part-1-of-3", ROWS[::3])
    with pytest.raises(GKDTeacherError, match="holds parts of several caches, of 2 and 3 parts"):
        folders_to_read(tmp_path / "divided")


def test_other_folders_and_files_are_no_parts(tmp_path):
    for name in ("part-1-of-2.old", "part-3-of-2", "part-0-of-2", "part-one-of-2"):
        (tmp_path / name).mkdir()
    (tmp_path / "part-1-of-2").write_text("")
    assert folder_to_write(tmp_path, None) == tmp_path
    assert folders_to_read(tmp_path) == [tmp_path]
