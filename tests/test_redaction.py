"""What counts as a secret, and what replaces it."""

import pickle
from dataclasses import dataclass

import pytest

from gkd_trainer.redaction import (
    HidesSecrets,
    dropping_secrets,
    is_secret,
    redacted,
    redacted_source,
    without_secrets,
)

SECRET = "canary-31337"


SECRET_NAMES = (
    "token hf_token HF_TOKEN use_auth_token api_key apiKey api-key OPENAI_API_KEY password db_password secret "
    "client_secret aws_secret_access_key Authorization X-Auth-Token credentials apitoken accesstoken APIToken api_keys "
    "hf_tokens pwd pass jwt ssh_key encryption_key aws_access_key_id connection_string"
)
OTHER_NAMES = (
    "max_new_tokens min_tokens pad_token_id eos_token pad_token tokenizer token_healing key author keys "
    "attn_implementation private secretary max_tokens num_tokens special_tokens bypass compass"
)


@pytest.mark.parametrize("name", SECRET_NAMES.split())
def test_names_of_secrets_are_recognised(name):
    assert is_secret(name)
    assert redacted({"deep": [{name: SECRET}]}) == {"deep": [{name: f"<{name.upper()}>"}]}
    assert without_secrets({"deep": [{name: SECRET}]}) == {"deep": [{name: None}]}


@pytest.mark.parametrize("name", OTHER_NAMES.split())
def test_other_names_are_not_secrets(name):
    assert not is_secret(name)
    assert redacted({name: "plain"}) == {name: "plain"}


@pytest.mark.parametrize("value", [None, True, False])
def test_a_switch_with_such_a_name_is_not_a_secret(value):
    assert redacted({"token": value}) == {"token": value}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"http://user:{SECRET}@host:8000/v1", "http://<CREDENTIALS>@host:8000/v1"),
        (f"http://{SECRET}@host", "http://<CREDENTIALS>@host"),
        (f"at http://u:p@{SECRET}@host, and https://b", "at http://<CREDENTIALS>@host, and https://b"),
        (f"https://host/path?a=1&api_key={SECRET}&b=2", "https://host/path?a=1&api_key=<SECRET>&b=2"),
        (f"Bearer {SECRET}", "Bearer <SECRET>"),
        (f"http://host:8000#token={SECRET}", "http://host:8000#token=<SECRET>"),
        ("Basic dXNlcjpjYW5hcnk=", "Basic <SECRET>"),
        ("Basic authentication", "Basic authentication"),
        ("got hf_CANARY31337", "got <HF_TOKEN>"),
        ("no module hf_quantizer", "no module hf_quantizer"),
        ("http://host/@scope", "http://host/@scope"),
        ("name@example.org", "name@example.org"),
    ],
)
def test_credentials_inside_a_text_are_hidden(text, expected):
    assert redacted(text) == redacted([text])[0] == without_secrets(text) == expected


def test_the_value_itself_is_left_as_it_is():
    options = {"token": SECRET, "nested": {"urls": [f"http://u:{SECRET}@h"]}, "pair": (1, "a")}
    copy = redacted(options)
    assert SECRET not in str(copy)
    assert copy["pair"] == (1, "a")
    assert options["token"] == SECRET
    assert SECRET in options["nested"]["urls"][0]


@pytest.mark.parametrize(
    "text", [f"{{'token': '{SECRET}'", f"{{api_key: {SECRET}}}", f'{{"a": {{"password": "{SECRET}"']
)
def test_a_text_that_names_a_secret_is_not_shown(text):
    assert redacted_source(text) == f"{len(text)} characters, not shown since they may hold a secret"


def test_another_text_is_shown():
    assert redacted_source('{"max_new_tokens": 5') == repr('{"max_new_tokens": 5')


@dataclass
class Login(HidesSecrets):
    """Options of which two hold secrets."""

    user: str = "ada"
    api_key: str | None = SECRET
    urls: tuple[str, ...] = (f"https://u:{SECRET}@host",)


@dataclass
class NamedLogin(Login):
    """Further options, on which @dataclass would put a `repr` of its own."""

    name: str = "first"


@pytest.mark.parametrize("kind", [Login, NamedLogin])
def test_a_dataclass_that_hides_secrets_is_printed_without_them_and_keeps_them(kind):
    login = kind()
    assert str(login) == repr(login)
    assert repr(login).startswith(f"{kind.__name__}(\napi_key='<API_KEY>',\n")
    assert "user='ada',\n" in repr(login)
    assert SECRET not in repr(login)
    assert login.api_key == pickle.loads(pickle.dumps(login)).api_key == SECRET


def test_a_dataclass_that_hides_secrets_is_pickled_without_them_only_inside_the_block():
    with dropping_secrets():
        stored = pickle.dumps(NamedLogin())
    assert SECRET.encode() not in stored
    assert pickle.loads(stored).api_key is None
    assert pickle.loads(stored).urls == ("https://<CREDENTIALS>@host",)
    assert SECRET.encode() in pickle.dumps(NamedLogin())


def test_a_subclass_may_have_a_repr_of_its_own():
    @dataclass
    class Silent(Login):
        def __repr__(self):
            return "Silent()"

    assert repr(Silent()) == "Silent()"
