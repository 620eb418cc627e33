"""The folder of weights for servers, and the servers' versions of them."""

import re
from pathlib import Path

import pytest

from gkd_trainer.errors import GKDConfigError
from gkd_trainer.rollouts.vllm_sync import shared_folder


@pytest.mark.parametrize("url", ["http://10.1.2.3:8000", "http://gpu-node:8000", "http://[2001:db8::1]:8000"])
def test_a_server_that_may_be_elsewhere_needs_a_folder_that_both_see(url, tmp_path):
    with pytest.raises(GKDConfigError, match=f"{re.escape(url)} may be on another machine.*set vllm_sync_dir"):
        shared_folder(None, ["http://localhost:8000", url])
    assert shared_folder(str(tmp_path), [url]).path.parent == tmp_path


@pytest.mark.parametrize("url", ["http://127.0.0.1:8000", "http://localhost:8000", "http://[::1]:8000"])
def test_a_server_on_this_machine_needs_none(url):
    assert shared_folder(None, [url]).path.parent == Path("/dev/shm")
