"""Servers that give the same answers: others take the share of one that can't be reached."""

import logging
import threading
import time

import pytest

from gkd_trainer.errors import GKDServerError
from gkd_trainer.teachers import failover
from gkd_trainer.teachers.failover import Failover
from gkd_trainer.vllm_client import VLLMServer
from tests.serving import Answer, FaultyProxy, free_port, hang_up, status

pytestmark = pytest.mark.usefixtures("short_waits")

OK = b'{"value": 7}'
NEVER = "http://127.0.0.1:9"


@pytest.fixture
def proxies():
    """Three servers that answer every request, unless a rule was given before."""
    with FaultyProxy(NEVER) as one, FaultyProxy(NEVER) as two, FaultyProxy(NEVER) as three:
        yield [one, two, three]


def servers_of(proxies, server_timeout=20.0):
    servers = [VLLMServer(each.base_url, server_timeout=server_timeout, request_timeout=5.0) for each in proxies]
    return servers, Failover(servers, server_timeout)


def ask(server):
    return server.get("/call", lambda answer: answer["value"])


def answering(proxies):
    for proxy in proxies:
        proxy.next(status(200, OK), times=None)


def counts(proxies):
    return [len(proxy.requests) for proxy in proxies]


ABSENT = {"no answer": hang_up, "status 503": status(503), "status 429": status(429)}


@pytest.mark.parametrize("fault", ABSENT.values(), ids=ABSENT.keys())
def test_the_next_server_answers_for_one_that_is_not_there_and_one_warning_says_so(proxies, fault, caplog):
    proxies[1].next(fault, times=None)
    answering(proxies)
    servers, all_servers = servers_of(proxies)
    started = time.monotonic()
    with caplog.at_level(logging.WARNING):
        assert [all_servers.call(servers[1], ask) for _ in range(3)] == [7] * 3
    assert time.monotonic() - started < 2
    assert counts(proxies) == [3, 1, 0]
    [record] = caplog.records
    assert record.message.startswith(f"The vLLM server at {proxies[1].base_url} can't be reached (")


def test_a_server_that_refuses_connections_is_not_waited_for(proxies):
    answering(proxies[:1])
    there = VLLMServer(proxies[0].base_url)
    gone = VLLMServer(f"http://127.0.0.1:{free_port()}", server_timeout=20.0)
    both = Failover([gone, there], 20.0)
    assert both.call(gone, ask) == 7
    assert both.available() == [there]


def test_a_server_that_was_not_there_is_left_out_for_a_while_and_then_asked_again(proxies, monkeypatch, caplog):
    monkeypatch.setattr(failover, "_FIRST_REST", 0.2)
    proxies[0].next(hang_up)
    answering(proxies)
    servers, all_servers = servers_of(proxies)
    all_servers.call(servers[0], ask)
    assert all_servers.available() == servers[1:]
    time.sleep(0.25)
    assert all_servers.available() == servers
    all_servers.call(servers[0], ask)
    assert counts(proxies) == [2, 1, 0]
    assert caplog.messages[-1] == f"The vLLM server at {proxies[0].base_url} answers again."


def test_the_rest_of_a_server_that_stays_away_grows_but_not_with_calls_at_the_same_time(proxies, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(failover.time, "monotonic", lambda: clock[0])
    servers, all_servers = servers_of(proxies)
    error = failover.UnreachableError("gone")
    ends = []
    for _ in range(8):
        for _ in range(3):
            all_servers._leave_out(servers[0], error)
        ends.append(all_servers._rests[servers[0]].end - clock[0])
        clock[0] += ends[-1]
    assert ends == [2, 4, 8, 16, 32, 60, 60, 60]


def test_if_no_server_is_there_the_first_that_comes_back_answers(proxies):
    for proxy in proxies:
        proxy.next(hang_up, times=None)
    servers, all_servers = servers_of(proxies)

    def come_back():
        proxies[2].heal()
        answering(proxies[2:])

    timer = threading.Timer(0.3, come_back)
    timer.start()
    try:
        assert all_servers.call(servers[0], ask) == 7
    finally:
        timer.join()


def test_if_no_server_comes_back_an_error_names_all_of_them_after_the_time_out(proxies):
    for proxy in proxies:
        proxy.next(status(503, b"restarting"), times=None)
    servers, all_servers = servers_of(proxies, server_timeout=0.4)
    started = time.monotonic()
    urls = ", ".join(proxy.base_url for proxy in proxies)
    with pytest.raises(GKDServerError, match=f"none of the vLLM servers at {urls} could be reached for 0.4 s.*: res"):
        all_servers.call(servers[0], ask)
    assert 0.4 <= time.monotonic() - started < 3


def test_busy_servers_get_the_shortest_pause_that_one_asks_for(proxies):
    for proxy, seconds in zip(proxies, ("3600", "1", "60"), strict=True):
        proxy.next(lambda request, forward, seconds=seconds: Answer(429, b"", retry_after=seconds))
    answering(proxies)
    servers, all_servers = servers_of(proxies)
    started = time.monotonic()
    assert all_servers.call(servers[0], ask) == 7
    assert 1 <= time.monotonic() - started < 5


WRONG = {"status 500": status(500), "status 400": status(400), "no JSON": status(200, b"<html>")}


@pytest.mark.parametrize("fault", WRONG.values(), ids=WRONG.keys())
def test_another_server_is_not_asked_after_a_wrong_answer(proxies, fault):
    proxies[0].next(fault, times=None)
    answering(proxies)
    servers, all_servers = servers_of(proxies)
    with pytest.raises(GKDServerError, match=proxies[0].base_url):
        all_servers.call(servers[0], ask)
    assert counts(proxies)[1:] == [0, 0]


def test_another_model_is_not_hidden_by_another_server(proxies):
    def notice(server):
        raise GKDServerError("another model")

    servers, all_servers = servers_of(proxies)
    with pytest.raises(GKDServerError, match="another model"):
        all_servers.call(servers[0], notice)


def test_a_single_server_is_waited_for(proxies):
    proxies[0].next(hang_up, times=3)
    answering(proxies)
    servers, only = servers_of(proxies[:1])
    assert only.call(servers[0], ask) == 7
    assert len(proxies[0].requests) == 4
