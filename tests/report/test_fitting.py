"""Rows that fit the contexts of all students, before any is loaded."""

import pytest
from peft import LoraConfig, get_peft_model

from gkd_trainer.errors import GKDConfigError, GKDDataError
from gkd_trainer.models.loading import load_student
from gkd_trainer.report.fitting import fitting_rows, reader_of
from gkd_trainer.report.pair import pair


def words(n_prompt, n_completion=1):
    ids = [5] * (n_prompt + n_completion)
    return {"input_ids": ids, "labels": [*[-100] * n_prompt, *[5] * n_completion]}


@pytest.fixture
def folder(tmp_path, tiny_model, byte_level):
    """Make a student's folder with a context."""

    def make(name, context, **config):
        tiny_model(max_position_embeddings=context, **config).save_pretrained(tmp_path / name)
        byte_level().save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    return make


def readers(folder, *contexts):
    return [reader_of(folder(f"student{context}", context), False) for context in contexts]


def test_a_row_fits_whole_and_with_its_prompt_completed(folder):
    rows = [words(16), words(17), words(10, 10), words(10, 11)]
    found = fitting_rows(rows, readers(folder, 20), None, 4)
    assert found.kept == (0, 2)
    assert found.note == (
        "Left out: 2 rows that exceed the shortest context (20 tokens), either as they are or as a prompt with 4 new "
        "tokens."
    )


def test_the_shortest_context_counts_whosever_it_is(folder):
    rows, both = [words(16), words(30)], readers(folder, 100, 20)
    assert fitting_rows(rows, both, 50, 4).kept == fitting_rows(rows, both[:1], 20, 4).kept == (0,)
    assert fitting_rows(rows, both[:1], 50, 4).kept == (0, 1)
    assert fitting_rows(rows, both[:1], 50, 4).note == ""
    assert fitting_rows(rows, both[1:], None, 4).note.startswith("Left out: 1 row that exceeds the")


def test_rows_of_which_none_fits_are_refused_with_the_context_they_need(folder):
    message = r"context of the models, 20 tokens, with completions of max_new_tokens=8; the shortest of 2 needs 25"
    with pytest.raises(GKDDataError, match=message):
        fitting_rows([words(30), words(17)], readers(folder, 20), 50, 8)


def test_a_row_that_can_not_be_used_is_named(folder):
    with pytest.raises(GKDDataError, match="row 1: "):
        fitting_rows([words(3), {"prompt": ""}], readers(folder, 20), None, 4)


def test_an_encoder_decoders_prompt_and_completion_need_a_context_each(folder):
    [reader] = readers(folder, 20)
    reader = type(reader)(reader.tokenizer, reader.stop_ids, True, 20)
    rows = [{"input_ids": [5] * n, "labels": [5] * m} for n, m in ((20, 20), (21, 1), (1, 21))]
    assert fitting_rows(rows, [reader], None, 20).kept == (0,)


@pytest.mark.parametrize("is_adapter", [False, True])
def test_a_students_files_say_what_the_loaded_student_does(folder, tiny_model, tmp_path, byte_level, is_adapter):
    name = folder("student", 96, eos=[2, 7])
    if is_adapter:
        adapted = get_peft_model(load_student(name, None, False), LoraConfig(target_modules=["q_proj"]))
        adapted.save_pretrained(tmp_path / "adapter")
        byte_level().save_pretrained(tmp_path / "adapter")
        name = str(tmp_path / "adapter")
    reader = reader_of(name, False)
    models = pair(load_student(name, None, False), tiny_model())
    assert (reader.stop_ids, reader.is_encoder_decoder, reader.limit) == (models.stop_ids, False, models.limit)
    assert (reader.limit, set(reader.stop_ids) >= {2, 7}) == (96, True)


def test_a_student_that_can_not_be_read_is_named():
    with pytest.raises(GKDConfigError, match="could not load the student from 'no/such'"):
        reader_of("no/such", False)
