"""Hidden states as bytes: what is asked for, what an answer holds, and how far two of them are apart."""

import json
import sys

import pytest
import torch

from gkd_trainer.config import GKDArguments
from gkd_trainer.signals import Head
from gkd_trainer.teachers.prompt_scores import TokenSequence, fully_scored
from gkd_trainer.teachers.prompt_states import (
    STATE_DTYPES,
    likely_head,
    log_probs,
    mean_total_variation,
    narrowest_dtype,
    parse_states,
    states_request,
    top_scores,
)
from gkd_trainer.vllm_client import RawAnswer

ASKED = [fully_scored([5, 6, 7]), TokenSequence([8, 9, 10, 11, 12], fully_scored([0] * 5).targets_P[[1, 3]])]


def answer_of(states, dtype):
    """What vLLM answers with these states of each input."""
    body, items = bytearray(), []
    for index, states_LH in enumerate(states):
        part = bytes(states_LH.to(STATE_DTYPES[dtype]).view(torch.uint8).numpy())
        item = {"index": index, "embed_dtype": dtype, "endianness": sys.byteorder, "shape": list(states_LH.shape)}
        items.append({**item, "start": len(body), "end": len(body) + len(part)})
        body += part
    return RawAnswer(body, {"metadata": json.dumps({"data": items, "usage": {}})})


def random_states(width=7):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, width, generator=generator), torch.randn(4, width, generator=generator)]


def random_head(vocab=50, width=7, **options):
    return Head(torch.randn(vocab, width, generator=torch.Generator().manual_seed(1)), **options)


def test_the_option_takes_the_same_dtypes():
    [option] = [each for each in GKDArguments.__dataclass_fields__.values() if each.name == "teacher_server_dtype"]
    assert option.metadata["choices"] == ["auto", *STATE_DTYPES]


def test_a_request_leaves_out_the_last_token_of_each_sequence():
    request = states_request(ASKED, "bfloat16")
    assert request["input"] == [[5, 6], [8, 9, 10, 11]]
    assert (request["embed_dtype"], request["endianness"]) == ("bfloat16", sys.byteorder)
    json.dumps(request)


@pytest.mark.parametrize("dtype", STATE_DTYPES)
def test_the_states_before_the_scored_tokens_are_returned_as_they_were_sent(dtype):
    sent = random_states()
    first, second = parse_states(answer_of(sent, dtype), ASKED, dtype)
    held_in = torch.bfloat16 if dtype.startswith("fp8") else STATE_DTYPES[dtype]
    assert first.dtype == second.dtype == held_in
    assert torch.equal(first, sent[0].to(STATE_DTYPES[dtype]).to(held_in))
    assert torch.equal(second, sent[1][[1, 3]].to(STATE_DTYPES[dtype]).to(held_in))


def test_a_metadata_header_that_is_not_json_is_refused():
    with pytest.raises(ValueError, match="Expecting value"):
        parse_states(RawAnswer(bytearray(), {"metadata": "none"}), ASKED, "float32")


def test_values_beyond_the_requested_ones_are_refused():
    answer = answer_of(random_states(), "float32")
    answer.body.extend(b"\0\0\0\0")
    with pytest.raises(ValueError, match="promises values up to byte 168; got 172 bytes"):
        parse_states(answer, ASKED, "float32")


def test_infinity_from_a_dtype_that_is_too_narrow_is_refused():
    states = [1e5 * each for each in random_states()]
    parse_states(answer_of(states, "bfloat16"), ASKED, "bfloat16")
    with pytest.raises(ValueError, match="a hidden state is not finite in float16"):
        parse_states(answer_of(states, "float16"), ASKED, "float16")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_narrowest_dtype_is_the_one_that_the_states_were_computed_in(dtype):
    [states_PH, _] = random_states()
    assert narrowest_dtype(states_PH.to(STATE_DTYPES[dtype]).float()) == dtype


def test_a_state_outside_the_range_of_float16_needs_a_wider_dtype():
    assert narrowest_dtype(torch.tensor([[1.0009765625, 1e-30]])) == "float32"


@pytest.mark.parametrize("options", [{}, {"bias_V": torch.linspace(-1, 1, 50), "scale": 0.5, "softcap": 2.0}])
def test_log_probs_are_those_of_the_heads_logits(monkeypatch, options):
    monkeypatch.setattr("gkd_trainer.teachers.prompt_states._ROWS_AT_ONCE", 9)  # 50 rows in six parts
    head, (states_PH, _) = random_head(**options), random_states()
    expected_PV = head.logits(states_PH.double()).log_softmax(dim=1)
    torch.testing.assert_close(log_probs(states_PH, head).double(), expected_PV, atol=1e-5, rtol=0)


def test_total_variation_is_half_the_sum_of_the_differences():
    one_PV, other_PV = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]), torch.tensor([[0.25, 0.5, 0.25], [0, 1.0, 0]])
    assert mean_total_variation(one_PV.log(), other_PV.log()) == pytest.approx((0.25 + 1.0) / 2)
    assert mean_total_variation(one_PV.log(), one_PV.log()) == 0


def test_the_likely_head_has_the_rows_of_the_most_probable_tokens_at_each_position():
    head, (_, states_PH) = random_head(300, bias_V=torch.zeros(300)), random_states()
    rows = {tuple(row) for row in likely_head(states_PH, head).weight_VH.tolist()}
    for log_p_V in log_probs(states_PH, head):
        assert {tuple(row) for row in head.weight_VH[log_p_V.topk(16).indices].tolist()} <= rows
    assert len(rows) <= 64
    assert len(likely_head(states_PH, random_head(3)).weight_VH) == 3


def test_top_scores_are_the_most_probable_tokens_and_their_log_probs():
    head, (_, states_PH) = random_head(300), random_states()
    scores, log_p_PV = top_scores(states_PH, head, 5), log_probs(states_PH, head)
    assert scores.ids_PK.tolist() == log_p_PV.argsort(dim=1, descending=True)[:, :5].tolist()
    assert torch.equal(torch.tensor(scores.log_p_PK).float(), log_p_PV.sort(dim=1, descending=True).values[:, :5])
    assert top_scores(states_PH, random_head(3), 5).ids_PK.shape == (len(states_PH), 3)


def test_the_likely_tokens_show_another_model_and_forgive_rounding():
    head, (_, states_PH) = random_head(300), random_states()
    likely = likely_head(states_PH, head)
    same = mean_total_variation(log_probs(states_PH, likely), log_probs(states_PH.bfloat16(), likely))
    other = mean_total_variation(log_probs(states_PH, likely), log_probs(states_PH.roll(1, dims=0), likely))
    assert same < 0.01
    assert other > 0.3
