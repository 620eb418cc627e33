"""Maps of completions, token by token."""

import dataclasses
import json
import math

import pytest
import torch

from gkd_trainer.divergence import token_divergence
from gkd_trainer.errors import GKDDataError
from gkd_trainer.report.token_map import TokenMap, token_maps
from gkd_trainer.signals import LogitsSignal
from gkd_trainer.types import TokenBatch
from tests.report.samples import NASTY, token_map
from tests.teachers.batches import batch_of_six

V = 368


def predictions(batch, seed):
    return LogitsSignal(3 * torch.randn(batch.n_scored, V, generator=torch.Generator().manual_seed(seed)))


def maps_of(batch, rows, tokenizer=None, **options):
    student, teacher = predictions(batch, 0), predictions(batch, 1)
    result = token_divergence(student, teacher, beta=0.3)
    return token_maps(batch, student, teacher, result, rows, tokenizer, **options), student, teacher, result


class SameText:
    """A tokenizer all of whose tokens have the same text, like bytes of characters."""

    def decode(self, token_ids, **options):
        return "\ufffd" * len(token_ids)


def close(found, expected):
    torch.testing.assert_close(torch.tensor(found).double(), expected.double(), rtol=1e-3, atol=1e-6)


def test_a_map_has_the_numbers_of_each_of_its_tokens():
    batch = batch_of_six()
    [found], student, teacher, result = maps_of(batch, [0])
    ids = batch.model_inputs["input_ids"][0].tolist()
    assert found.prompt == " ".join(map(str, ids[:5]))
    assert found.text == tuple(f" {token_id}" for token_id in ids[5:12])
    here = batch.rows_N == 0
    close(found.divergence, result.values_N[here])
    close(found.acceptance, result.acceptance_N[here])
    close(found.student_entropy, result.student_entropy_N[here])
    close(found.teacher_entropy, result.teacher_entropy_N[here])
    for side, signal in (("student", student), ("teacher", teacher)):
        p_nV = signal.logits_NV[here].softmax(dim=1)
        close(getattr(found, f"{side}_p"), p_nV.gather(1, batch.targets_N[here][:, None])[:, 0])
        top = getattr(found, f"{side}_top")
        assert [[text for text, _ in pairs] for pairs in top] == [
            [str(token_id) for token_id in ids] for ids in p_nV.topk(5, dim=1).indices.tolist()
        ]


def test_a_tokens_place_among_the_top_tokens_is_found_by_its_id():
    batch = batch_of_six()
    [found], student, teacher, _ = maps_of(batch, [1], SameText(), top=100)
    for side, signal in (("student", student), ("teacher", teacher)):
        ranks = getattr(found, f"{side}_rank")
        assert ranks[3:7] == (None,) * 4  # between turns
        here = batch.rows_N == 1
        expected = [
            ids.index(target) if target in ids else None
            for ids, target in zip(
                signal.logits_NV[here].topk(100, dim=1).indices.tolist(), batch.targets_N[here].tolist(), strict=True
            )
        ]
        assert [*ranks[:3], *ranks[7:]] == expected
        assert {rank is None for rank in expected} == {True, False}


def test_tokens_between_turns_are_kept_without_numbers():
    batch = batch_of_six()
    [found], _, _, result = maps_of(batch, [1])
    assert len(found) == 11  # from the first trained token to the last
    assert [value is not None for value in found.divergence] == [True] * 3 + [False] * 4 + [True] * 4
    close([value for value in found.divergence if value is not None], result.values_N[batch.rows_N == 1])
    assert found.student_top[4] == ()


def test_a_sample_without_trained_tokens_has_no_map():
    found, *_ = maps_of(batch_of_six(), [3, 4])
    assert [len(each) for each in found] == [1]


def test_a_long_sample_is_cut_and_says_so():
    [found], *_ = maps_of(batch_of_six(), [1], max_tokens=8)
    assert (len(found), found.is_cut) == (8, True)
    [found], *_ = maps_of(batch_of_six(), [1], max_tokens=11)
    assert (len(found), found.is_cut) == (11, False)


def test_a_number_that_is_not_finite_is_unknown():
    batch = batch_of_six()
    student, teacher = predictions(batch, 0), predictions(batch, 1)
    result = token_divergence(student, teacher)
    broken = dataclasses.replace(result, values_N=result.values_N * math.nan, acceptance_N=None)
    [found] = token_maps(batch, student, teacher, broken, [0], None)
    assert set(found.divergence) == set(found.acceptance) == {None}


def test_an_encoder_decoders_prompt_is_what_the_encoder_reads():
    inputs = {
        "input_ids": torch.tensor([[7, 8, 9], [5, 0, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1], [1, 0, 0]]),
        "decoder_input_ids": torch.tensor([[0, 11], [0, 13]]),
        "labels": torch.tensor([[11, 12], [13, -100]]),
    }
    found, *_ = maps_of(TokenBatch.from_inputs(inputs), [0, 1])
    assert [(each.prompt, each.text) for each in found] == [("7 8 9", (" 11", " 12")), ("5", (" 13",))]


def test_a_map_survives_json():
    original = token_map(NASTY)
    assert TokenMap.from_json(json.loads(json.dumps(original.to_json()))) == original


@pytest.mark.parametrize(
    "change",
    [
        {"text": ["one"]},
        {"divergence": None},
        {"student_p": ["much"]},
        {"student_top": [[["one"]]]},
        {"student_rank": [0]},
        {"teacher_rank": [0.5, None]},
        {"prompt": ...},
        {"acceptance": [1.0]},
    ],
    ids=str,
)
def test_anything_else_is_refused(change):
    values = {**token_map().to_json(), **change}
    if ... in change.values():
        del values["prompt"]
    with pytest.raises(GKDDataError, match="expected a recorded sample"):
        TokenMap.from_json(values)


def test_an_older_file_has_no_places_among_the_top_tokens():
    values = token_map().to_json()
    del values["student_rank"], values["teacher_rank"]
    found = TokenMap.from_json(values)
    assert found.student_rank == found.teacher_rank == (None, None)


def test_nan_in_a_file_is_an_unknown_number():
    values = token_map().to_json()
    values["divergence"] = [math.nan, 1]
    assert TokenMap.from_json(values).divergence == (None, 1.0)
