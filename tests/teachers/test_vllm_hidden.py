"""A teacher behind vLLM that sends hidden states: its distributions are the model's, or an error says why not."""

import json
import logging
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gkd_trainer.batch_keys import IGNORE_INDEX, TEACHER_INDEX, TEACHER_PROMPT_IDS
from gkd_trainer.divergence import token_divergence
from gkd_trainer.errors import GKDConfigError, GKDDataError, GKDServerError, GKDTeacherError
from gkd_trainer.signals import LogitsSignal
from gkd_trainer.teachers import FrozenTeacher, HiddenStateServerTeacher, RoutedTeachers, Teacher
from gkd_trainer.teachers.cache.format import refuse_another_served, source_of
from gkd_trainer.teachers.context import longest_context, with_teacher_prompts
from gkd_trainer.teachers.prompt_states import STATE_DTYPES
from tests.serving import MAX_MODEL_LENGTH, FaultyProxy, cut_in_half, status
from tests.teachers.batches import batch_of, batch_of_six, token_rows

pytestmark = pytest.mark.usefixtures("short_waits")

CPU = torch.device("cpu")
STATES = "/pooling"
OTHER_ORDER = "big" if sys.byteorder == "little" else "little"


@pytest.fixture
def tokenizer(byte_level):
    return byte_level()


@pytest.fixture
def make(hidden_proxy, served_dir, tokenizer):
    """Make a teacher behind `hidden_proxy`, prepared, and forget what was asked of the proxy meanwhile."""

    def make(base_url=hidden_proxy.base_url, checkpoint=served_dir, **options):
        options = {"server_timeout": 5.0, "request_timeout": 20.0, "checks": False, **options}
        teacher = HiddenStateServerTeacher(base_url, checkpoint, **options)
        teacher.prepare(CPU, tokenizer)
        hidden_proxy.requests.clear()
        return teacher

    return make


def logits_NV(signal):
    return signal.head.logits(signal.hidden_NH)


def expected_logits_NV(model, batch):
    with torch.no_grad():
        return model(**batch.model_inputs).logits[batch.is_scored_BL]


def assert_predictions_are_those_of(signal, expected_NV, atol=1e-4):
    found, expected = logits_NV(signal).log_softmax(dim=-1), expected_NV.log_softmax(dim=-1)
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)


def with_states(change):
    """A rule that passes each input's states through a function, and sends them in its result's shape."""

    def rule(request, forward):
        answer = forward()
        metadata, body = json.loads(answer.metadata), b""
        for item in metadata["data"]:
            dtype = STATE_DTYPES[item["embed_dtype"]]
            states_LH = torch.frombuffer(bytearray(answer.body[item["start"] : item["end"]]), dtype=dtype)
            states_LH = change(states_LH.view(item["shape"]).float()).to(dtype).contiguous()
            part = bytes(states_LH.view(torch.uint8).numpy())
            item.update(start=len(body), end=len(body) + len(part), shape=list(states_LH.shape))
            body += part
        return replace(answer, body=body, metadata=json.dumps(metadata))

    return rule


def of_model(model):
    """A rule that answers as a server of another model would."""

    def rule(request, forward):
        rows = iter(request.json["input"])

        def states(_):
            with torch.no_grad():
                return model.model(torch.tensor([next(rows)])).last_hidden_state[0]

        return with_states(states)(request, forward)

    return rule


def with_metadata(change):
    """A rule that changes the header in place."""

    def rule(request, forward):
        answer = forward()
        metadata = json.loads(answer.metadata)
        change(metadata["data"])
        return replace(answer, metadata=json.dumps(metadata))

    return rule


def without_metadata(request, forward):
    return replace(forward(), metadata=None)


def shorter_body(request, forward):
    answer = forward()
    return replace(answer, body=answer.body[:-8])


@pytest.mark.parametrize("side", ["right", "left"])
def test_predictions_are_the_models_at_the_scored_positions(make, served_model, side):
    batch, teacher = batch_of_six(side), make()
    signal = teacher.score(batch)
    assert isinstance(teacher, Teacher)
    assert signal.hidden_NH.shape == (batch.n_scored, 128)
    assert not signal.hidden_NH.requires_grad
    assert_predictions_are_those_of(signal, expected_logits_NV(served_model, batch))


def test_prompts_of_the_teachers_own_are_scored_up_to_the_servers_context(make, served_model):
    """They may be longer than the run's max_length."""
    teacher = make()
    assert longest_context(teacher, 64) == MAX_MODEL_LENGTH + 1
    [prompt, *samples] = token_rows([200, 12, 17])
    prompts_BP = torch.full((2, 200), IGNORE_INDEX)
    prompts_BP[1] = torch.tensor(prompt)
    batch = replace(batch_of(samples, [range(5, 12), range(9, 17)]), side={TEACHER_PROMPT_IDS: prompts_BP})
    read = with_teacher_prompts(batch)
    as_read = batch_of([samples[0], prompt + samples[1][9:]], [range(5, 12), range(200, 208)])
    assert_predictions_are_those_of(teacher.score(read), expected_logits_NV(served_model, as_read))


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_loss_and_gradient_are_those_of_the_same_teacher_in_this_process(
    make, served_model, tiny_model, beta, temperature
):
    batch = batch_of_six()
    local = FrozenTeacher(served_model)
    local.prepare(CPU)
    student_NV = expected_logits_NV(tiny_model(seed=3), batch)
    results = []
    for teacher in (make(), local):
        logits = student_NV.clone().requires_grad_()
        values_N = token_divergence(
            LogitsSignal(logits), teacher.score(batch), beta=beta, temperature=temperature
        ).values_N
        values_N.sum().backward()
        results.append((values_N.detach(), logits.grad))
    for served, expected in zip(*results, strict=True):
        assert (served - expected).norm() < 1e-5 * expected.norm()


def test_a_served_teacher_scores_its_rows_beside_one_in_this_process(
    make, served_model, tiny_model, hidden_proxy, tokenizer
):
    batch, local_model = batch_of_six(), tiny_model(seed=3)
    index_B = torch.tensor([0, 1, 1, 0, 1, 0])
    batch = replace(batch, side={TEACHER_INDEX: index_B})
    teacher = RoutedTeachers({"served": make(), "local": FrozenTeacher(local_model)})
    teacher.prepare(CPU, tokenizer)
    hidden_proxy.requests.clear()
    student_NV = expected_logits_NV(tiny_model(seed=4), batch)
    found_N = token_divergence(LogitsSignal(student_NV), teacher.score(batch), beta=0.5).values_N
    of_model_N = [
        token_divergence(LogitsSignal(student_NV), LogitsSignal(expected_logits_NV(model, batch)), beta=0.5).values_N
        for model in (served_model, local_model)
    ]
    expected_N = torch.where(index_B[batch.rows_N] == 0, *of_model_N)
    torch.testing.assert_close(found_N, expected_N, atol=1e-5, rtol=1e-4)
    sent = [row for request in hidden_proxy.requests for row in request.json["input"]]
    texts = [ids_L[mask_L == 1].tolist() for ids_L, mask_L in zip(*batch.model_inputs.values(), strict=True)]
    assert {row for row in range(6) if any(texts[row][: len(each)] == each for each in sent)} == {0, 5}


def test_packed_sequences_are_scored_one_by_one(make, served_model):
    rows = token_rows([9, 6, 12])
    trained = [range(3, 9), [2, 5], range(7, 12)]
    apart = torch.cat(
        [expected_logits_NV(served_model, batch_of([r], [t])) for r, t in zip(rows, trained, strict=True)]
    )
    flat = batch_of([[token for row in rows for token in row]], [[*range(3, 9), 11, 14, *range(22, 27)]])
    flat.model_inputs["position_ids"] = torch.cat([torch.arange(len(row)) for row in rows])[None]
    del flat.model_inputs["attention_mask"]
    assert_predictions_are_those_of(make().score(flat), apart)


def test_only_the_tokens_that_predict_others_are_sent(make, hidden_proxy):
    make().score(batch_of(token_rows([30, 25, 20]), [[3, 8], [], [19]]))
    [request] = hidden_proxy.requests
    assert [len(ids) for ids in request.json["input"]] == [15, 8, 19]  # the witness first
    assert request.json["use_activation"] is False


def test_a_batch_without_labels_needs_no_request(make, hidden_proxy):
    signal = make().score(batch_of(token_rows([5, 3]), [[], []]))
    assert signal.hidden_NH.shape == (0, 128)
    assert hidden_proxy.requests == []


def test_two_servers_share_a_batch_and_its_order_stays(make, hidden_server, served_model):
    batch = batch_of(token_rows(range(6, 23)), [range(3, length) for length in range(6, 23)])
    with FaultyProxy(hidden_server.base_url) as one, FaultyProxy(hidden_server.base_url) as other:
        teacher = make([one.base_url, other.base_url])
        before = len(one.requests), len(other.requests)
        signal = teacher.score(batch)
        assert sorted([len(one.requests) - before[0], len(other.requests) - before[1]]) == [2, 3]
        assert teacher.base_urls == [one.base_url, other.base_url]
    assert_predictions_are_those_of(signal, expected_logits_NV(served_model, batch))


def test_it_states_what_it_gives(make, tokenizer):
    teacher = make()
    assert teacher.vocab_size == 368  # three more than the tokenizer has
    assert teacher.vocabulary == tokenizer.get_vocab()
    assert teacher.top_k is None
    assert teacher.model is None
    assert not teacher.is_local
    assert not teacher.can_generate
    assert teacher.score(batch_of_six()).sliced(365).vocab_size == 365


def test_the_vocabulary_is_the_checkpoints_own(make, served_model, tokenizer, byte_level, tmp_path):
    served_model.save_pretrained(tmp_path)
    assert make(checkpoint=tmp_path).vocabulary == tokenizer.get_vocab()  # of the student, since it has none
    changed = byte_level()
    changed.add_tokens(["<another>"])
    changed.save_pretrained(tmp_path)
    assert "<another>" in make(checkpoint=tmp_path).vocabulary


# The dtype on the way.


def as_bfloat16(states_LH):
    return states_LH.bfloat16().float()


@pytest.mark.parametrize(
    ("change", "dtype"),
    [(None, "float32"), (as_bfloat16, "bfloat16"), (lambda states: states.half().float(), "float16")],
    ids=["a float32 server", "a bfloat16 server", "a float16 server"],
)
def test_states_are_sent_in_the_narrowest_dtype_that_holds_them(make, hidden_proxy, served_model, change, dtype):
    if change is not None:
        hidden_proxy.next(with_states(change), times=1, path=STATES)
    teacher = make()
    assert teacher.dtype == dtype
    signal = teacher.score(batch_of_six())
    [request, *_] = hidden_proxy.requests
    assert request.json["embed_dtype"] == dtype
    assert signal.hidden_NH.dtype == STATE_DTYPES[dtype]
    tolerance = 1e-4 if change is None else 0.5
    assert_predictions_are_those_of(signal, expected_logits_NV(served_model, batch_of_six()), atol=tolerance)


def test_servers_of_two_dtypes_are_both_asked_for_the_wider(make, hidden_server):
    with FaultyProxy(hidden_server.base_url) as one, FaultyProxy(hidden_server.base_url) as other:
        other.next(with_states(as_bfloat16), path=STATES)
        assert make([one.base_url, other.base_url]).dtype == "float32"


def test_a_dtype_that_rounds_is_taken_with_a_warning(make, caplog):
    with caplog.at_level(logging.WARNING, logger="gkd_trainer.teachers.vllm_hidden"):
        make(dtype="float32")
        assert caplog.records == []
        teacher = make(dtype="bfloat16")
    [record] = caplog.records
    assert "hidden states are float32, and are rounded to bfloat16" in record.message
    assert teacher.dtype == "bfloat16"


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp8_e4m3", 0.1), ("fp8_e5m2", 0.2)])
def test_fp8_is_sent_where_it_is_asked_for(make, hidden_proxy, served_model, dtype, tolerance):
    signal = make(dtype=dtype).score(batch_of_six())
    assert hidden_proxy.requests[0].json["embed_dtype"] == dtype
    assert signal.hidden_NH.dtype == torch.bfloat16
    local = FrozenTeacher(served_model)
    local.prepare(CPU)
    expected_NH = local.score(batch_of_six()).hidden_NH
    assert (signal.hidden_NH.float() - expected_NH).norm() < tolerance * expected_NH.norm()


def test_a_dtype_that_can_not_hold_the_states_is_refused(make, hidden_proxy):
    hidden_proxy.next(with_states(lambda states: 1e6 * states), times=None, path=STATES)
    with pytest.raises(GKDTeacherError, match="hidden states are too large for float16: send them in bfloat16"):
        make(dtype="float16")
    assert make(dtype="bfloat16").dtype == "bfloat16"


# What can't be scored.


def test_the_longest_sequence_is_one_token_longer_than_the_context(make, hidden_proxy, served_dir, tokenizer):
    """The state of its last token predicts nothing that is trained on."""
    teacher = HiddenStateServerTeacher(hidden_proxy.base_url, served_dir)
    with pytest.raises(GKDTeacherError, match=r"at most 321 tokens.*up to 322: start.*--max-model-len 321.*length=321"):
        teacher.prepare(CPU, tokenizer, max_length=MAX_MODEL_LENGTH + 2)
    teacher.prepare(CPU, tokenizer, max_length=MAX_MODEL_LENGTH + 1)
    longest = batch_of(token_rows([MAX_MODEL_LENGTH + 1]), [[MAX_MODEL_LENGTH]])
    assert teacher.score(longest).hidden_NH.shape == (1, 128)
    with pytest.raises(GKDTeacherError, match="up to 322"):
        teacher.score(batch_of(token_rows([MAX_MODEL_LENGTH + 2]), [[MAX_MODEL_LENGTH + 1]]))


def test_the_first_token_of_a_packed_sequence_can_not_be_trained_on(make):
    flat = batch_of(token_rows([10]), [[3, 6]])
    flat.model_inputs["position_ids"] = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1, 2, 3]])
    with pytest.raises(GKDDataError, match="sample 0 of a batch trains on the first token of a sequence"):
        make().score(flat)


# What comes back wrong.


def set_items(**values):
    def change(items):
        items[1].update(values)

    return with_metadata(change)


def one_nan(states_LH):
    states_LH[-1, 5] = float("nan")
    return states_LH


def exchange(items):
    items[1], items[2] = items[2], items[1]


WRONG = {
    "status 500": (status(500, b"out of memory"), "status 500: out of memory"),
    "half an answer": (cut_in_half, "peer closed connection"),
    "NaN": (with_states(one_nan), "a hidden state is not finite in float32"),
    "infinity": (with_states(lambda states: states / 0.0), "a hidden state is not finite in float32"),
    "a token too few": (with_states(lambda states: states[1:]), r"expected the values \[15, 128\].*got \[14, 128\]"),
    "another dtype": (set_items(embed_dtype="bfloat16"), "128. in float32, .*; got .* in bfloat16"),
    "another byte order": (set_items(endianness=OTHER_ORDER), f"got .* {OTHER_ORDER}-endian"),
    "another place": (set_items(start=4), "in bytes 7680 to 13312; got .* in bytes 4 to 13312"),
    "another shape": (set_items(shape=[128, 11]), r"must have the same width; got \[11, 128\]"),
    "no shape": (set_items(shape=[]), r"expected the values \[11, 128\].*; got \[\]"),
    "an input too few": (with_metadata(list.pop), r"5 inputs were sent, but the answer has .* \[0, 1, 2, 3\]"),
    "inputs in another order": (with_metadata(exchange), r"indices \[0, 2, 1, 3, 4\]"),
    "no inputs": (with_metadata(list.clear), r"indices \[\]"),
    "no header": (without_metadata, "no header metadata"),
    "no bytes": (status(200, b""), "no header metadata"),
    "fewer bytes than promised": (shorter_body, r"promises values up to byte 27136; got 27128 bytes"),
}


@pytest.mark.parametrize(("fault", "cause"), WRONG.values(), ids=WRONG.keys())
def test_wrong_answers_are_requested_again_and_end_in_an_error_that_says_what_was_wrong(
    make, hidden_proxy, served_model, fault, cause
):
    rows = token_rows([12, 15, 9, 6])
    batch = batch_of(rows, [[*range(3, len(row))] for row in rows])  # for one request
    teacher = make()
    hidden_proxy.next(fault, times=2, path=STATES)
    assert_predictions_are_those_of(teacher.score(batch), expected_logits_NV(served_model, batch))
    assert len(hidden_proxy.requests) == 3

    hidden_proxy.next(fault, times=None, path=STATES)
    message = f"{hidden_proxy.base_url} did not complete POST {STATES}.*4 attempts.*{cause}"
    with pytest.raises(GKDServerError, match=message) as raised:
        teacher.score(batch)
    assert len(str(raised.value)) < 1000  # without the bytes


def test_a_refusal_is_not_repeated(make, hidden_proxy):
    teacher = make()
    hidden_proxy.next(status(401, b"Unauthorized"), times=None, path=STATES)
    with pytest.raises(GKDServerError, match=f"refused POST {STATES} with status 401: Unauthorized"):
        teacher.score(batch_of(token_rows([8]), [[5]]))
    assert len(hidden_proxy.requests) == 1


# Another model than before.


def test_a_server_that_came_back_with_another_model_is_noticed_with_its_first_answer(make, hidden_proxy, tiny_model):
    teacher, batch = make(), batch_of_six()
    hidden_proxy.next(of_model(tiny_model(hidden=128, seed=1)), times=None, path=STATES)
    message = (
        f"{hidden_proxy.base_url} serves another model than at the start.*changed by 0.*Restart it with the original '/"
    )
    with pytest.raises(GKDServerError, match=message):
        teacher.score(batch_of(token_rows([8]), [[5]]))
    assert len(hidden_proxy.requests) == 1
    hidden_proxy.heal()
    assert len(teacher.score(batch).hidden_NH) == batch.n_scored


def test_a_server_that_came_back_with_another_width_is_noticed_too(make, hidden_proxy, tiny_model):
    teacher = make()
    hidden_proxy.next(of_model(tiny_model(hidden=64)), times=None, path=STATES)
    with pytest.raises(
        GKDServerError, match=r"another model .*hidden states have the width 64, those at the start 128"
    ):
        teacher.score(batch_of(token_rows([8]), [[5]]))
    assert len(hidden_proxy.requests) == 1


def test_the_right_model_passes_however_its_answers_are_computed(make, hidden_proxy, served_model):
    teacher, batch = make(), batch_of_six()
    copy = type(served_model)(served_model.config).eval()
    copy.load_state_dict(served_model.state_dict())
    for model in (served_model, copy.to(torch.bfloat16)):
        hidden_proxy.next(of_model(model), times=2, path=STATES)
        assert len(teacher.score(batch).hidden_NH) == batch.n_scored


def test_a_cache_can_tell_whether_it_is_the_same_model(make, hidden_proxy, tiny_model):
    hidden_proxy.next(of_model(tiny_model(hidden=128, seed=5)), path=STATES)
    other, teacher, rounded = make(), make(), make(dtype="fp8_e5m2")
    sources = [source_of(each, None, name="same") for each in (teacher, rounded, other)]
    refuse_another_served(Path("cache"), sources[0], sources[1])
    with pytest.raises(GKDTeacherError, match="the cache in cache was made with another model"):
        refuse_another_served(Path("cache"), sources[0], sources[2])


# The first contact.


def test_a_sound_server_passes_every_check(make, served_model):
    teacher = make(checks=True, local_copy=served_model)
    assert len(teacher.score(batch_of_six()).hidden_NH) == batch_of_six().n_scored


@pytest.mark.parametrize(("checks", "further"), [(True, ["/tokenize", STATES]), (False, [])])
def test_the_first_contact_costs_few_requests(hidden_proxy, served_dir, tokenizer, checks, further):
    HiddenStateServerTeacher(hidden_proxy.base_url, served_dir, checks=checks).prepare(CPU, tokenizer)
    assert sorted(hidden_proxy.paths()) == sorted(["/v1/models", STATES, *further])


def test_a_head_of_another_width_is_refused(make, tiny_model, tmp_path):
    tiny_model(hidden=64).save_pretrained(tmp_path)
    with pytest.raises(
        GKDTeacherError, match=r"states of width 128, but the head of '.*' takes 64: name the checkpoint"
    ):
        make(checkpoint=tmp_path)


@pytest.mark.parametrize(
    "answer",
    [
        status(404, b'{"detail": "Not Found"}'),
        status(400, b'{"error": {"message": "Try switching the model\'s pooling_task"}}'),
    ],
    ids=["a server that generates", "a server of sentence embeddings"],
)
def test_a_server_without_hidden_states_is_refused_with_the_options_to_start_it(make, hidden_proxy, answer):
    hidden_proxy.next(answer, path=STATES)
    with pytest.raises(
        GKDTeacherError, match=r"returns no hidden states: start it with --runner pooling --convert embed"
    ):
        make()


def test_normalised_states_are_refused(make, hidden_proxy):
    hidden_proxy.next(with_states(lambda states: torch.nn.functional.normalize(states, dim=1)), path=STATES)
    with pytest.raises(GKDTeacherError, match="normalised to length 1"):
        make()


def test_states_that_differ_from_one_request_to_the_next_are_refused(make, hidden_proxy, tiny_model):
    hidden_proxy.next(lambda request, forward: forward(), path=STATES)
    hidden_proxy.next(of_model(tiny_model(hidden=128, seed=1)), path=STATES)
    with pytest.raises(GKDTeacherError, match="scored one text differently the second time: mean total variation 0"):
        make(checks=True)


def test_servers_of_different_models_are_refused(make, hidden_server, tiny_model):
    with FaultyProxy(hidden_server.base_url) as one, FaultyProxy(hidden_server.base_url) as other:
        other.next(of_model(tiny_model(hidden=128, seed=1)), times=None, path=STATES)
        with pytest.raises(GKDTeacherError, match=f"{one.base_url} and {other.base_url} score one text differently"):
            make([one.base_url, other.base_url])


def test_another_tokenizer_at_the_server_is_refused(hidden_proxy, served_dir, tokenizer):
    tokenizer.add_tokens(["world"])
    with pytest.raises(GKDTeacherError, match=r"is not the student's: the text .* becomes \d+ tokens there"):
        HiddenStateServerTeacher(hidden_proxy.base_url, served_dir).prepare(CPU, tokenizer)


@pytest.mark.parametrize("change", ["another model", "slightly other weights", "another head"])
def test_a_local_copy_that_disagrees_is_refused(make, served_model, tiny_model, change):
    copy = tiny_model(hidden=128, seed=1)
    if change != "another model":
        copy.load_state_dict(served_model.state_dict())
    if change == "slightly other weights":
        copy.model.layers[1].mlp.down_proj.weight.data *= 2.0
    if change == "another head":
        copy.lm_head.weight.data *= 1.1
    with pytest.raises(GKDTeacherError, match=r"local copy of the teacher disagree.* at most 0\.01 .* torch\.float32"):
        make(checks=True, local_copy=copy)


def test_a_local_copy_over_another_vocabulary_is_refused(make, tiny_model):
    with pytest.raises(GKDTeacherError, match="local copy of the teacher predicts over 400 tokens, but the head of"):
        make(checks=True, local_copy=tiny_model(hidden=128, vocab=400))


def test_a_teacher_that_predicts_worse_than_chance_is_warned_of(make, caplog, hidden_server):
    with caplog.at_level(logging.WARNING, logger="gkd_trainer.teachers.vllm_hidden"):
        make(checks=True)  # random weights with a large head
    [record] = caplog.records
    assert "predicts a text worse than chance" in record.message
    assert "chance is 5.9" in record.message


def test_a_teacher_needs_the_students_tokenizer(hidden_proxy, served_dir):
    with pytest.raises(GKDTeacherError, match="pass processing_class to the trainer"):
        HiddenStateServerTeacher(hidden_proxy.base_url, served_dir).prepare(CPU)
    assert hidden_proxy.requests == []


def test_an_unprepared_teacher_raises(served_dir):
    with pytest.raises(RuntimeError, match="before prepare"):
        HiddenStateServerTeacher("http://127.0.0.1:9", served_dir).score(batch_of_six())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype must be 'auto' or one of 'float32', .*; got 'int8'"),
        ({"base_url": []}, "at least one server; got none"),
        ({"base_url": "localhost"}, "must be a URL that starts with http"),
        ({"checks": False, "local_copy": torch.nn.Identity()}, "checks=False disables"),
    ],
)
def test_arguments_without_a_meaning_are_refused(served_dir, options, message):
    with pytest.raises(GKDConfigError, match=message):
        HiddenStateServerTeacher(**{"base_url": "http://127.0.0.1:9", "checkpoint": served_dir, **options})
