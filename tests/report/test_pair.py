"""A student and a teacher outside a trainer."""

import pytest
import torch

from gkd_trainer.divergence import token_divergence
from gkd_trainer.errors import GKDConfigError, GKDDataError, GKDTeacherError
from gkd_trainer.report.pair import as_teacher, evaluating, pair
from gkd_trainer.teachers import FrozenTeacher, RoutedTeachers

IDS = [5, 6, 7, 8, 9]
LABELS = [-100, -100, 7, 8, 9]


def values_of(models, sequences):
    batch = models.batch(sequences, is_on_policy=False)
    return models.compare(batch, lambda student, teacher: token_divergence(student, teacher, beta=0.0)).values_N


def test_both_models_are_compared_as_their_own_logits_say(tiny_model, byte_level):
    student, teacher = tiny_model(), tiny_model(hidden=48, seed=1)
    found_N = values_of(pair(student, teacher, byte_level()), [(IDS, LABELS), (IDS[:4], LABELS[:4])])
    with torch.no_grad():
        log_q, log_p = (
            model(torch.tensor([IDS])).logits[0].double().log_softmax(dim=1) for model in (student, teacher)
        )
    expected = (log_p.exp() * (log_p - log_q)).sum(dim=1)[1:4]
    torch.testing.assert_close(found_N.double(), torch.cat([expected, expected[:2]]), rtol=1e-4, atol=1e-5)


def test_a_models_mode_comes_back(tiny_model, byte_level):
    student = tiny_model().train()
    values_of(pair(student, tiny_model(seed=1), byte_level()), [(IDS, LABELS)])
    assert student.training
    with evaluating(student):
        assert not student.training


def test_heads_padded_to_different_sizes_are_compared_over_the_shared_tokens(tiny_model, byte_level):
    tokenizer = byte_level()
    teacher = FrozenTeacher(tiny_model(vocab=384, seed=1), tokenizer=tokenizer)
    assert pair(tiny_model(), teacher, tokenizer).vocab_size == max(tokenizer.get_vocab().values()) + 1


def test_models_are_loaded_by_name_with_their_tokenizer(tiny_model, byte_level, tmp_path):
    for name, seed in (("student", 0), ("teacher", 1)):
        tiny_model(seed=seed).save_pretrained(tmp_path / name)
        byte_level().save_pretrained(tmp_path / name)
    models = pair(str(tmp_path / "student"), tmp_path / "teacher")
    assert models.tokenizer.get_vocab() == byte_level().get_vocab()
    assert models.limit == 2048


def test_a_sequence_beyond_the_context_is_refused(tiny_model, byte_level):
    models = pair(tiny_model(max_position_embeddings=8), tiny_model(seed=1), byte_level())
    with pytest.raises(GKDDataError, match="at most 8 tokens, the shorter context of student and teacher; got 9"):
        models.batch([([5] * 9, [5] * 9)], is_on_policy=False)


def test_teachers_that_do_not_fit_are_refused(tiny_model, tiny_encoder_decoder, byte_level):
    with pytest.raises(GKDTeacherError, match="two causal LMs or two encoder-decoders; got LlamaFor"):
        pair(tiny_model(), tiny_encoder_decoder(), byte_level())
    routed = RoutedTeachers({name: FrozenTeacher(tiny_model(seed=1)) for name in ("math", "code")})
    with pytest.raises(GKDTeacherError, match=r"pass one of them, from its `teachers` \(math, code\)"):
        pair(tiny_model(), routed, byte_level())
    with pytest.raises(GKDTeacherError, match="could not load the teacher"):
        pair(tiny_model(), "no/such-model")
    with pytest.raises(GKDConfigError, match="could not load the student"):
        pair("no/such-model", tiny_model())


def test_a_teacher_object_is_taken_as_it_is(tiny_model):
    teacher = FrozenTeacher(tiny_model(), top_k=3)
    assert as_teacher(teacher) is teacher


def test_completions_are_greedy_and_end_at_a_stop_token(tiny_model, byte_level):
    student = tiny_model()
    [completion, other] = pair(student, tiny_model(seed=1), byte_level()).completed([IDS, [9]], 6)
    ids = list(IDS)
    for token_id in completion.token_ids:
        assert token_id == int(student(torch.tensor([ids])).logits[0, -1].argmax())
        ids.append(token_id)
    assert completion.is_finished == (completion.token_ids[-1] == 2)
    assert len(other.token_ids) <= 6
