"""Heat-maps of completions, as notebooks show them."""

import html
import re

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from gkd_trainer.divergence import generalized_jsd
from gkd_trainer.errors import GKDConfigError, GKDDataError
from gkd_trainer.report import heat_map
from gkd_trainer.teachers import FrozenTeacher, OtherTokenizerTeacher, SelfTeacher, WeightedTeachers
from tests.report.test_page import data_of
from tests.vocabularies import sentencepiece_backend, sentencepiece_like


@pytest.fixture
def models(tiny_model, byte_level):
    return tiny_model(), tiny_model(hidden=48, seed=1), byte_level()


def test_a_completion_is_compared_token_by_token(models):
    student, teacher, tokenizer = models
    found = heat_map(
        student, teacher, "What is the capital?", " The capital is Paris.", tokenizer=tokenizer, beta=0.3
    ).tokens
    assert (found.prompt, "".join(found.text)) == ("What is the capital?", " The capital is Paris.<|im_end|>")
    ids = torch.tensor([tokenizer("What is the capital? The capital is Paris.<|im_end|>")["input_ids"]])
    with torch.no_grad():
        logits = [model(ids).logits[0, -len(found) - 1 : -1] for model in (student, teacher)]
    expected_N = generalized_jsd(*logits, beta=0.3)
    torch.testing.assert_close(torch.tensor(found.divergence), expected_N, rtol=1e-3, atol=1e-4)
    assert not found.is_on_policy


def test_without_a_completion_the_student_writes_one(models):
    student, teacher, tokenizer = models
    found = heat_map(student, teacher, [5, 6, 7], tokenizer=tokenizer, max_new_tokens=5)
    assert 1 <= len(found.tokens) <= 5
    assert found.tokens.is_on_policy
    # Greedy: each token is the student's first choice.
    assert [top[0][1] for top in found.tokens.student_top] == list(found.tokens.student_p)


def test_messages_and_token_ids_are_taken(models):
    student, teacher, tokenizer = models
    messages = [{"role": "user", "content": "hello there"}]
    by_chat = heat_map(student, teacher, messages, "I am fine", tokenizer=tokenizer).tokens
    assert by_chat.prompt == "<|im_start|>user\nhello there<|im_end|>\n<|im_start|>assistant\n"
    assert "".join(by_chat.text).startswith("I am fine<|im_end|>")
    by_ids = heat_map(student, teacher, torch.tensor([5, 6]), torch.tensor([7, 8]), tokenizer=tokenizer).tokens
    assert len(by_ids) == 2
    assert heat_map(student, teacher, np.array([5, 6]), np.array([7, 8]), tokenizer=tokenizer).tokens == by_ids


@pytest.mark.parametrize("kind", ["top_k", "weighted"])
def test_any_local_teacher_will_do(models, tiny_model, kind):
    student, model, tokenizer = models
    teacher = FrozenTeacher(model, top_k=3)
    if kind == "weighted":
        teacher = WeightedTeachers({"a": FrozenTeacher(model), "b": FrozenTeacher(tiny_model(seed=2))})
    found = heat_map(student, teacher, "hello", " there", tokenizer=tokenizer).tokens
    assert {len(top) for top in found.teacher_top} == {3 if kind == "top_k" else 5}


def test_a_teacher_with_another_tokenizer_is_compared_at_shared_boundaries(models, tiny_model):
    student, _, tokenizer = models
    other = sentencepiece_like(sentencepiece_backend())
    model = tiny_model(hidden=48, vocab=len(other), seed=1)
    teacher = OtherTokenizerTeacher(FrozenTeacher(model, tokenizer=other))
    found = heat_map(student, teacher, "one two", " three four five", tokenizer=tokenizer).tokens
    assert "".join(found.text).startswith(" three four five")
    compared = [index for index, value in enumerate(found.divergence) if value is not None]
    assert compared
    vocabulary = {tokenizer.decode([token_id]) for token_id in range(len(tokenizer))}
    for index in compared:
        assert found.teacher_top[index]
        assert {text for text, _ in found.teacher_top[index]} <= vocabulary


def test_a_teacher_that_is_the_student_without_its_adapter(tiny_model, byte_level):
    student = get_peft_model(tiny_model(), LoraConfig(init_lora_weights=False, target_modules=["q_proj", "v_proj"]))
    found = heat_map(student, SelfTeacher(), "hello", " there", tokenizer=byte_level()).tokens
    expected = heat_map(student, FrozenTeacher(tiny_model()), "hello", " there", tokenizer=byte_level()).tokens
    assert found.divergence == pytest.approx(expected.divergence, rel=1e-3)
    assert max(found.divergence) > 0


@pytest.mark.parametrize("completion", ["I am fine", None])
def test_an_encoder_decoder_is_compared_on_its_labels(tiny_encoder_decoder, byte_level, completion):
    student, teacher = tiny_encoder_decoder(), tiny_encoder_decoder(hidden=48, seed=1)
    found = heat_map(student, teacher, "hello there", completion, tokenizer=byte_level(None), max_new_tokens=4).tokens
    assert found.prompt == "hello there"
    if completion is not None:
        assert "".join(found.text) == "I am fine<|im_end|>"
    assert None not in found.divergence


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("hello", ""), "empty completion"),
        (([5], []), "expected a completion of at least one token; got an empty one"),
        (("",), "prompt"),
        (([], [5]), "expected a prompt; got an empty one"),
        (([5], "text"), "both text .* or both token ids; got one of each"),
        (("text", [5]), "both text .* or both token ids; got one of each"),
        (([5], [9999]), "a token id beyond the models' 368 tokens"),
    ],
    ids=str,
)
def test_input_that_gives_nothing_to_compare_is_refused(models, arguments, message):
    student, teacher, tokenizer = models
    with pytest.raises(GKDDataError, match=message):
        heat_map(student, teacher, *arguments, tokenizer=tokenizer)


def test_options_are_those_of_the_divergence(models):
    student, teacher, tokenizer = models
    with pytest.raises(GKDConfigError, match="beta must be in"):
        heat_map(student, teacher, "a", "b", tokenizer=tokenizer, beta=2.0)


def test_a_page_has_the_unit_of_its_divergence(models, tiny_model):
    student, teacher, tokenizer = models
    shown = heat_map(student, teacher, "a", "b", tokenizer=tokenizer, divergence="total_variation")
    assert data_of(shown.to_html())["unit"] == shown.unit == ""
    assert data_of(heat_map(student, teacher, "a", "b", tokenizer=tokenizer).to_html())["unit"] == "nats"
    other = sentencepiece_like(sentencepiece_backend())
    model = tiny_model(hidden=48, vocab=len(other), seed=1)
    sorted_teacher = OtherTokenizerTeacher(FrozenTeacher(model, tokenizer=other), mode="uld")
    assert heat_map(student, sorted_teacher, "one two", " three four", tokenizer=tokenizer).unit == ""


def test_a_notebook_gets_a_frame_of_its_own_with_all_text_escaped(models):
    student, teacher, tokenizer = models
    text = "<script>alert('x')</script>\"&"
    shown = heat_map(student, teacher, text, text, tokenizer=tokenizer)._repr_html_()
    [(frame, source)] = re.findall(r'^<iframe ([^>]*?)srcdoc="([^"]*)"></iframe>$', shown, re.DOTALL)
    assert 'sandbox="allow-scripts"' in frame
    assert "allow-same-origin" not in shown
    page = html.unescape(source)
    assert page.count("<script") == 2
    assert data_of(page)["maps"][0]["prompt"] == text


def test_a_heat_map_is_saved_as_a_page(models, tmp_path):
    student, teacher, tokenizer = models
    shown = heat_map(student, teacher, "one 😀", " two", tokenizer=tokenizer)
    shown.save(tmp_path / "map.html")
    assert data_of((tmp_path / "map.html").read_text(encoding="utf-8"))["maps"][0]["prompt"] == "one 😀"
