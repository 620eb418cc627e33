"""The file of completions: what it keeps, how large it gets, and what survives a crash."""

import itertools
import json
import math
import time
from dataclasses import replace

import pytest

from gkd_trainer.errors import GKDDataError
from gkd_trainer.report.records import Record, RecordFile, read_records
from tests.report.samples import FACTS, NASTY, record, token_map, write_records


def test_what_is_written_is_read(tmp_path):
    records = [record(step, samples=(token_map(NASTY, prompt="".join(NASTY)),)) for step in (1, 5)]
    found = read_records(write_records(tmp_path, records))
    assert found.facts == FACTS
    assert list(found.records) == records
    assert found.unreadable == 0


def test_a_line_holds_no_nan(tmp_path):
    path = write_records(tmp_path, [Record(1, {"loss": math.nan, "grad_norm": math.inf, "epoch": 0.5})])
    assert "NaN" not in path.read_text()
    assert read_records(path).records[0].metrics == {"epoch": 0.5}


def test_a_file_cut_off_anywhere_gives_the_lines_before(tmp_path):
    path = write_records(tmp_path, [record(1), record(2)])
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    for length in range(0, len(whole), 97):
        path.write_bytes(whole[:length])
        found = read_records(path)
        complete = sum(len(b"".join(lines[: count + 1])) <= length + 1 for count in range(len(lines)))
        assert len(found.records) == max(0, complete - 1)
        assert found.unreadable == int(complete < len(lines) and length > len(b"".join(lines[:complete])))


@pytest.mark.parametrize(
    "line", ["null", "[]", "{}", '{"step": "x"}', "\x00\x00", '{"step":1,"metrics":[],"samples":[]}', "[" * 100_000]
)
def test_a_line_that_is_none_of_ours_is_counted(tmp_path, line):
    path = write_records(tmp_path, [record(1)])
    with path.open("a") as file:
        file.write(f"{line}\n{record(2).line()}")
    found = read_records(path)
    assert ([each.step for each in found.records], found.unreadable) == ([1, 2], 1)


def test_bytes_that_are_no_utf8_are_no_error(tmp_path):
    path = write_records(tmp_path, [record(1)])
    path.write_bytes(path.read_bytes().replace(b'"Count:"', b'"\xff\xfe"'))
    assert read_records(path).records[0].samples[0].prompt == "\ufffd\ufffd"


def test_a_later_format_is_refused(tmp_path):
    path = write_records(tmp_path, [record(1)])
    path.write_text(path.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(GKDDataError, match="format 1 or earlier; got format 2: update"):
        read_records(path)


def test_a_resumed_run_goes_on_behind_its_last_step(tmp_path):
    path = write_records(tmp_path, [record(step) for step in (1, 2, 3, 4)])
    file = RecordFile(path)
    file.start(FACTS, 2)
    file.append(record(3, loss=9.0))
    assert [(each.step, each.metrics["loss"]) for each in read_records(path).records] == [(1, 1.0), (2, 0.5), (3, 9.0)]


def test_a_resumed_run_keeps_the_time_of_its_start(tmp_path):
    path = write_records(tmp_path, [record(1)], replace(FACTS, started=100.0))
    RecordFile(path).start(replace(FACTS, started=200.0), 1)
    assert read_records(path).facts.started == 100.0
    RecordFile(path).start(replace(FACTS, started=200.0), 0)
    assert read_records(path).facts.started == 200.0
    path.unlink()
    RecordFile(path).start(replace(FACTS, started=300.0), 1)
    assert read_records(path).facts.started is None  # the checkpoint it resumed from is older


def test_a_new_run_replaces_an_older_ones_file(tmp_path):
    path = write_records(tmp_path, [record(1), record(2)])
    RecordFile(path).start(FACTS, 0)
    assert read_records(path).records == ()


def test_the_file_stays_below_its_size_and_covers_the_whole_run(tmp_path):
    path = tmp_path / "new" / "_report.jsonl"
    size = len(record(100).line())
    file = RecordFile(path, max_bytes=20 * size)
    file.start(FACTS, 0)
    for step in range(1, 301):
        file.append(record(step))
        assert path.stat().st_size <= 20 * size
    steps = [each.step for each in read_records(path).records if each.samples]
    assert (steps[0], steps[-1]) == (1, 300)
    gaps = [second - first for first, second in itertools.pairwise(steps)]
    assert len(steps) >= 5
    assert max(gaps) <= 300 / 3


def written(path, records, max_bytes):
    file = RecordFile(path, max_bytes)
    file.start(FACTS, 0)
    slowest = 0.0
    for each in records:
        before = time.perf_counter()
        file.append(each)
        slowest = max(slowest, time.perf_counter() - before)
        assert path.stat().st_size <= max_bytes
    return read_records(path).records, slowest


def test_entries_keep_their_numbers_longer_than_their_samples(tmp_path):
    without = len(record(50, samples=()).line())
    records = [record(step, samples=(token_map((" token",) * 30),)) for step in range(1, 101)]
    kept, _ = written(tmp_path / "file", records, 440 * without)
    assert [each.step for each in kept] == list(range(1, 101))
    assert [each.metrics for each in kept] == [each.metrics for each in records]
    assert 5 < sum(bool(each.samples) for each in kept) < 100
    kept, _ = written(tmp_path / "file", records, 160 * without)
    assert 15 < len(kept) < 100
    assert 1 < sum(bool(each.samples) for each in kept) < len(kept)
    for each in (kept[0], kept[-1]):
        assert each.samples
    assert [each.step for each in kept] == sorted(each.step for each in kept)


def test_bounding_a_long_file_does_not_stall_the_run(tmp_path):
    records = [record(step, samples=()) for step in range(1, 12_001)]
    kept, slowest = written(tmp_path / "file", records, 2**21)
    assert slowest < 0.5
    assert 1000 < len(kept) < 12_000
    gaps = [second.step - first.step for first, second in itertools.pairwise(kept)]
    assert max(gaps) <= 2 * 12_000 / 1000


def test_an_entry_that_is_too_large_has_fewer_samples(tmp_path):
    samples = (token_map((" token",) * 100),) * 64
    kept, slowest = written(tmp_path / "file", [record(step, samples=samples) for step in range(1, 30)], 2**20)
    assert slowest < 0.5
    assert all(len(each.line()) <= 2**17 for each in kept)
    assert len([each for each in kept if len(each.samples) > 1]) >= 3
    huge = Record(30, {f"name_{index}": 0.5 for index in range(10_000)})
    assert [each.step for each in written(tmp_path / "file", [record(1), huge], 2**20)[0]] == [1]


def test_rare_entries_are_not_thinned_out_with_the_frequent_ones(tmp_path):
    def entries():
        for step in range(10, 10_001, 10):
            yield record(step, samples=())
            if step % 1000 == 0:
                for name in ("math", "code"):
                    yield Record(step, {f"eval_{name}_loss": 0.5})

    kept, _ = written(tmp_path / "file", entries(), 2**17)
    for name in ("math", "code"):
        steps = [each.step for each in kept if f"eval_{name}_loss" in each.metrics]
        assert steps == list(range(1000, 10_001, 1000))
    assert len(kept) < 700


def test_a_resumed_run_bounds_what_was_there(tmp_path):
    written(tmp_path / "file", [record(step) for step in range(1, 101)], 2**20)
    whole = (tmp_path / "file").stat().st_size
    file = RecordFile(tmp_path / "file", whole // 2)
    file.start(FACTS, 90)
    assert (tmp_path / "file").stat().st_size <= whole // 2
    for step in range(91, 101):
        file.append(record(step))
        assert (tmp_path / "file").stat().st_size <= whole // 2
    held = read_records(tmp_path / "file")
    assert held.unreadable == 0
    assert (held.records[0], held.records[-1]) == (record(1), record(100))


def test_a_kill_while_thinning_leaves_all_that_was_written(tmp_path, monkeypatch):
    path = tmp_path / "file"
    file = RecordFile(path, 2**15)
    file.start(FACTS, 0)

    def killed(*names):
        raise KeyboardInterrupt

    monkeypatch.setattr("gkd_trainer.report.records.os.replace", killed)
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012 (which append it is depends on the size)
        for step in range(1, 1000):
            file.append(record(step))
    assert [each.step for each in read_records(path).records] == list(range(1, step + 1))
    monkeypatch.undo()
    file = RecordFile(path, 2**15)
    file.start(FACTS, step)
    file.append(record(step + 1))
    assert read_records(path).unreadable == 0


def test_a_file_that_something_else_changed_is_an_error(tmp_path):
    path = tmp_path / "file"
    file = RecordFile(path)
    file.start(FACTS, 0)
    path.unlink()
    with pytest.raises(OSError, match="something else has changed it"):
        file.append(record(1))


def test_a_line_is_one_line_of_json():
    line = record(1, samples=(token_map(("a\nb\u2028\x85",)),)).line()
    assert line.count("\n") == 1
    assert json.loads(line)["samples"][0]["text"] == ["a\nb\u2028\x85"]
