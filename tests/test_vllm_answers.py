"""Odd answers of servers: each is accepted, or requested again and then an error of ours."""

import copy
import json

import pytest
import torch

from gkd_trainer import vllm_client
from gkd_trainer.batch_keys import IGNORE_INDEX
from gkd_trainer.errors import GKDConfigError, GKDServerError, GKDTeacherError
from gkd_trainer.rollouts import VLLMServerRollouts
from gkd_trainer.rollouts.vllm_nccl import _transfer_backend
from gkd_trainer.rollouts.vllm_sync import forget_cache, name_version, weight_version
from gkd_trainer.teachers import VLLMServerTeacher
from gkd_trainer.types import Sampling, TokenBatch
from gkd_trainer.vllm_answers import Models, ServedModel, ServerInfo, WeightInfo
from gkd_trainer.vllm_client import VLLMServer
from tests.serving import Answer, FaultyProxy

pytestmark = pytest.mark.usefixtures("short_waits")

K, LENGTH = 3, 64
TEXT_IDS = [5, 6, 7]


def completion(request):
    """What vLLM answers to a request for completions, or for the scores of prompts."""
    choices = []
    prompts = request["prompt"] if isinstance(request["prompt"][0], list) else [request["prompt"]]
    for index, prompt in enumerate(prompts):
        choice = {"index": index, "token_ids": [5] * request["max_tokens"], "finish_reason": "length"}
        if "prompt_logprobs" in request:
            scores = {str(token): {"logprob": -2.0, "rank": 1} for token in range(300, 300 + K)}
            own = [{**scores, str(token): {"logprob": -9.0, "rank": 9}} for token in prompt[1:]]
            choice["prompt_logprobs"] = [None, *own]
        choices.append(choice)
    return {"choices": choices}


class Fake(FaultyProxy):
    """A server that answers as vLLM does, but for one endpoint, whose answer is `odd` where that is given.

    `odd` is a body, or a function that makes one of the right answer.
    """

    def __init__(self):
        super().__init__("http://127.0.0.1:9")
        self.version, self.path, self.odd = "default", None, None
        self.next(self.rule, times=None)

    def rule(self, request, forward):
        if request.path == "/update_weight_version":
            self.version = request.json["new_version"]
        right = {
            "/v1/models": {"data": [{"id": "model", "root": "/model", "max_model_len": LENGTH}]},
            "/weight_info": {"weight_version": self.version},
            "/server_info?config_format=json": {
                "vllm_config": {
                    "device_config": {"device": "cpu"},
                    "model_config": {"hf_overrides": {}},
                    "weight_transfer_config": {"backend": "nccl"},
                }
            },
            "/collective_rpc": {"results": [None]},
            "/reset_prefix_cache?reset_external=true": {"success": True},
            "/update_weight_version": {"success": True},
            "/tokenize": {"tokens": TEXT_IDS, "count": len(TEXT_IDS)},
        }
        answer = completion(request.json) if request.path == "/v1/completions" else right[request.path]
        if request.path != self.path:
            return Answer(200, json.dumps(answer).encode())
        return Answer(200, self.odd if isinstance(self.odd, bytes) else self.odd(answer))


@pytest.fixture
def fake():
    with Fake() as server:
        yield server


OPTIONS = {"server_timeout": 5.0, "request_timeout": 5.0}


class Tokenizer:
    """Gives the same ids for every text."""

    all_special_tokens = ()

    def __call__(self, text, add_special_tokens):
        return {"input_ids": list(TEXT_IDS)}

    def get_vocab(self):
        return {str(token): token for token in range(360)}


def batch():
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    labels = ids.masked_fill(ids < 7, IGNORE_INDEX)
    return TokenBatch.from_inputs({"input_ids": ids, "labels": labels})


def roll_out(url, model):
    engine = VLLMServerRollouts(url, [2], 360, **OPTIONS)
    engine.sync(model)
    engine.generate([[5, 6]], Sampling(2), [0])
    engine.close()


def score(url, model):
    teacher = VLLMServerTeacher(url, top_k=K, **OPTIONS)
    teacher.prepare(torch.device("cpu"), Tokenizer())
    teacher.score(batch())


def send_over_nccl(url, model):
    _transfer_backend(VLLMServer(url, **OPTIONS))


def restore(url, model):
    server = VLLMServer(url, **OPTIONS)
    name_version(server, "a")
    forget_cache(server)
    weight_version(server)


USES = {
    "/v1/models": [roll_out, score],
    "/weight_info": [roll_out, restore],
    "/server_info?config_format=json": [roll_out, send_over_nccl],
    "/collective_rpc": [roll_out],
    "/reset_prefix_cache?reset_external=true": [roll_out, restore],
    "/update_weight_version": [roll_out, restore],
    "/tokenize": [score],
    "/v1/completions": [roll_out, score],
}
CASES = [pytest.param(path, use, id=f"{path} {use.__name__}") for path, uses in USES.items() for use in uses]

JUNK = {
    "a list": b"[]",
    "a list of one": b"[1]",
    "a number": b"1",
    "a number above all": b"1e999",
    "minus infinity": b"-Infinity",
    "NaN": b"NaN",
    "a string": b'"text"',
    "a truth value": b"true",
    "many digits": b"9" * 5000,
    "deep lists": b"[" * 100_000,
    "deep objects": b'{"a":' * 100_000,
    "no text": b"\xff\xfe\x00",
    "half an object": b'{"data": [',
    "HTML": b"<html>",
}

ODD = [None, [], {}, [None], {"a": None}, "", "text", True, -1, 0.5, float("inf"), float("nan"), 10**30, 10**400, [[]]]


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model()


@pytest.mark.parametrize(("path", "use"), CASES)
def test_the_right_answers_are_taken(fake, model, path, use):
    use(fake.base_url, model)
    assert path in fake.paths()


@pytest.mark.parametrize("junk", JUNK.values(), ids=JUNK.keys())
@pytest.mark.parametrize(("path", "use"), CASES)
def test_an_invalid_answer_is_requested_again_and_then_an_error_of_ours(fake, model, path, use, junk, caplog):
    fake.path, fake.odd = path, junk
    if use is send_over_nccl:  # asks only whether the server can do it
        assert _transfer_backend(VLLMServer(fake.base_url, **OPTIONS)) is None
        assert "did not complete GET /server_info" in caplog.text
    else:
        with pytest.raises((GKDServerError, GKDConfigError), match=f"{fake.base_url}.*did not complete") as raised:
            use(fake.base_url, model)
        assert len(str(raised.value)) < 1500
    assert fake.paths().count(path) == 4


def places(answer, path=()):
    """The paths to all values in JSON; of a list to those in its ends, of an object in the first and last two keys."""
    yield path
    if isinstance(answer, dict | list):
        keys = list(answer) if isinstance(answer, dict) else range(len(answer))
        at_end = 2 if isinstance(answer, dict) else 1
        for key in dict.fromkeys([*keys[:at_end], *keys[-at_end:]]):
            yield from places(answer[key], (*path, key))


def with_odd_value(answer, place, value):
    answer = copy.deepcopy(answer)
    inner = answer
    for key in place[:-1]:
        inner = inner[key]
    if value is delete:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    return answer


def delete():
    """Stands for no value at all."""


@pytest.mark.parametrize(("path", "use"), CASES)
def test_an_odd_value_anywhere_in_an_answer_is_taken_or_an_error_of_ours(fake, model, path, use, monkeypatch):
    monkeypatch.setattr(vllm_client, "_WRONG_ANSWERS", 1)  # the test above asks again
    found = []
    fake.path, fake.odd = path, lambda right: found.append(right) or json.dumps(right).encode()
    use(fake.base_url, model)
    outcomes = set()
    for place in places(found[-1]):
        for value in [*ODD, delete] if place else []:
            fake.odd = lambda right, place=place, value=value: json.dumps(
                with_odd_value(right, place, value) if is_there(right, place) else right
            ).encode()
            try:
                use(fake.base_url, model)
                outcomes.add("taken")
            except (GKDServerError, GKDConfigError, GKDTeacherError):
                outcomes.add("refused")
    assert "refused" in outcomes or use is send_over_nccl


def is_there(answer, place):
    for key in place:
        if not isinstance(answer, dict | list) or (
            key not in answer if isinstance(answer, dict) else key >= len(answer)
        ):
            return False
        answer = answer[key]
    return True


@pytest.mark.parametrize("shift", [-30.0, 5.0])
def test_a_server_that_scores_with_logits_is_refused_at_its_first_answer(fake, shift):
    def with_logits(answer):
        for entries in answer["choices"][0]["prompt_logprobs"][1:]:
            for score in entries.values():
                score["logprob"] += shift
        return json.dumps(answer).encode()

    fake.path, fake.odd = "/v1/completions", with_logits
    with pytest.raises(GKDTeacherError, match=f"{fake.base_url} gives scores that are not log-probs .*--logprobs-mode"):
        score(fake.base_url, None)
    assert fake.paths().count("/v1/completions") == 1


def test_an_error_names_the_field_and_what_was_expected():
    for answer, message in (
        ({}, "data: Field required"),
        ([], "the answer: Input should be a valid dictionary"),
        ({"data": []}, "data: List should have at least 1 item"),
        ({"data": [{"id": 5}]}, "data.0.id: Input should be a valid string"),
        ({"data": [{"id": "a", "max_model_len": "64"}]}, "data.0.max_model_len: Input should be a valid integer"),
    ):
        with pytest.raises(ValueError, match=message):
            Models.parse(answer)


def test_adapters_are_as_long_as_the_model_they_belong_to():
    models = Models.parse(
        {"data": [{"id": "base", "max_model_len": 64}, {"id": "lora", "root": "/x", "parent": "base"}]}
    )
    assert models.lengths() == {"base": 64, "lora": 64}
    assert models.data[1] == ServedModel(id="lora", root="/x", parent="base")
    with pytest.raises(ValueError, match="no model has a max_model_len"):
        Models.parse({"data": [{"id": "base"}]}).lengths()


@pytest.mark.parametrize(
    ("further", "is_one"),
    [
        ([], True),
        ([{"id": "alias", "root": "/base"}], True),
        ([{"id": "lora", "root": "/x", "parent": "base"}], False),
        ([{"id": "lora", "root": "/base", "parent": "base"}], False),
        ([{"id": "other", "root": "/other"}], False),
        ([{"id": "other"}], False),
    ],
)
def test_several_names_of_one_model_are_told_from_several_models(further, is_one):
    assert Models.parse({"data": [{"id": "base", "root": "/base"}, *further]}).is_one_model() is is_one
    if further:
        assert not Models.parse({"data": [{"id": "base"}, {"id": "other"}]}).is_one_model()


def test_unread_fields_are_not_checked():
    assert WeightInfo.parse({"weight_version": "a", "more": [1]}).weight_version == "a"
    info = {"vllm_config": {"device_config": {"device": None}, "model_config": {"hf_overrides": "x"}, "other": 1}}
    assert ServerInfo.parse(info).vllm_config.weight_transfer is None


def test_a_served_teachers_witness_is_what_it_answered_at_first(fake):
    teacher = VLLMServerTeacher(fake.base_url, top_k=K, **OPTIONS)
    assert teacher.witness is None
    teacher.prepare(torch.device("cpu"), Tokenizer())
    assert teacher.witness.token_ids == TEXT_IDS
    assert teacher.witness.scores.ids_PK.tolist() == [[300, 301, 302]] * 2
