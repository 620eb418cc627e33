"""The folder of weights for servers, and the servers' versions of them."""

import re
from pathlib import Path

import pytest
import torch

from gkd_trainer.errors import GKDConfigError
from gkd_trainer.rollouts.vllm_sync import FullSync, shared_folder
from gkd_trainer.vllm_client import VLLMServer


@pytest.mark.parametrize("url", ["http://10.1.2.3:8000", "http://gpu-node:8000", "http://[2001:db8::1]:8000"])
def test_a_server_that_may_be_elsewhere_needs_a_folder_that_both_see(url, tmp_path):
    with pytest.raises(GKDConfigError, match=f"{re.escape(url)} may be on another machine.*set vllm_sync_dir"):
        shared_folder(None, ["http://localhost:8000", url])
    assert shared_folder(str(tmp_path), [url]).path.parent == tmp_path


@pytest.mark.parametrize("url", ["http://127.0.0.1:8000", "http://localhost:8000", "http://[::1]:8000"])
def test_a_server_on_this_machine_needs_none(url):
    assert shared_folder(None, [url]).path.parent == Path("/dev/shm")


def test_a_rank_that_finds_a_server_unfit_still_takes_part_in_what_the_others_gather(monkeypatch, tmp_path):
    def refuse(self, server, model):
        raise GKDConfigError("its head would not follow")

    gathered = []
    monkeypatch.setattr("gkd_trainer.rollouts.vllm_sync.gather_weights", gathered.append)
    monkeypatch.setattr("gkd_trainer.rollouts.vllm_sync.weight_version", lambda server: "default")
    monkeypatch.setattr(FullSync, "_refuse_stale_head", refuse)
    model = torch.nn.Linear(1, 1)
    sync = FullSync([VLLMServer("http://127.0.0.1:9")], None)
    with pytest.raises(GKDConfigError, match="would not follow"):
        sync._write(model, tmp_path)
    assert gathered == [model]
