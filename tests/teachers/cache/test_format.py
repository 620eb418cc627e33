"""The manifest says what was cached, and notices any change to itself."""

import json
import os

import numpy as np
import pytest
import torch

from gkd_trainer.errors import GKDTeacherError
from gkd_trainer.teachers import FrozenTeacher
from gkd_trainer.teachers.cache.format import (
    MANIFEST,
    Manifest,
    StoredWitness,
    read_manifest,
    source_of,
    template_digest,
    vocabulary_digest,
    weights_digest,
    write_aside,
    write_manifest,
)
from gkd_trainer.teachers.prompt_scores import TopScores, Witness
from tests.teachers.cache.rows import source

WITNESS = Witness([4, 5], TopScores(np.array([[7, 9]]), np.array([[-0.1, -np.inf]])))
SOURCE = source(witness=StoredWitness.of(WITNESS))
MADE = Manifest(source=SOURCE, kind="topk", dtype="float32", width=5, compression="none", files={"head": "0"})


def test_a_manifest_is_read_as_it_was_written(tmp_path):
    write_manifest(tmp_path, MADE)
    assert read_manifest(tmp_path) == MADE
    assert os.listdir(tmp_path) == [MANIFEST]
    scores = read_manifest(tmp_path).source.witness.scores
    assert np.array_equal(scores.ids_PK, [[7, 9]])
    assert np.allclose(scores.log_p_PK, [[-0.1, -np.inf]], atol=1e-5)


def test_a_manifest_with_any_byte_edited_is_refused(tmp_path):
    write_manifest(tmp_path, MADE)
    path = tmp_path / MANIFEST
    written = path.read_bytes()
    for place in range(0, len(written), 7):
        if written[place : place + 1].isspace():  # between values it means nothing
            continue
        path.write_bytes(written[:place] + bytes([written[place] ^ 1]) + written[place + 1 :])
        with pytest.raises(GKDTeacherError, match=r"manifest\.json is damaged"):
            read_manifest(tmp_path)


def test_a_field_of_a_newer_format_is_named(tmp_path):
    write_manifest(tmp_path, MADE.model_copy(update={"version": 2}))
    with pytest.raises(GKDTeacherError, match="version: Input should be 1"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"manifest": 1}'])
def test_a_file_that_is_no_manifest_is_refused(tmp_path, content):
    (tmp_path / MANIFEST).write_text(content)
    with pytest.raises(GKDTeacherError, match=r"manifest\.json is damaged"):
        read_manifest(tmp_path)


def test_a_folder_without_a_manifest_is_no_cache(tmp_path):
    with pytest.raises(GKDTeacherError, match=r"it has no manifest\.json: make one with `gkd-trainer cache`"):
        read_manifest(tmp_path)


def test_a_file_appears_only_when_its_contents_are_complete(tmp_path):
    def fail(path):
        path.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_aside(tmp_path / "file", fail)
    assert not (tmp_path / "file").exists()
    write_aside(tmp_path / "file", lambda path: path.write_text("all"))
    assert (tmp_path / "file").read_text() == "all"
    assert os.listdir(tmp_path) == ["file"]


def test_the_digest_of_weights_changes_with_one_value_its_dtype_and_not_with_the_source_folder(tiny_model, tmp_path):
    model = tiny_model()
    before = weights_digest(model)
    model.save_pretrained(tmp_path)
    assert weights_digest(type(model).from_pretrained(tmp_path)) == before
    assert weights_digest(tiny_model().to(torch.bfloat16)) != before
    with torch.no_grad():
        model.model.norm.weight[3] += 1e-6
    assert weights_digest(model) != before
    assert weights_digest(model.to("meta")) is None


def test_the_source_of_a_cache_states_teacher_and_tokenizer(tiny_model, byte_level):
    tokenizer = byte_level()
    made = source_of(FrozenTeacher(tiny_model(), top_k=3), tokenizer, name="big", max_length=9, train_on="last_turn")
    assert made.model_dump() == {
        "teacher": "big",
        "weights": weights_digest(tiny_model()),
        "dtype": "float32",
        "vocab_size": 368,
        "tokenizer": vocabulary_digest(tokenizer.get_vocab()),
        "chat_template": template_digest(tokenizer),
        "max_length": 9,
        "train_on": "last_turn",
        "witness": None,
    }
    json.dumps(made.model_dump())
    assert template_digest(byte_level(chat_template=None)) is None
    assert template_digest(byte_level(chat_template="other")) != made.chat_template
