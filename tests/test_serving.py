"""The client of vLLM servers, before one that answers wrongly, late or not at all."""

import base64
import logging
import threading
import time

import pytest

from gkd_trainer import serving
from gkd_trainer.errors import GKDConfigError, GKDServerError
from gkd_trainer.serving import VLLMServer, spread
from tests.serving import FaultyProxy, cut_in_half, delayed, free_port, hang_up, status, trickle

OK = b'{"value": 7}'
NEVER = "http://127.0.0.1:9"


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(serving, "_FIRST_WAIT", 0.01)
    monkeypatch.setattr(serving, "_LONGEST_WAIT", 0.1)
    monkeypatch.setattr(serving, "_JITTER", 0.01)


@pytest.fixture
def upstream():
    """A server that answers every request with OK."""
    with FaultyProxy(NEVER) as server:
        server.next(status(200, OK), times=None)
        yield server


@pytest.fixture
def faulty(upstream):
    """A proxy before `upstream`."""
    with FaultyProxy(upstream.base_url) as proxy:
        yield proxy


def value(answer):
    return answer["value"]


def client(server, **options):
    return VLLMServer(server.base_url, **{"server_timeout": 5.0, "request_timeout": 5.0, **options})


def test_a_post_sends_json_and_returns_what_parse_makes_of_the_answer(faulty):
    assert client(faulty).post("/v1/completions", {"prompt": [1, 2]}, value) == 7
    [request] = faulty.requests
    assert (request.method, request.path, request.json) == ("POST", "/v1/completions", {"prompt": [1, 2]})
    assert request.authorization is None


def test_a_get_has_no_body(faulty):
    assert client(faulty).get("/v1/models", value) == 7
    [request] = faulty.requests
    assert (request.method, request.path, request.body) == ("GET", "/v1/models", b"")


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
def test_the_base_url_may_end_as_openai_clients_want_it(faulty, suffix):
    VLLMServer(faulty.base_url + suffix).get("/v1/models", value)
    assert faulty.paths() == ["/v1/models"]


def test_credentials_of_the_url_reach_the_server_and_no_message(faulty, caplog):
    server = VLLMServer(faulty.base_url.replace("http://", "http://user:canary-31337@"), server_timeout=0.1)
    faulty.next(status(500, b"broken"), times=None)
    with pytest.raises(GKDServerError) as raised:
        server.get("/v1/models", value)
    assert faulty.requests[0].authorization == "Basic " + base64.b64encode(b"user:canary-31337").decode()
    assert "canary-31337" not in str(raised.value) + caplog.text + server.base_url


def test_a_url_without_a_scheme_is_refused():
    with pytest.raises(GKDConfigError, match="must start with http:// or https://; got 'localhost:8000'"):
        VLLMServer("localhost:8000")


def test_the_token_goes_with_each_request(faulty):
    client(faulty, api_token="secret").get("/v1/models", value)
    assert faulty.requests[0].authorization == "Bearer secret"


def test_an_empty_answer_is_none(faulty):
    faulty.next(status(200, b""))
    assert client(faulty).post("/reset_prefix_cache", None, lambda answer: answer) is None


FAULTS = {
    "status 500": status(500),
    "status 429": status(429),
    "status 503": status(503),
    "half an answer": cut_in_half,
    "no answer": hang_up,
    "no JSON": status(200, b"<html>"),
    "JSON without the value": status(200, b"{}"),
    "JSON of another kind": status(200, b"[1]"),
    "nothing": status(200, b""),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_three_faults_in_a_row_are_tried_again(faulty, fault):
    faulty.next(fault, times=3)
    server = client(faulty)
    assert server.post("/call", {}, value) == 7
    assert len(faulty.requests) == 4
    # What is answered wrongly comes from the server that was there before.
    is_cut_off = fault in (FAULTS["status 503"], FAULTS["half an answer"], FAULTS["no answer"])
    assert server.interruptions == (3 if is_cut_off else 0)


CAUSES = {
    "status 500": (status(500, b"out of memory"), "status 500: out of memory"),
    "half an answer": (cut_in_half, "peer closed connection without sending complete message body"),
    "no JSON": (status(200, b"<html>"), r"an answer that can't be used \(JSONDecodeError: .*<html>"),
    "JSON without the value": (status(200, b'{"error": 1}'), r"\(KeyError: 'value'\): {\"error\": 1}"),
}


@pytest.mark.parametrize(("fault", "cause"), CAUSES.values(), ids=CAUSES.keys())
def test_an_error_after_four_wrong_answers_names_server_call_and_cause(faulty, fault, cause):
    faulty.next(fault, times=None)
    with pytest.raises(GKDServerError, match=f"{faulty.base_url} did not complete POST /call.*4 attempts.*{cause}"):
        client(faulty, server_timeout=60).post("/call", {}, value)
    assert len(faulty.requests) == 4


@pytest.mark.parametrize("fault", [status(503, b"restarting"), hang_up], ids=["status 503", "no answer"])
def test_a_server_that_is_not_there_is_tried_until_its_time_is_up(faulty, fault):
    faulty.next(fault, times=None)
    started = time.monotonic()
    with pytest.raises(GKDServerError, match="did not complete GET /health"):
        client(faulty, server_timeout=1).get("/health", value)
    assert 1 <= time.monotonic() - started < 3
    assert len(faulty.requests) > 4


def test_a_port_that_nobody_listens_on_ends_within_the_time_out():
    port = free_port()
    started = time.monotonic()
    with pytest.raises(GKDServerError, match=f"http://127.0.0.1:{port} did not complete GET /health.*ConnectError"):
        VLLMServer(f"http://127.0.0.1:{port}", server_timeout=0.5).get("/health", value)
    assert 0.5 <= time.monotonic() - started < 2


def test_a_server_that_restarts_is_waited_for(faulty):
    server = client(faulty)
    assert server.get("/health", value) == 7
    faulty.stop()
    restart = threading.Timer(0.5, faulty.start)
    restart.start()
    try:
        assert server.get("/health", value) == 7
    finally:
        restart.join()
    assert server.interruptions > 0


def test_a_retry_is_logged_with_its_cause(faulty, caplog):
    faulty.next(status(500, b"busy"))
    with caplog.at_level(logging.WARNING, logger="gkd_trainer.serving"):
        client(faulty).get("/health", value)
    [record] = caplog.records
    assert record.message == f"GET /health of the vLLM server at {faulty.base_url} is tried again: status 500: busy"


@pytest.mark.parametrize("code", [400, 401, 404, 422])
def test_a_refusal_is_not_tried_again(faulty, code):
    faulty.next(status(code, b"no such model"), times=None)
    with pytest.raises(GKDServerError, match=f"refused POST /call with status {code}: no such model"):
        client(faulty).post("/call", {}, value)
    assert len(faulty.requests) == 1


def test_an_error_of_ours_in_parse_is_not_tried_again(faulty):
    def parse(answer):
        raise GKDServerError("another model")

    with pytest.raises(GKDServerError, match="another model"):
        client(faulty).post("/call", {}, parse)
    assert len(faulty.requests) == 1


@pytest.mark.parametrize("fault", [delayed(2), trickle(pieces=12, pause=0.2)], ids=["silence", "a trickle"])
def test_an_answer_that_comes_too_late_is_a_wrong_one(faulty, fault):
    faulty.next(fault, times=None)
    started = time.monotonic()
    with pytest.raises(
        GKDServerError, match=r"did not complete GET /slow.*(no answer within|not complete after) 0.3 s"
    ):
        client(faulty, server_timeout=0.6, request_timeout=0.3).get("/slow", value)
    assert time.monotonic() - started < 2


def test_an_answer_in_many_pieces_is_put_together(faulty):
    faulty.next(trickle(pieces=12, pause=0.01))
    assert client(faulty).get("/slow", value) == 7


def test_the_time_of_a_request_is_no_limit_for_the_ones_after_it(faulty):
    faulty.next(delayed(2))
    assert client(faulty, request_timeout=0.3).get("/slow", value) == 7


def test_items_go_to_the_servers_in_turn_and_come_back_in_order():
    servers = [VLLMServer(f"http://127.0.0.1:{port}") for port in (1, 2, 3)]
    answers = spread(servers, range(7), lambda server, item: (item, server.base_url[-1]), first=1)
    assert answers == list(zip(range(7), "2312312", strict=True))
    assert spread(servers, [], lambda server, item: 1 / 0) == []


def test_all_items_are_under_way_at_once():
    barrier = threading.Barrier(20, timeout=5)
    spread([VLLMServer(NEVER)], range(20), lambda server, item: barrier.wait())
    assert not barrier.broken


def test_one_failure_ends_what_has_not_started(monkeypatch):
    monkeypatch.setattr(serving, "_CALLS_AT_ONCE", 1)
    done = []

    def call(server, item):
        done.append(item)
        raise GKDServerError(f"item {item}")

    with pytest.raises(GKDServerError, match="item 0"):
        spread([VLLMServer(NEVER)], range(50), call)
    assert len(done) < 50
