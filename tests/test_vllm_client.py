"""The client of vLLM servers, with servers that answer wrongly, late or not at all."""

import logging
import socket
import threading
import time

import pytest

from gkd_trainer import vllm_client
from gkd_trainer.errors import GKDConfigError, GKDServerError
from gkd_trainer.vllm_client import VLLMServer, call_each
from tests.serving import Answer, FaultyProxy, cut_in_half, delayed, free_port, hang_up, status, trickle, trickle_head

pytestmark = pytest.mark.usefixtures("short_waits")

OK = b'{"value": 7}'
NEVER = "http://127.0.0.1:9"


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


@pytest.mark.parametrize("url", ["localhost:8000", "http://", "http://a:99999", "http://a b"])
def test_a_url_that_nothing_can_be_sent_to_is_refused_at_once(url):
    with pytest.raises(GKDConfigError, match=r"base_url must be a URL .* such as http://127.0.0.1:8000"):
        VLLMServer(url)


def test_credentials_in_the_url_are_sent_and_not_shown(faulty, caplog):
    url = faulty.base_url.replace("//", "//somebody:s%40cret@")
    server = VLLMServer(url, server_timeout=1)
    faulty.next(status(500, b"busy"))
    with caplog.at_level(logging.DEBUG):
        assert server.get("/v1/models", value) == 7
    assert faulty.requests[0].authorization == "Basic c29tZWJvZHk6c0BjcmV0"
    faulty.next(status(400), times=None)
    with pytest.raises(GKDServerError) as raised:
        server.get("/v1/models", value)
    for text in (caplog.text, str(raised.value), repr(server), server.base_url):
        assert "cret" not in text
        assert "somebody" not in text
    assert caplog.text.count(f"the vLLM server at {faulty.base_url} again") == 1


def test_credentials_and_a_token_are_refused_together():
    with pytest.raises(GKDConfigError, match="give only one of them") as raised:
        VLLMServer("http://user:s3cret@a", api_token="t0ken")
    assert not {"s3cret", "t0ken"} & set(str(raised.value).replace(":", " ").split())


@pytest.mark.parametrize("token", ["two\nlines", "naïve", " spaced "])
def test_a_token_that_no_header_holds_is_refused_and_not_shown(token):
    with pytest.raises(GKDConfigError, match="API token for http://a must be") as raised:
        VLLMServer("http://a", api_token=token)
    assert token not in str(raised.value)


def test_a_body_that_json_does_not_hold_is_refused_before_it_is_sent(faulty):
    for body in ({"seed": object()}, {"temperature": float("nan")}):
        with pytest.raises(GKDConfigError, match="holds a value that JSON can't"):
            client(faulty).post("/call", body, value)
    assert faulty.requests == []


def test_the_token_goes_with_each_request(faulty):
    client(faulty, api_token="secret").get("/v1/models", value)
    assert faulty.requests[0].authorization == "Bearer secret"


def test_a_token_that_the_server_repeats_is_not_shown(faulty):
    faulty.next(status(401, b"invalid key: canary-31337"), times=None)
    with pytest.raises(GKDServerError, match=r"status 401: invalid key: <SECRET>$"):
        client(faulty, api_token="canary-31337").get("/v1/models", value)


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


ABSENT = {f"status {code}": status(code, b"later") for code in (408, 425, 429, 502, 503, 504)} | {"no answer": hang_up}


@pytest.mark.parametrize("fault", ABSENT.values(), ids=ABSENT.keys())
def test_a_server_that_is_not_there_is_tried_until_its_time_is_up(faulty, fault):
    faulty.next(fault, times=None)
    started = time.monotonic()
    with pytest.raises(GKDServerError, match="did not complete GET /health"):
        client(faulty, server_timeout=0.6).get("/health", value)
    assert 0.6 <= time.monotonic() - started < 2.5
    assert len(faulty.requests) > 4


def busy(seconds):
    return lambda request, forward: Answer(429, b"too many requests", retry_after=seconds)


def test_a_server_with_too_many_requests_gets_the_pause_that_it_asks_for(faulty):
    faulty.next(busy("1"))
    started = time.monotonic()
    assert client(faulty).get("/health", value) == 7
    assert time.monotonic() - started >= 1
    assert len(faulty.requests) == 2


def test_a_pause_ends_with_the_time_out(faulty):
    faulty.next(busy("3600"), times=None)
    started = time.monotonic()
    with pytest.raises(GKDServerError, match=r"gave up after 2 attempts.*status 429: too many requests"):
        client(faulty, server_timeout=0.5).get("/health", value)
    assert 0.5 <= time.monotonic() - started < 2


@pytest.mark.parametrize("date", ["Fri, 31 Dec 2100 23:59:59 GMT", "-5", "1e9", ""])
def test_a_pause_that_is_not_in_seconds_is_not_kept(faulty, date):
    faulty.next(busy(date))
    assert client(faulty).get("/health", value) == 7


def test_a_port_that_nobody_listens_on_ends_within_the_time_out():
    port = free_port()
    started = time.monotonic()
    with pytest.raises(GKDServerError, match=f"http://127.0.0.1:{port} did not complete GET /health.*ConnectError"):
        VLLMServer(f"http://127.0.0.1:{port}", server_timeout=0.5).get("/health", value)
    assert 0.5 <= time.monotonic() - started < 2


def test_tls_to_a_port_of_plain_http_is_not_tried_again(faulty):
    server = VLLMServer(faulty.base_url.replace("http://", "https://"), server_timeout=60)
    started = time.monotonic()
    with pytest.raises(GKDServerError, match="if it speaks plain HTTP, give a URL that starts with http://"):
        server.get("/v1/models", value)
    assert time.monotonic() - started < 10


def test_the_scheme_may_be_in_capitals(faulty):
    assert VLLMServer(faulty.base_url.replace("http", "HTTP")).get("/v1/models", value) == 7


@pytest.mark.parametrize("host", ["a" * 60, "[::1]", "bücher.example"])
def test_the_port_is_not_part_of_the_host_name(host):
    headers = dict(VLLMServer(f"http://{host}:8000")._headers)
    assert headers["Host"] == f"{host.encode('idna').decode()}:8000"


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


def test_a_retry_is_logged_with_its_cause(faulty, caplog):
    faulty.next(status(500, b"busy"))
    with caplog.at_level(logging.WARNING, logger="gkd_trainer.vllm_client"):
        client(faulty).get("/health", value)
    [record] = caplog.records
    assert record.message == f"Trying GET /health of the vLLM server at {faulty.base_url} again: status 500: busy"


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


LATE = {
    "silence": delayed(2),
    "a trickle of the body": trickle(pieces=12, pause=0.2),
    "a trickle of the head": trickle_head(pieces=20, pause=0.2),
}


@pytest.mark.parametrize("fault", LATE.values(), ids=LATE.keys())
def test_an_answer_that_comes_too_late_is_a_wrong_one(faulty, fault):
    faulty.next(fault, times=None)
    started = time.monotonic()
    with pytest.raises(
        GKDServerError, match=r"did not complete GET /slow.*(no answer within|not complete after) 0.3 s"
    ):
        client(faulty, server_timeout=0.6, request_timeout=0.3).get("/slow", value)
    # The last attempt begins within the first time-out and ends within the second; what remains is a pause.
    assert time.monotonic() - started < 0.6 + 0.3 + 0.3


def test_a_request_that_the_server_does_not_read_ends_in_time():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        server = VLLMServer(f"http://127.0.0.1:{listener.getsockname()[1]}", server_timeout=0.1, request_timeout=0.5)
        started = time.monotonic()
        with pytest.raises(GKDServerError, match=r"WriteTimeout|ReadTimeout"):
            server.post("/call", "x" * 50_000_000, value)
        assert time.monotonic() - started < 2


def test_an_answer_in_many_pieces_is_put_together(faulty):
    faulty.next(trickle(pieces=12, pause=0.01))
    assert client(faulty).get("/slow", value) == 7


def test_the_deadline_of_a_request_does_not_limit_later_ones(faulty):
    faulty.next(delayed(2))
    assert client(faulty, request_timeout=0.3).get("/slow", value) == 7


def test_items_go_to_the_servers_in_turn_and_come_back_in_order():
    servers = [VLLMServer(f"http://127.0.0.1:{port}") for port in (1, 2, 3)]
    answers = call_each(servers, range(7), lambda server, item: (item, server.base_url[-1]), first=1)
    assert answers == list(zip(range(7), "2312312", strict=True))
    assert call_each(servers, [], lambda server, item: 1 / 0) == []


def test_all_items_run_at_once():
    barrier = threading.Barrier(20, timeout=5)
    call_each([VLLMServer(NEVER)], range(20), lambda server, item: barrier.wait())
    assert not barrier.broken


def test_one_failure_cancels_calls_that_have_not_started(monkeypatch):
    monkeypatch.setattr(vllm_client, "_CALLS_AT_ONCE", 1)
    done = []

    def call(server, item):
        done.append(item)
        time.sleep(0.01)  # or they have all started before a busy machine gets to cancel them
        raise GKDServerError(f"item {item}")

    with pytest.raises(GKDServerError, match="item 0"):
        call_each([VLLMServer(NEVER)], range(50), call)
    assert len(done) < 50


ONCE = {name: FAULTS[name] for name in ("status 500", "status 503", "half an answer", "no answer")}


@pytest.mark.parametrize("fault", ONCE.values(), ids=ONCE.keys())
def test_unrepeatable_requests_are_sent_once(faulty, fault):
    faulty.next(fault, times=None)
    with pytest.raises(GKDServerError, match=f"{faulty.base_url} did not complete POST /call, which can't be sent"):
        client(faulty).post_unread("/call", {}, is_repeatable=False)
    assert faulty.paths() == ["/call"]


def test_bytes_come_with_the_headers_of_their_answer():
    body, metadata = bytes(range(256)), '{"shape": [16, 16]}'
    with FaultyProxy(NEVER) as server:
        server.next(lambda request, forward: Answer(200, body, metadata=metadata))
        answer = client(server).post_for_bytes("/pooling", {"input": [[1]]}, lambda answer: answer)
    assert answer.body == body
    assert answer.headers["metadata"] == metadata
    assert server.requests[0].json == {"input": [[1]]}


def test_bytes_that_parse_refuses_are_requested_again_and_not_shown():
    def refuse(answer):
        raise ValueError("too few")

    with FaultyProxy(NEVER) as server:
        server.next(status(200, bytes(1000)), times=None)
        with pytest.raises(GKDServerError, match=r"4 attempts.*\(ValueError: too few\): 1000 bytes\. Look"):
            client(server).post_for_bytes("/pooling", {}, refuse)
    assert len(server.requests) == 4
