"""Pages that stand alone: what is escaped, and what may run."""

import base64
import hashlib
import json
import re

import pytest
from jinja2 import UndefinedError

from gkd_trainer.report.page import chart_values, map_values, rendered
from gkd_trainer.report.pieces import readable
from tests.report.samples import NASTY, token_map


def page_of(*maps, title="title"):
    return rendered("heat_map.html", title, data={"maps": list(maps)})


def data_of(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


def test_a_completion_reaches_the_page_only_as_data():
    text = "".join(NASTY)
    page = page_of(map_values(token_map(NASTY, prompt=text), text), title=text)
    assert page.count("<script") == 2  # the data, and ours
    assert "alert(1)" in page
    assert "<script>alert" not in page
    [found] = data_of(page)["maps"]
    assert (found["prompt"], found["caption"]) == (readable(text), readable(text))
    assert [token[0] for token in found["tokens"]] == list(map(readable, NASTY))


def test_the_page_is_told_which_top_token_is_the_token_itself():
    [first, second] = map_values(token_map(student_rank=(1, None), teacher_rank=(None, 0)), "caption")["tokens"]
    assert (first[-2:], second[-2:]) == ([1, None], [None, 0])


def test_the_policy_allows_only_the_pages_own_style_and_script():
    page = page_of()
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1].replace("&#39;", "'")
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    for kind, element in (("style", r"<style>(.*?)</style>"), ("script", r"<script>(.*?)</script>")):
        [source] = re.findall(element, page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy


def test_a_page_names_no_address_to_load_from():
    page = page_of(map_values(token_map(), "caption"))
    assert not re.search(r"(src|href)\s*=|url\(|@import|https?://|fetch\(|XMLHttp|WebSocket|sendBeacon", page)
    assert "style=" not in page  # the policy would refuse it
    assert not re.search(r"\son\w+=", page)


def test_nan_is_no_number_of_a_page():
    with pytest.raises(ValueError, match=r"not JSON compliant|Out of range"):
        rendered("heat_map.html", "title", data={"maps": [float("nan")]})


def test_a_value_that_is_missing_is_an_error():
    with pytest.raises(UndefinedError):
        rendered("report.html", "title", data={})


def test_a_surrogate_does_not_keep_a_page_from_being_written():
    page_of(map_values(token_map(("\ud800",), prompt="\udfff"), "\ud800"), title="\ud800").encode()


def test_an_empty_completion_is_a_map_without_tokens():
    assert map_values(token_map(()), "caption")["tokens"] == []


def test_no_charts_need_no_drawings():
    assert chart_values([])["drawings"] == []
