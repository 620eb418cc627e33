"""A teacher behind vLLM: its scores are the model's, position by position, or an error says why not."""

import json
import logging
import threading
import time
from dataclasses import replace

import pytest
import torch

from gkd_trainer.errors import GKDConfigError, GKDDataError, GKDServerError, GKDTeacherError
from gkd_trainer.teachers import Teacher, VLLMServerTeacher
from tests.serving import MAX_MODEL_LENGTH, FaultyProxy, changed, cut_in_half, status, trickle
from tests.teachers.batches import batch_of, batch_of_six, token_rows

pytestmark = pytest.mark.usefixtures("short_waits")

CPU = torch.device("cpu")
SCORES = "/v1/completions"
K = 5


@pytest.fixture
def tokenizer(byte_level):
    return byte_level()


@pytest.fixture
def make(proxy, tokenizer):
    """Make a teacher behind `proxy`, prepared, and forget what was asked of the proxy meanwhile."""

    def make(base_url=proxy.base_url, **options):
        options = {"top_k": K, "server_timeout": 5.0, "request_timeout": 20.0, "checks": False, **options}
        teacher = VLLMServerTeacher(base_url, **options)
        teacher.prepare(CPU, tokenizer)
        proxy.requests.clear()
        return teacher

    return make


def expected_log_p_NV(model, batch):
    with torch.no_grad():
        return model(**batch.model_inputs).logits[batch.is_scored_BL].log_softmax(dim=-1)


def assert_scores_are_those_of(signal, log_p_NV):
    torch.testing.assert_close(signal.log_p_NK, log_p_NV.gather(1, signal.ids_NK), atol=1e-4, rtol=0)
    torch.testing.assert_close(signal.log_p_NK, log_p_NV.topk(signal.log_p_NK.shape[1]).values, atol=1e-4, rtol=0)


def as_scored_by(model):
    """A rule that answers as a server of another model would."""

    def rule(request, forward):
        answer = forward()
        value = json.loads(answer.body)
        for ids, choice in zip(request.json["prompt"], value["choices"], strict=True):
            with torch.no_grad():
                log_p_LV = model(torch.tensor([ids])).logits[0].log_softmax(dim=-1)
            choice["prompt_logprobs"] = [None]
            for log_p_V, own in zip(log_p_LV, ids[1:], strict=False):
                kept = {own, *log_p_V.topk(request.json["prompt_logprobs"]).indices.tolist()}
                choice["prompt_logprobs"].append({str(token): {"logprob": log_p_V[token].item()} for token in kept})
        return replace(answer, body=json.dumps(value).encode())

    return rule


def with_log_probs(change):
    """A rule that passes each log-prob of the prompts through a function."""

    def in_place(answer):
        for choice in answer["choices"]:
            for entry in choice["prompt_logprobs"][1:]:
                for score in entry.values():
                    score["logprob"] = change(score["logprob"])

    return changed(in_place)


@pytest.mark.parametrize("side", ["right", "left"])
def test_scores_are_the_models_log_probs_at_the_scored_positions(make, served_model, side):
    batch, teacher = batch_of_six(side), make()
    signal = teacher.score(batch)
    assert isinstance(teacher, Teacher)
    assert signal.ids_NK.shape == signal.log_p_NK.shape == (len(batch.targets_N), K)
    assert (signal.ids_NK.dtype, signal.log_p_NK.dtype) == (torch.int64, torch.float32)
    assert_scores_are_those_of(signal, expected_log_p_NV(served_model, batch))


def test_scores_do_not_depend_on_the_padding_side_or_the_mask(make):
    right, left, unmasked = batch_of_six("right"), batch_of_six("left"), batch_of_six("right")
    del unmasked.model_inputs["attention_mask"]
    teacher = make()
    expected = teacher.score(right)
    for batch in (left, unmasked):
        signal = teacher.score(batch)
        assert torch.equal(signal.ids_NK, expected.ids_NK)
        torch.testing.assert_close(signal.log_p_NK, expected.log_p_NK, atol=1e-4, rtol=0)


def test_packed_sequences_are_scored_one_by_one(make, served_model):
    rows = token_rows([9, 6, 12])
    trained = [range(3, 9), [2, 5], range(7, 12)]
    apart = torch.cat([expected_log_p_NV(served_model, batch_of([r], [t])) for r, t in zip(rows, trained, strict=True)])
    flat = batch_of([[token for row in rows for token in row]], [[*range(3, 9), 11, 14, *range(22, 27)]])
    flat.model_inputs["position_ids"] = torch.cat([torch.arange(len(row)) for row in rows])[None]
    del flat.model_inputs["attention_mask"]
    assert_scores_are_those_of(make().score(flat), apart)


def test_position_ids_of_padded_rows_split_nothing(make, served_model):
    batch = batch_of_six("left")
    mask_BL = batch.model_inputs["attention_mask"]
    batch.model_inputs["position_ids"] = (mask_BL.cumsum(dim=1) - 1).clamp_min(0)
    assert_scores_are_those_of(make().score(batch), expected_log_p_NV(served_model, batch))


def test_scores_are_at_temperature_one_whatever_the_server_samples_with(make, proxy):
    make().score(batch_of_six())
    for request in proxy.requests:
        assert request.json["max_tokens"] == 1
        assert request.json["temperature"] == 0
        assert {"top_p", "top_k", "min_p", "repetition_penalty"} <= request.json.keys()


def test_prompts_end_with_the_last_token_trained_on_and_rows_without_labels_are_not_sent(make, proxy):
    batch = batch_of(token_rows([30, 25, 20]), [[3, 8], [], [19]])
    make().score(batch)
    [request] = proxy.requests
    assert [len(prompt) for prompt in request.json["prompt"]] == [16, 9, 20]  # the witness first


def test_a_batch_without_labels_needs_no_request(make, proxy):
    signal = make().score(batch_of(token_rows([5, 3]), [[], []]))
    assert signal.ids_NK.shape == signal.log_p_NK.shape == (0, K)
    assert (signal.ids_NK.dtype, signal.log_p_NK.dtype) == (torch.int64, torch.float32)
    assert proxy.requests == []


@pytest.mark.parametrize("top_k", [1, 2, 64])
def test_the_prompts_own_token_is_no_candidate_beyond_the_top_k(make, served_model, top_k):
    """Random prompts: most of their own tokens lie outside of a small top k, most inside of a large one."""
    batch = batch_of_six()
    signal = make(top_k=top_k).score(batch)
    log_p_NV = expected_log_p_NV(served_model, batch)
    ranks_N = (log_p_NV > log_p_NV.gather(1, batch.targets_N[:, None])).sum(dim=1)
    assert (ranks_N >= top_k).any()
    assert_scores_are_those_of(signal, log_p_NV)


def test_a_log_prob_that_vllm_clamped_is_minus_infinity(make, proxy):
    teacher = make()
    proxy.next(with_log_probs(lambda value: -9999.0 if value < -3.0 else value), times=None)
    log_p_NK = teacher.score(batch_of_six()).log_p_NK
    assert (log_p_NK == -torch.inf).any()
    assert log_p_NK[log_p_NK != -torch.inf].min() >= -3.0


def test_two_servers_share_a_batch_and_its_order_stays(make, vllm_server, served_model):
    batch = batch_of(token_rows(range(6, 23)), [range(3, length) for length in range(6, 23)])
    with FaultyProxy(vllm_server.base_url) as one, FaultyProxy(vllm_server.base_url) as other:
        teacher = make([one.base_url, other.base_url])
        before = len(one.requests), len(other.requests)
        signal = teacher.score(batch)
        served = [len(one.requests) - before[0], len(other.requests) - before[1]]
    assert sorted(served) == [2, 3]
    assert_scores_are_those_of(signal, expected_log_p_NV(served_model, batch))


def test_small_batches_take_the_servers_in_turn(make, vllm_server):
    with FaultyProxy(vllm_server.base_url) as one, FaultyProxy(vllm_server.base_url) as other:
        teacher = make([one.base_url, other.base_url])
        one.requests.clear()
        other.requests.clear()
        teacher.score(batch_of(token_rows([8, 8]), [[5], [6]]))
        assert (len(one.requests), len(other.requests)) == (1, 1)
        for _ in range(4):
            teacher.score(batch_of(token_rows([8]), [[5]]))
        assert (len(one.requests), len(other.requests)) == (3, 3)


def test_the_vocabulary_is_that_of_the_tokenizer_and_padding_rows_are_left_to_slicing(make, tokenizer):
    teacher = make()
    assert teacher.vocabulary == tokenizer.get_vocab()
    assert teacher.vocab_size is None  # it is unknown that the model has 368 rows, 3 more than tokens
    assert teacher.model is None
    signal = teacher.score(batch_of_six())
    assert 365 < signal.vocab_size <= 368
    assert (signal.ids_NK >= 365).any()
    assert (signal.sliced(365).log_p_NK[signal.ids_NK >= 365] == -torch.inf).all()


def test_the_first_token_of_a_packed_sequence_can_not_be_trained_on(make):
    flat = batch_of(token_rows([10]), [[3, 6]])
    flat.model_inputs["position_ids"] = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1, 2, 3]])
    with pytest.raises(GKDDataError, match="sample 0 of a batch trains on the first token of a sequence"):
        make().score(flat)


def test_labels_on_padding_are_refused(make):
    batch = batch_of_six()
    batch.model_inputs["attention_mask"][0, 7] = 0
    with pytest.raises(GKDDataError, match="the attention mask hides"):
        make().score(batch)


def test_a_server_that_does_not_take_the_longest_sequences_is_refused_at_first_contact(proxy, tokenizer):
    teacher = VLLMServerTeacher(proxy.base_url, top_k=5)
    with pytest.raises(GKDTeacherError, match=r"up to 320: start.*--max-model-len 321.*max_length=319"):
        teacher.prepare(torch.device("cpu"), tokenizer, max_length=MAX_MODEL_LENGTH)
    teacher.prepare(torch.device("cpu"), tokenizer, max_length=MAX_MODEL_LENGTH - 1)


def test_a_sequence_that_is_too_long_for_the_server_is_refused_before_it_is_sent(make, proxy):
    teacher = make()
    teacher.score(batch_of(token_rows([MAX_MODEL_LENGTH + 9]), [[MAX_MODEL_LENGTH - 2]]))  # what follows is not sent
    proxy.requests.clear()
    with pytest.raises(GKDTeacherError, match=r"at most 319 tokens.*up to 320: start.* --max-model-len 321 or more"):
        teacher.score(batch_of(token_rows([MAX_MODEL_LENGTH + 9]), [[MAX_MODEL_LENGTH - 1]]))
    assert proxy.requests == []


# What comes back wrong.


def drop_position(answer):
    del answer["choices"][1]["prompt_logprobs"][2]


def add_position(answer):
    answer["choices"][1]["prompt_logprobs"].append(answer["choices"][1]["prompt_logprobs"][-1])


def drop_choice(answer):
    del answer["choices"][-1]


def repeat_choice(answer):
    answer["choices"][-1]["index"] = 0


def score_the_first_token(answer):
    answer["choices"][1]["prompt_logprobs"][0] = answer["choices"][1]["prompt_logprobs"][1]


def drop_candidates(answer):
    entries = answer["choices"][1]["prompt_logprobs"][-1]
    for token in list(entries)[:3]:
        del entries[token]


def null_position(answer):
    answer["choices"][1]["prompt_logprobs"][-1] = None


def drop_scores(answer):
    answer["choices"][1]["prompt_logprobs"] = None


def exchange_choices(answer):
    one, other = answer["choices"][1:3]
    one["prompt_logprobs"], other["prompt_logprobs"] = other["prompt_logprobs"], one["prompt_logprobs"]


def negative_id(answer):
    entries = answer["choices"][1]["prompt_logprobs"][-1]
    entries["-7"] = entries.pop(list(entries)[-1])


WRONG = {
    "status 500": (status(500, b"out of memory"), "status 500: out of memory"),
    "half an answer": (cut_in_half, "peer closed connection"),
    "NaN": (with_log_probs(lambda value: float("nan")), "a log-prob is not finite"),
    "null": (with_log_probs(lambda value: None), "a log-prob is not a number"),
    "a string": (with_log_probs(str), "a log-prob is not a number"),
    "a position too few": (changed(drop_position), "12 positions were sent, but the answer has 11"),
    "a position too many": (changed(add_position), "12 positions were sent, but the answer has 13"),
    "a choice too few": (changed(drop_choice), r"5 prompts were sent, but the answer has the choices \[0, 1, 2, 3\]"),
    "a choice twice": (
        changed(repeat_choice),
        r"5 prompts were sent, but the answer has the choices \[0, 0, 1, 2, 3\]",
    ),
    "another's scores": (changed(exchange_choices), "12 positions were sent, but the answer has 15"),
    "a scored first token": (changed(score_the_first_token), "the first token of a prompt has scores"),
    "candidates too few": (changed(drop_candidates), "expected 5 or 6 tokens per position; got [23] to"),
    "an empty position": (changed(null_position), "TypeError"),
    "no scores": (changed(drop_scores), "prompt_logprobs: Input should be a valid list"),
    "a negative id": (changed(negative_id), "a token id is negative: -7"),
}


@pytest.mark.parametrize(("fault", "cause"), WRONG.values(), ids=WRONG.keys())
def test_wrong_answers_are_requested_again_and_end_in_an_error_that_says_what_was_wrong(
    make, proxy, served_model, fault, cause
):
    rows = token_rows([12, 15, 9, 6])
    batch = batch_of(rows, [[*range(3, len(row))] for row in rows])  # for one request
    teacher = make()
    proxy.next(fault, times=2, path=SCORES)
    assert_scores_are_those_of(teacher.score(batch), expected_log_p_NV(served_model, batch))
    assert len(proxy.requests) == 3

    proxy.next(fault, times=None, path=SCORES)
    with pytest.raises(GKDServerError, match=f"{proxy.base_url} did not complete POST {SCORES}.*4 attempts.*{cause}"):
        teacher.score(batch)


@pytest.mark.parametrize(
    ("change", "cause"),
    [(lambda value: 0.01, "a log-prob of 0.01 is above 0"), (lambda value: -0.5, "have a mass of 3.033, more than 1")],
)
def test_scores_that_are_not_log_probs_are_refused_with_the_option_and_not_requested_again(make, proxy, change, cause):
    teacher = make()
    proxy.next(with_log_probs(change), times=None, path=SCORES)
    with pytest.raises(
        GKDTeacherError, match=rf"{proxy.base_url} gives .* \(.*{cause}\): .*--logprobs-mode raw_logprobs"
    ):
        teacher.score(batch_of(token_rows([8]), [[5]]))
    assert proxy.paths() == [SCORES]


def test_a_missing_score_of_the_prompts_own_token_is_a_wrong_answer(make, proxy):
    def rename_own(answer):
        # The own token stands first.
        for choice in answer["choices"]:
            for index, entries in enumerate(choice["prompt_logprobs"][1:], start=1):
                own = next(iter(entries))
                choice["prompt_logprobs"][index] = {"99999" if key == own else key: v for key, v in entries.items()}

    teacher = make()
    proxy.next(changed(rename_own), times=None, path=SCORES)
    with pytest.raises(GKDServerError, match="a position has no score for the prompt's own token"):
        teacher.score(batch_of_six())


def test_choices_may_come_in_any_order(make, proxy, served_model):
    teacher, batch = make(), batch_of_six()
    proxy.next(changed(lambda answer: answer["choices"].reverse()), path=SCORES)
    assert_scores_are_those_of(teacher.score(batch), expected_log_p_NV(served_model, batch))
    assert len(proxy.requests) == 2


def test_a_trickle_ends_within_the_time_outs(make, proxy):
    teacher = make(server_timeout=0.6, request_timeout=0.4)
    proxy.next(trickle(pieces=40, pause=0.1), times=None, path=SCORES)
    started = time.monotonic()
    with pytest.raises(GKDServerError, match=r"not complete after 0\.4 s"):
        teacher.score(batch_of_six())
    assert time.monotonic() - started < 3


def test_a_refusal_is_not_repeated(make, proxy):
    teacher = make()
    proxy.next(status(404, b"no such model"), times=None, path=SCORES)
    with pytest.raises(GKDServerError, match=f"refused POST {SCORES} with status 404: no such model"):
        teacher.score(batch_of(token_rows([8]), [[5]]))
    assert len(proxy.requests) == 1


def test_a_server_that_is_gone_ends_within_the_time_out(make, proxy):
    teacher = make(server_timeout=0.5)
    started = time.monotonic()
    with proxy.stopped(), pytest.raises(GKDServerError, match=f"{proxy.base_url} did not complete.*ConnectError"):
        teacher.score(batch_of_six())
    assert 0.5 <= time.monotonic() - started < 3


def test_a_server_that_comes_back_is_waited_for(make, proxy, served_model):
    teacher, batch = make(), batch_of_six()
    proxy.stop()
    restart = threading.Timer(0.5, proxy.start)
    restart.start()
    try:
        signal = teacher.score(batch)
    finally:
        restart.join()
    assert_scores_are_those_of(signal, expected_log_p_NV(served_model, batch))


# Another model than before.


def test_a_server_that_came_back_with_another_model_is_noticed_with_its_first_answer(make, proxy, tiny_model):
    teacher, batch = make(), batch_of_six()
    proxy.next(as_scored_by(tiny_model(hidden=128, seed=1)), times=None, path=SCORES)
    message = (
        f"{proxy.base_url} serves another model than at the start.*changed by 0.*Restart it with the original '/.*'"
    )
    with pytest.raises(GKDServerError, match=message):
        teacher.score(batch_of(token_rows([8]), [[5]]))
    assert len(proxy.requests) == 1
    proxy.heal()
    assert len(teacher.score(batch).ids_NK) == len(batch.targets_N)


def test_the_right_model_passes_however_its_answers_are_computed(make, proxy, served_model):
    """In bf16 this model's log-probs move by up to 0.1 nat, and tokens at the edge of the top k change."""
    teacher, batch = make(top_k=20), batch_of_six()
    for model in (served_model, as_bfloat16(served_model)):
        proxy.next(as_scored_by(model), path=SCORES)
        proxy.next(as_scored_by(model), path=SCORES)
        assert len(teacher.score(batch).ids_NK) == len(batch.targets_N)


def as_bfloat16(model):
    copy = type(model)(model.config).eval()
    copy.load_state_dict(model.state_dict())
    return copy.to(torch.bfloat16)


@pytest.mark.parametrize("nats", [-0.5, -2.0])
def test_a_shift_of_all_log_probs_is_another_model(make, proxy, nats):
    teacher = make(top_k=20)
    proxy.next(with_log_probs(lambda value: value + nats), times=None, path=SCORES)
    with pytest.raises(GKDServerError, match="serves another model"):
        teacher.score(batch_of_six())


# The start-up check.


def test_a_sound_server_passes_every_check(make, proxy, served_model):
    teacher = make(checks=True, local_copy=served_model)
    assert len(teacher.score(batch_of_six()).ids_NK) == len(batch_of_six().targets_N)


def test_the_checks_cost_two_scores(proxy, tokenizer):
    VLLMServerTeacher(proxy.base_url, top_k=K).prepare(CPU, tokenizer)
    assert proxy.paths() == ["/v1/models", "/tokenize", SCORES, SCORES]


def test_without_the_checks_the_first_contact_is_one_score(proxy, tokenizer):
    VLLMServerTeacher(proxy.base_url, top_k=K, checks=False).prepare(CPU, tokenizer)
    assert proxy.paths() == ["/v1/models", SCORES]


def test_a_teacher_needs_the_students_tokenizer(proxy):
    with pytest.raises(GKDTeacherError, match="pass processing_class to the trainer"):
        VLLMServerTeacher(proxy.base_url).prepare(CPU)
    assert proxy.requests == []


def test_a_model_that_is_not_served_is_refused_with_those_that_are(make, served_dir):
    with pytest.raises(GKDTeacherError, match=f"serves '{served_dir}', but the teacher is 'Qwen'.*pass one"):
        make(model="Qwen")


def test_a_server_that_is_not_there_is_named(tokenizer):
    teacher = VLLMServerTeacher("http://127.0.0.1:9", server_timeout=0.2)
    with pytest.raises(GKDServerError, match=r"http://127\.0\.0\.1:9 did not complete GET /v1/models"):
        teacher.prepare(CPU, tokenizer)


@pytest.mark.parametrize("added", [{"special": False}, {"special": True}], ids=["a word", "a special token"])
def test_another_tokenizer_is_refused(proxy, tokenizer, added):
    if added["special"]:
        tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|endoftext|>", "<tool>"]})
    else:
        tokenizer.add_tokens(["world"])
    message = r"is not the student's: the text .* becomes \d+ tokens there and \d+ here, which differ from token \d+"
    with pytest.raises(GKDTeacherError, match=message):
        VLLMServerTeacher(proxy.base_url, top_k=K).prepare(CPU, tokenizer)


def test_a_server_without_a_tokenizer_is_taken_with_a_warning(make, proxy, caplog):
    """What --skip-tokenizer-init answers; it makes a server several times faster."""
    body = b'{"error": {"message": "Tokenizer not available when `skip_tokenizer_init=True`", "code": 400}}'
    proxy.next(status(400, body), path="/tokenize")
    with caplog.at_level(logging.WARNING, logger="gkd_trainer.teachers.served"):
        make(checks=True)
    [record] = caplog.records
    assert f"{proxy.base_url} runs without a tokenizer" in record.message


def test_a_local_copy_that_disagrees_is_refused(make, tiny_model):
    with pytest.raises(GKDTeacherError, match=r"local copy of the teacher disagree.* at most 0\.01 .* torch\.float32"):
        make(checks=True, local_copy=tiny_model(hidden=128, seed=1))


def test_a_local_copy_of_slightly_other_weights_is_refused(make, served_model):
    copy = type(served_model)(served_model.config).eval()
    copy.load_state_dict(served_model.state_dict())
    copy.model.layers[1].mlp.down_proj.weight.data *= 2.0
    with pytest.raises(GKDTeacherError, match="local copy of the teacher disagree"):
        make(checks=True, local_copy=copy)


def test_a_local_copy_in_bfloat16_may_differ_by_its_rounding(make, served_model):
    make(checks=True, local_copy=as_bfloat16(served_model))


def test_scores_that_differ_from_one_request_to_the_next_are_refused(proxy, tokenizer, tiny_model):
    proxy.next(lambda request, forward: forward(), path=SCORES)
    proxy.next(as_scored_by(tiny_model(hidden=128, seed=1)), path=SCORES)
    with pytest.raises(GKDTeacherError, match="scored one text differently the second time: mean total variation 0"):
        VLLMServerTeacher(proxy.base_url, top_k=K).prepare(CPU, tokenizer)


def test_a_greedy_token_that_is_not_the_most_probable_is_refused(proxy, tokenizer):
    proxy.next(changed(lambda answer: answer["choices"][0].update(token_ids=[17])), path=SCORES)
    with pytest.raises(
        GKDTeacherError, match=r"does not generate the token that it scores highest.* greedy token is 17 "
    ):
        VLLMServerTeacher(proxy.base_url, top_k=K).prepare(CPU, tokenizer)


def test_more_tokens_than_the_server_gives_are_refused_with_the_option_that_allows_them(make, proxy):
    with pytest.raises(GKDTeacherError, match="start it with --max-logprobs 65, or lower top_k"):
        make(top_k=65)


def test_servers_of_different_models_are_refused(make, vllm_server, tiny_model):
    with FaultyProxy(vllm_server.base_url) as one, FaultyProxy(vllm_server.base_url) as other:
        other.next(as_scored_by(tiny_model(hidden=128, seed=1)), times=None, path=SCORES)
        with pytest.raises(GKDTeacherError, match=f"{one.base_url} and {other.base_url} score one text differently"):
            make([one.base_url, other.base_url])


def test_an_unprepared_teacher_raises():
    teacher = VLLMServerTeacher("http://127.0.0.1:9")
    with pytest.raises(RuntimeError, match="before prepare"):
        teacher.score(batch_of_six())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 0}, "top_k must be at least 1; got 0"),
        ({"base_url": []}, "at least one server; got none"),
        ({"base_url": "localhost"}, "must be a URL that starts with http"),
        ({"checks": False, "local_copy": torch.nn.Identity()}, "checks=False disables"),
    ],
)
def test_arguments_without_a_meaning_are_refused(options, message):
    with pytest.raises(GKDConfigError, match=message):
        VLLMServerTeacher(**{"base_url": "http://127.0.0.1:9", **options})
