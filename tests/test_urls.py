"""URLs of servers: invalid ones are refused at once, and credentials are never shown."""

import copy
import json
import pickle

import pytest

from gkd_trainer import GKDArguments, GKDConfig
from gkd_trainer.errors import GKDConfigError
from gkd_trainer.urls import ServerURL

TAKEN = [
    "http://127.0.0.1:8000",
    "http://localhost",
    "https://gpu-node.example/prefix/v1/",
    "http://under_score:1",
    "HTTP://localhost:8000",
    "http://[::1]:8000",
    "http://bücher.example:80",
]


@pytest.mark.parametrize("text", TAKEN)
def test_a_url_stays_as_it_was_written(text):
    assert ServerURL(text) == text
    assert ServerURL(text).credentials is None


REFUSED = {
    "localhost:8000": "starts with neither",
    "ftp://a": "starts with neither",
    "": "starts with neither",
    "http://": "its host is missing",
    "http:///v1": "its host is missing",
    "http://:8000": "its host is missing",
    "http://a b": "a space",
    "http://a\n": "a space or a control character",
    "http://a|b": "characters that no host has",
    "http://a..b": "can't be read",
    "http://::1": "can't be read",
    "http://[::1": "can't be read",
    "http://a:65536": "ports are 1 to 65535",
    "http://a:0": "ports are 1 to 65535",
    "http://a?b=1": "a query",
    "http://a/é": "not ASCII",
}


@pytest.mark.parametrize(("text", "problem"), REFUSED.items())
def test_a_url_that_nothing_can_be_sent_to_is_refused_with_option_example_and_problem(text, problem):
    with pytest.raises(GKDConfigError) as raised:
        ServerURL(text, "teacher_server_base_url")
    message = str(raised.value)
    assert message.startswith("teacher_server_base_url must be a URL that starts with http:// or https://")
    assert "such as http://127.0.0.1:8000" in message
    assert problem in message
    assert message.endswith(f"got {text!r}")


def test_an_invalid_port_is_not_shown():
    with pytest.raises(GKDConfigError, match=r"ports are 1 to 65535\); got 'http://a:<PORT>/v1'"):
        ServerURL("http://a:port/v1")


def test_credentials_are_kept_apart_from_what_is_shown():
    url = ServerURL("http://user:p%40ss%2Fword@gpu-node:8000/v1")
    assert url == "http://gpu-node:8000/v1"
    assert url.credentials == ("user", "p@ss/word")
    assert ServerURL("http://user@a").credentials == ("user", "")
    for same in (ServerURL(url), copy.deepcopy(url), pickle.loads(pickle.dumps(url))):
        assert (same, same.credentials) == (url, url.credentials)


FAULTY = [
    "http://user:s3cret@a:99999",
    "http://user:s3/cret@a",
    "user:s3cret@a",
    "ftp://u:s3cret@a",
    "http://u:s3 @b",
    "http://user:s3cret",
    "http://host:8000?api_key=s3cret",
    "http://host:8000#token=s3cret",
]


@pytest.mark.parametrize("text", FAULTY)
def test_an_error_shows_no_credentials(text):
    with pytest.raises(GKDConfigError) as raised:
        ServerURL(text)
    assert "s3" not in str(raised.value)


def test_options_show_and_save_no_credentials(tmp_path):
    servers = "http://user:s3,cret@a:1, http://user:s3cret@b:2"
    args = GKDConfig(
        output_dir=str(tmp_path), use_vllm=True, vllm_mode="server", vllm_server_base_url=servers, report_to="none"
    )
    assert args.vllm_server_base_url == ["http://a:1", "http://b:2"]
    assert [url.credentials for url in args.vllm_server_base_url] == [("user", "s3,cret"), ("user", "s3cret")]
    for shown in (repr(args), str(args.to_dict()), args.to_json_string(), json.dumps(args.to_sanitized_dict())):
        assert "s3" not in shown
        assert "http://a:1" in shown


def test_a_faulty_url_among_several_is_refused_without_the_credentials_of_any():
    with pytest.raises(GKDConfigError, match="teacher_server_base_url must be") as raised:
        GKDArguments(teacher_server_base_url="http://user:s3cret@a:1,http://user:s3cret@b:99999")
    assert "s3cret" not in str(raised.value)
