"""What `datasets` keeps of `map`: found again by the same code, and made by one process at a time."""

import threading

import pytest
from datasets import Dataset

from gkd_trainer.data import map_cache
from gkd_trainer.data.map_cache import code_version, one_process_at_a_time


@pytest.fixture
def on_disk(tmp_path):
    Dataset.from_list([{"text": "one"}]).save_to_disk(tmp_path / "rows")
    return lambda: Dataset.load_from_disk(tmp_path / "rows")


@pytest.fixture
def fresh():
    yield code_version.cache_clear
    code_version.cache_clear()


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("__version__", "0.0.9"),
        ("version", lambda library: "9.9" if library == "trl" else "1.0"),
        ("sha256", lambda: __import__("hashlib").sha256(b"other sources")),
    ],
)
def test_the_version_is_that_of_our_code_and_of_the_libraries(fresh, monkeypatch, name, other):
    before = code_version()
    fresh()
    assert code_version() == before
    fresh()
    monkeypatch.setattr(map_cache, name, other)
    assert code_version() != before


def test_of_two_that_map_the_same_rows_by_the_same_function_the_second_waits(on_disk):
    has_entered = threading.Event()

    def enter():
        with one_process_at_a_time(on_disk(), len):
            has_entered.set()

    second = threading.Thread(target=enter)
    with one_process_at_a_time(on_disk(), len):
        second.start()
        assert not has_entered.wait(0.2)
        with one_process_at_a_time(on_disk(), str):  # another function does not wait
            pass
    assert has_entered.wait(10)
    second.join()


def test_a_lock_that_stays_is_told_and_waited_for_no_longer_than_can_be(on_disk, monkeypatch, caplog):
    monkeypatch.setattr(map_cache, "_LONGEST_WAIT", 0.1)
    with one_process_at_a_time(on_disk(), len):
        assert caplog.text == ""
        with one_process_at_a_time(on_disk(), len):  # as a second process: a lock of its own
            assert "Waiting until another process has prepared the same rows" in caplog.text


def test_nothing_waits_for_a_dataset_in_memory_or_a_function_without_a_hash(on_disk, caplog):
    in_memory = Dataset.from_list([{"text": "one"}])
    with one_process_at_a_time(in_memory, len), one_process_at_a_time(in_memory, len):
        pass
    unhashable = (row for row in ()).__next__
    with one_process_at_a_time(on_disk(), unhashable), one_process_at_a_time(on_disk(), unhashable):
        assert caplog.text == ""


def test_an_error_in_the_mapping_is_raised_and_frees_the_lock(on_disk):
    for _ in range(2):
        with pytest.raises(ValueError, match="broken row"), one_process_at_a_time(on_disk(), len):
            raise ValueError("broken row")
