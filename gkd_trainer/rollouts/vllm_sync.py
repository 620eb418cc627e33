"""How vLLM servers get the student's weights, and how they tell that they still hold them."""

from __future__ import annotations

import contextlib
import shutil
from abc import ABC, abstractmethod
from collections.abc import Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from torch import nn

from gkd_trainer.errors import GKDConfigError, GKDServerError
from gkd_trainer.folders import PrivateFolder
from gkd_trainer.serving import VLLMServer, spread
from gkd_trainer.student import base_model
from gkd_trainer.weights import (
    checkpoint_weights,
    has_tied_head,
    is_plain_lora,
    is_sharded,
    write_adapter,
    write_weights,
)

TRIES = 3
"""How often what a server's restart spoiled is done again."""

_ADAPTER = "gkd-student-"
"""How the names of our adapters begin."""


class WeightSync(ABC):
    """How servers get the student's weights, and how one tells that it still holds them."""

    model_name: str | None = None
    """Under which name to ask for the student, where that is not the served model's."""

    def __init__(self, servers: Sequence[VLLMServer]) -> None:
        self._servers = servers
        self._rows = 0

    @abstractmethod
    def send(self, model: nn.Module) -> None:
        """Hand out the weights, from the rank that does so."""

    @abstractmethod
    def follow(self, model: nn.Module) -> None:
        """Take part in `send` on the other ranks, and learn what the servers hold at the next `is_held_by`."""

    @abstractmethod
    def is_held_by(self, server: VLLMServer) -> bool:
        """Return whether a server holds the weights that were sent last."""

    @abstractmethod
    def restore(self, server: VLLMServer) -> None:
        """Hand a server the weights that were sent last again."""

    def padding_ids(self, vocab_size: int) -> range:
        """Return the rows of the head that are no tokens, once weights were sent."""
        return range(vocab_size, max(vocab_size, self._rows))

    def _note_rows(self, model: nn.Module) -> None:
        student: Any = base_model(model)
        self._rows = student.config.get_text_config().vocab_size


class FolderSync(WeightSync):
    """Through a folder that both sides see, under a name that is new each time: what a server holds is that name."""

    def __init__(self, servers: Sequence[VLLMServer], folder: PrivateFolder | None) -> None:
        super().__init__(servers)
        self._folder = folder
        self._sent = 0
        self._current: Path | None = None

    @abstractmethod
    def _write(self, model: nn.Module, folder: Path) -> None: ...

    @abstractmethod
    def _held(self, server: VLLMServer) -> Path | None: ...

    def send(self, model: nn.Module) -> None:
        assert self._folder is not None
        self._note_rows(model)
        self._sent += 1
        folder = self._folder.path / f"weights-{self._sent:06d}"
        self._write(model, folder)
        previous, self._current = self._current, folder
        try:
            spread(self._servers, self._servers, lambda server, _: self.restore(server))
        finally:
            if previous is not None:
                shutil.rmtree(previous)

    def follow(self, model: nn.Module) -> None:
        self._note_rows(model)
        if is_sharded(model):  # such weights are gathered by all ranks together
            for _ in checkpoint_weights(model):
                pass
        self._current = None

    def is_held_by(self, server: VLLMServer) -> bool:
        held = self._held(server)
        if self._current is None:  # this rank did not send them
            self._current = held
        return held is not None and held == self._current


class FullSync(FolderSync):
    """All weights, which a server loads in place of its own."""

    def __init__(self, servers: Sequence[VLLMServer], folder: PrivateFolder | None) -> None:
        super().__init__(servers, folder)
        self._checked: set[str] = set()
        for server in servers:
            try:
                self._held(server)
            except GKDServerError as error:
                raise GKDConfigError(
                    f"the vLLM server at {server.base_url} takes no weights: start it with the environment variable "
                    f"VLLM_SERVER_DEV_MODE=1, on an address that only you can reach ({error})"
                ) from error

    def _write(self, model: nn.Module, folder: Path) -> None:
        for server in self._servers:
            self._refuse_stale_head(server, model)
        write_weights(model, folder)

    def _held(self, server: VLLMServer) -> Path | None:
        version: str = server.get("/weight_info", lambda answer: str(answer["weight_version"]))
        return None if version == "default" else Path(version)

    def restore(self, server: VLLMServer) -> None:
        if self._current is None:
            raise GKDServerError(f"the vLLM server at {server.base_url} has no weights of the student: call sync first")
        load = {"method": "reload_weights", "kwargs": {"weights_path": str(self._current)}}
        for _ in range(TRIES):
            interruptions = server.interruptions
            server.post("/collective_rpc", load, lambda answer: answer["results"])
            forget_and_name(server, str(self._current))
            if server.interruptions == interruptions:
                return
            # One that was started anew in between may have taken the name, but not the weights.
        raise GKDServerError(
            f"the vLLM server at {server.base_url} was interrupted {TRIES} times while it took weights"
        )

    def _refuse_stale_head(self, server: VLLMServer, model: nn.Module) -> None:
        if server.base_url in self._checked:
            return
        config = server.get("/server_info?config_format=json", lambda answer: answer["vllm_config"])
        is_on_cpu = config["device_config"].get("device") == "cpu"
        overrides = str(config["model_config"].get("hf_overrides"))
        is_untied = "tie_word_embeddings" in overrides and "False" in overrides
        student: Any = base_model(model)
        ties = student.config.get_text_config().tie_word_embeddings and not is_untied
        if ties and (is_on_cpu or not has_tied_head(model)):
            reason = (
                "vLLM's CPU backend keeps a packed copy of a tied head, which new embeddings do not reach"
                if is_on_cpu
                else "the adapter changes the embeddings or the head alone"
            )
            raise GKDConfigError(
                f"the vLLM server at {server.base_url} ties the head to the embeddings, but {reason}: start it with "
                "--hf-overrides '{\"tie_word_embeddings\": false}'"
            )
        self._checked.add(server.base_url)


class AdapterSync(FolderSync):
    """A LoRA adapter alone, which a server loads beside the base model that it was started with."""

    def follow(self, model: nn.Module) -> None:
        self._note_rows(model)
        self._current = None

    def _write(self, model: nn.Module, folder: Path) -> None:
        if is_sharded(model):
            raise GKDConfigError("vllm_weight_sync='adapter' can't gather an adapter that is sharded: use 'full'")
        if not is_plain_lora(model):
            raise GKDConfigError(
                "vllm_weight_sync='adapter' needs a student with one plain LoRA adapter on its linear layers (no DoRA, "
                "trained biases, modules_to_save or rank_pattern): use 'full', which merges a copy of any adapter"
            )
        write_adapter(model, folder)

    def _held(self, server: VLLMServer) -> Path | None:
        names = server.get("/v1/models", lambda answer: {card["id"]: card["root"] for card in answer["data"]})
        ours = sorted(name for name in names if name.startswith(_ADAPTER))
        if self._current is not None:
            ours = [name for name in ours if name == self._name_of(self._current)]
        if not ours:
            return None
        folder = Path(names[ours[-1]])
        self.model_name = ours[-1]
        return folder

    def restore(self, server: VLLMServer) -> None:
        if self._current is None:
            raise GKDServerError(f"the vLLM server at {server.base_url} has no adapter of the student: call sync first")
        name = self._name_of(self._current)
        # In place: asking again after an answer that was lost is no mistake.
        load = {"lora_name": name, "lora_path": str(self._current), "load_inplace": True}
        for old in server.get("/v1/models", lambda answer: [card["id"] for card in answer["data"]]):
            if old.startswith(_ADAPTER) and old != name:
                with contextlib.suppress(GKDServerError):  # it is gone already
                    server.tell("/v1/unload_lora_adapter", {"lora_name": old})
        try:
            server.tell("/v1/load_lora_adapter", load)
        except GKDServerError as error:
            raise GKDServerError(
                f"{error}. An adapter is taken by a server that was started with --enable-lora and the environment "
                "variable VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, and that sees its folder"
            ) from error
        self.model_name = name

    @staticmethod
    def _name_of(folder: Path) -> str:
        return f"{_ADAPTER}{folder.parent.name}-{folder.name}"


def forget_and_name(server: VLLMServer, version: str) -> None:
    """Have a server forget what it cached of older weights, and hold its new ones under a name.

    Last in a sync: a server that holds the name has done all before it.
    """

    def require_success(answer: Any) -> None:
        if answer is not None and not answer.get("success", True):
            raise ValueError("it did not succeed: requests of somebody else are under way")

    server.post("/reset_prefix_cache", {}, require_success)
    server.post("/update_weight_version", {"new_version": version}, require_success)


def shared_folder(sync_dir: str | None, urls: Sequence[str]) -> PrivateFolder:
    """Return a new folder that this process and the servers see."""
    parent = sync_dir
    if parent is None:
        far = [url for url in urls if not _is_on_this_machine(url)]
        if far:
            raise GKDConfigError(
                f"{', '.join(far)} may be on another machine, which does not see this one's memory: set vllm_sync_dir "
                "to a folder that both see, such as one on a network file system"
            )
        parent = "/dev/shm" if Path("/dev/shm").is_dir() else None
    return PrivateFolder(parent)


def _is_on_this_machine(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    with contextlib.suppress(ValueError):
        return ip_address(host).is_loopback
    return host == "localhost"
