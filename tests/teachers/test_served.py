"""What teachers behind servers share, without a server; the teachers' own tests ask real ones."""

import pytest
import torch

from gkd_trainer.errors import GKDConfigError, GKDServerError, GKDTeacherError
from gkd_trainer.teachers.prompt_scores import fully_scored
from gkd_trainer.teachers.served import TeacherServers
from tests.serving import FaultyProxy, status

NEVER = "http://127.0.0.1:9"
MODELS = b'{"data": [{"id": "big", "max_model_len": 20}]}'


@pytest.fixture
def tokenizer(byte_level):
    return byte_level()


@pytest.fixture
def listed():
    """Two servers that list one model."""
    with FaultyProxy(NEVER) as one, FaultyProxy(NEVER) as other:
        for server in (one, other):
            server.next(status(200, MODELS), times=None)
        yield [one.base_url, other.base_url]


def servers_of(urls, unsent=-1, **options):
    defaults = {"model": None, "api_token": None, "server_timeout": 20.0, "request_timeout": 20.0}
    return TeacherServers(urls, unsent=unsent, **{**defaults, **options})


def test_no_server_is_refused():
    with pytest.raises(GKDConfigError, match="at least one server; got none"):
        servers_of([])


def test_the_name_is_the_given_one_or_the_first_that_is_listed(listed, tokenizer):
    servers = servers_of(listed)
    assert servers.model_name is None
    servers.first_contact(tokenizer, None)
    assert servers.model_name == "big"
    assert [servers.name_at(server) for server in servers] == ["big", "big"]
    assert servers_of(NEVER, model="small").model_name == "small"


ADAPTED = b"""{"data": [{"id": "base", "root": "/base", "parent": null, "max_model_len": 20},
{"id": "alias", "root": "/base", "parent": null, "max_model_len": 20}%s]}"""
ADAPTER = b', {"id": "tuned", "root": "/adapter", "parent": "base"}'


def test_an_adapter_is_taken_by_its_name_and_none_is_chosen_without_one(tokenizer):
    with FaultyProxy(NEVER) as server:
        server.next(status(200, ADAPTED % ADAPTER), times=None)
        servers = servers_of(server.base_url, model="tuned")
        servers.first_contact(tokenizer, None)
        assert [servers.name_at(each) for each in servers] == ["tuned"]
        message = "serves 'base', 'alias', 'tuned', which are not names of one model: .*teacher_server_model"
        with pytest.raises(GKDTeacherError, match=message):
            servers_of(server.base_url).first_contact(tokenizer, None)


def test_of_several_names_of_one_model_the_first_is_taken(tokenizer):
    with FaultyProxy(NEVER) as server:
        server.next(status(200, ADAPTED % b""), times=None)
        servers = servers_of(server.base_url)
        servers.first_contact(tokenizer, None)
        assert servers.model_name == "base"


def test_the_probe_fits_the_shortest_context_and_the_witness_is_its_beginning(listed, tokenizer):
    probe = servers_of(listed).first_contact(tokenizer, None)
    assert probe.token_ids == tokenizer(probe.text, add_special_tokens=False)["input_ids"]
    assert probe.sequence.token_ids == probe.token_ids[:18]
    assert probe.witness.token_ids == probe.token_ids[:16]
    assert probe.witness.targets_P.tolist() == list(range(1, 16))
    assert all(token in probe.text for token in tokenizer.all_special_tokens)


@pytest.mark.parametrize(("unsent", "longest"), [(-1, 19), (1, 21)])
def test_sequences_may_be_as_long_as_what_is_sent_of_them_allows(listed, tokenizer, unsent, longest):
    servers = servers_of(listed, unsent)
    assert servers.longest_sequence is None
    servers.first_contact(tokenizer, longest)
    assert servers.longest_sequence == longest
    message = (
        f"len 20, .* at most {longest} tokens, .* up to {longest + 1}: .* --max-model-len 21 or more.*={longest} or"
    )
    with pytest.raises(GKDTeacherError, match=message):
        servers.first_contact(tokenizer, longest + 1)
    with pytest.raises(GKDTeacherError, match=message):
        servers.score_each([fully_scored([5] * (longest + 1))], lambda server, group: [])


def test_the_servers_take_turns_over_batches(listed, tokenizer):
    servers = servers_of(listed)
    servers.first_contact(tokenizer, None)
    asked = []

    def score(server, group):
        asked.append(listed.index(server.base_url))
        return [sequence.token_ids[0] for sequence in group]

    for count, expected in ((1, [0]), (1, [1]), (5, [0, 1]), (9, [0, 1, 0]), (1, [1]), (0, [])):
        asked.clear()
        sequences = [fully_scored([5 + index, 6]) for index in range(count)]
        assert servers.score_each(sequences, score) == list(range(5, 5 + count))
        assert sorted(asked) == sorted(expected)


def test_the_share_of_a_server_that_is_gone_goes_to_the_others(tokenizer, short_waits):
    with FaultyProxy(NEVER) as one, FaultyProxy(NEVER) as two, FaultyProxy(NEVER) as gone:
        for server in (one, two, gone):
            server.next(status(200, MODELS), times=None, path="/v1/models")
            server.next(status(200, b"1"), times=None)
        servers = servers_of([one.base_url, gone.base_url, two.base_url])
        servers.first_contact(tokenizer, None)
        sequences = [fully_scored([5 + index, 6]) for index in range(16)]

        def score(server, group):
            server.post("/v1/completions", {"model": servers.name_at(server)}, int)
            return [sequence.token_ids[0] for sequence in group]

        gone.stop()
        for _ in range(3):
            assert servers.score_each(sequences, score) == list(range(5, 21))
    asked = [server.paths().count("/v1/completions") for server in (one, two)]
    assert sum(asked) == 12
    assert min(asked) >= 5


def test_the_ranks_begin_with_different_servers(listed, tokenizer, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    asked = []
    for rank in range(4):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        servers = servers_of(listed)
        servers.first_contact(tokenizer, None)
        servers.score_each([fully_scored([5, 6])], lambda server, group: [asked.append(server.base_url)])
    assert asked == [*listed, *listed]


def test_a_distance_that_is_not_a_number_passes_no_check(listed, tokenizer):
    servers = servers_of(listed)
    servers.first_contact(tokenizer, None)
    [server, _] = servers
    for check in (servers.check_repeated, servers.check_same, servers.check_witness):
        check(server, 0.1)
        for distance in (0.11, float("nan")):
            with pytest.raises((GKDTeacherError, GKDServerError), match="mean total variation"):
                check(server, distance)
    servers.check_local_copy(server, 0.1, torch.bfloat16)
    with pytest.raises(GKDTeacherError, match=r"at most 0\.01 expected in torch\.float32"):
        servers.check_local_copy(server, 0.1, torch.float32)
