"""How vLLM servers get the student's weights, and prove that they still hold them.

A server holds a version: a string that we set and that it forgets when it restarts. While it loads weights, the version
is "loading" with a random number. It becomes the final name if it is still unchanged after loading, so a server that
restarted in between does not get the name. The same name before and after some requests proves that the same weights
answered all of them.
"""

from __future__ import annotations

import contextlib
import secrets
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import Any, final
from urllib.parse import urlsplit

import torch
from torch import nn

from gkd_trainer.errors import GKDConfigError, GKDServerError
from gkd_trainer.models.loading import base_model
from gkd_trainer.models.weights import (
    checkpoint_weights,
    config_ties_head,
    has_tied_head,
    is_plain_lora,
    is_sharded,
    write_adapter,
    write_weights,
)
from gkd_trainer.rollouts.private_folder import PrivateFolder
from gkd_trainer.vllm_answers import Models, RPCResults, ServerInfo, Success, WeightInfo
from gkd_trainer.vllm_client import VLLMServer, call_each

TRIES = 3
"""How often work is attempted, at most, if a server loses the weights."""

FASTEST_RESTART = 3.0
"""Minimum seconds that a vLLM server needs to restart: if it answers twice within them, it has not restarted."""

_ADAPTER = "gkd-student-"
"""The prefix of our adapters' names."""

_LOADING = "loading:"
"""The prefix of a server's version while it loads weights."""


class WeightSync(ABC):
    """A way to send servers the student's weights and to check that they still hold them."""

    model_name: str | None = None
    """The model name to request, if that is not the served model's."""

    def __init__(self, servers: Sequence[VLLMServer]) -> None:
        self._servers = servers
        self._padded_size = 0

    @final
    def send(self, model: nn.Module) -> None:
        """Send the weights to all servers; for rank 0."""
        self._note_padded_size(model)
        self._send(model)

    @final
    def assist(self, model: nn.Module) -> None:
        """Take part in `send` on the other ranks."""
        self._note_padded_size(model)
        try:
            self._gather(model)
        finally:
            self._note_version()

    @abstractmethod
    def confirmed_version(self, server: VLLMServer) -> str | None:
        """Return the version of a server that holds the current weights; None for one that does not.

        It changes when the server loses the weights and gets them again.
        """

    @abstractmethod
    def restore(self, server: VLLMServer) -> None:
        """Send a server the current weights again."""

    @abstractmethod
    def close(self) -> None:
        """Free the resources for sending weights."""

    @final
    def padding_ids(self, vocab_size: int) -> range:
        """Return the ids that only pad the head; known after the first `send` or `assist`."""
        return range(vocab_size, max(vocab_size, self._padded_size))

    @abstractmethod
    def _send(self, model: nn.Module) -> None:
        """Send the weights."""

    @abstractmethod
    def _gather(self, model: nn.Module) -> None:
        """Take part in gathering the weights for `_send`, if they are sharded over ranks."""

    @abstractmethod
    def _note_version(self) -> None:
        """Note that rank 0 sent new weights, and their version if it says so."""

    @final
    def _note_padded_size(self, model: nn.Module) -> None:
        student: Any = base_model(model)
        self._padded_size = student.config.get_text_config().vocab_size


class FolderSync(WeightSync):
    """Weights pass through a folder that both sides see; each state has a new folder name, which is its version."""

    def __init__(self, servers: Sequence[VLLMServer], folder: PrivateFolder | None) -> None:
        super().__init__(servers)
        self._folder = folder
        self._sent = 0
        self._current: Path | None = None

    @abstractmethod
    def _write(self, model: nn.Module, folder: Path) -> None: ...

    @final
    def _send(self, model: nn.Module) -> None:
        assert self._folder is not None
        self._sent += 1
        folder, previous = self._folder.path / f"weights-{self._sent:06d}", None
        try:
            self._write(model, folder)
            previous, self._current = self._current, folder
            call_each(self._servers, self._servers, lambda server, _: self.restore(server))
        finally:
            _from_rank_0(str(folder))  # after a failure too: the other ranks wait for it
            if previous is not None:
                shutil.rmtree(previous, ignore_errors=True)

    @final
    def _note_version(self) -> None:
        folder = _from_rank_0(None)
        self._current = None if folder is None else Path(folder)

    @final
    def close(self) -> None:
        """Remove the folder."""
        if self._folder is not None:
            self._folder.close()


class FullSync(FolderSync):
    """Sends all weights, which replace a server's own."""

    def __init__(self, servers: Sequence[VLLMServer], folder: PrivateFolder | None) -> None:
        super().__init__(servers, folder)
        self._checked: set[str] = set()
        for server in servers:
            try:
                weight_version(server)
            except GKDServerError as error:
                raise GKDConfigError(
                    f"the vLLM server at {server.base_url} takes no weights: start it with the environment variable "
                    f"VLLM_SERVER_DEV_MODE=1 (on a CPU also VLLM_CPU_KVCACHE_SPACE=1, its KV cache in GiB), on an "
                    f"address that only you can reach ({error})"
                ) from error

    def _write(self, model: nn.Module, folder: Path) -> None:
        try:
            for server in self._servers:
                self._refuse_stale_head(server, model)
        except Exception:
            gather_weights(model)  # in which ranks that share the model await this one
            raise
        write_weights(model, folder)

    def _gather(self, model: nn.Module) -> None:
        gather_weights(model)

    def confirmed_version(self, server: VLLMServer) -> str | None:
        """Return the folder that the server loaded last, and the number of that load; None if it is not current."""
        version = weight_version(server)
        return version if self._is_current(version) else None

    def _is_current(self, version: str) -> bool:
        return not is_loading(version) and self._current is not None and _folder_of(version) == self._current

    def restore(self, server: VLLMServer) -> None:
        """Make a server load the folder; another rank may do so at the same time."""
        if self._current is None:
            raise GKDServerError(f"the vLLM server at {server.base_url} has no weights of the student: call sync first")
        for _ in range(TRIES):
            if self._load(server, self._current):
                return
        raise GKDServerError(
            f"the vLLM server at {server.base_url} lost the student's weights {TRIES} times while it loaded them: it "
            "restarted, or another run also sends it weights. Look at its log"
        )

    def _load(self, server: VLLMServer, folder: Path) -> bool:
        loading = weight_version(server)
        if self._is_current(loading):  # another rank was faster
            return True
        # Keep the name that another rank gave it: otherwise each would wait for a name that the other replaced.
        if not (is_loading(loading) and _folder_of(loading) == folder):
            loading = loading_version(f"{folder}#{secrets.token_hex(8)}")
            name_version(server, loading)
        load = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        server.post("/collective_rpc", load, RPCResults.parse)
        try:
            forget_cache(server)
        except GKDServerError:
            # Another rank was faster and may already be generating.
            if self.confirmed_version(server) is None:
                raise
        if self.confirmed_version(server) is not None:
            return True
        return rename_version(server, loading, loading.removeprefix(_LOADING))

    def _refuse_stale_head(self, server: VLLMServer, model: nn.Module) -> None:
        if server.base_url in self._checked:
            return
        config = server.get("/server_info?config_format=json", ServerInfo.parse).vllm_config
        is_on_cpu = config.device.device == "cpu"
        overrides = str(config.model.hf_overrides)
        is_untied = "tie_word_embeddings" in overrides and "False" in overrides
        ties = config_ties_head(model) and not is_untied
        if ties and (is_on_cpu or not has_tied_head(model)):
            reason = (
                "vLLM's CPU backend keeps a packed copy of a tied head, which new embeddings do not update"
                if is_on_cpu
                else "the adapter changes only the embeddings or only the head"
            )
            raise GKDConfigError(
                f"the vLLM server at {server.base_url} ties the head to the embeddings, but {reason}: start it with "
                "--hf-overrides '{\"tie_word_embeddings\": false}' (on a CPU also with VLLM_CPU_KVCACHE_SPACE=1, "
                "its KV cache in GiB)"
            )
        self._checked.add(server.base_url)


class AdapterSync(FolderSync):
    """Sends only a LoRA adapter, which a server loads beside its base model."""

    def _gather(self, model: nn.Module) -> None:
        """Do nothing: a sharded adapter is refused."""

    def _write(self, model: nn.Module, folder: Path) -> None:
        if is_sharded(model):
            raise GKDConfigError("vllm_weight_sync='adapter' can't gather a sharded adapter: use 'full'")
        if not is_plain_lora(model):
            raise GKDConfigError(
                "vllm_weight_sync='adapter' needs a student with one plain LoRA adapter on its linear layers (no DoRA, "
                "trained biases, modules_to_save or rank_pattern): use 'full', which merges a copy of any adapter"
            )
        write_adapter(model, folder)

    def confirmed_version(self, server: VLLMServer) -> str | None:
        """Return the adapter's name, which no other weights ever have; None if the server does not hold it."""
        if self._current is None:
            return None
        name = self._name_of(self._current)
        if name not in {model.id for model in server.get("/v1/models", Models.parse).data}:
            return None
        self.model_name = name
        return name

    def restore(self, server: VLLMServer) -> None:
        """Make a server load the adapter, and unload older ones."""
        if self._current is None:
            raise GKDServerError(f"the vLLM server at {server.base_url} has no adapter of the student: call sync first")
        name = self._name_of(self._current)
        # In place, so that a request may be repeated if its answer was lost.
        load = {"lora_name": name, "lora_path": str(self._current), "load_inplace": True}
        for old in [model.id for model in server.get("/v1/models", Models.parse).data]:
            if old.startswith(_ADAPTER) and old != name:
                with contextlib.suppress(GKDServerError):  # already unloaded
                    server.post_unread("/v1/unload_lora_adapter", {"lora_name": old})
        try:
            server.post_unread("/v1/load_lora_adapter", load)
        except GKDServerError as error:
            raise GKDServerError(
                f"{error}. Start the server with --enable-lora and the environment variable "
                "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, on a machine that sees the adapter's folder"
            ) from error
        self.model_name = name

    @staticmethod
    def _name_of(folder: Path) -> str:
        return f"{_ADAPTER}{folder.parent.name}-{folder.name}"


def _from_rank_0(text: str | None) -> str | None:
    """Return the text of rank 0; all ranks must call it."""
    if not torch.distributed.is_initialized():
        return text
    said = [text]
    torch.distributed.broadcast_object_list(said, src=0)
    return said[0]


def gather_weights(model: nn.Module) -> None:
    """Take part in gathering sharded weights, for the rank that sends them."""
    if is_sharded(model):
        for _ in checkpoint_weights(model):
            pass


def weight_version(server: VLLMServer) -> str:
    """Return a server's version of its weights; "default" after it starts."""
    return server.get("/weight_info", WeightInfo.parse).weight_version


def name_version(server: VLLMServer, version: str) -> None:
    """Set a server's version of its weights."""
    server.post("/update_weight_version", {"new_version": version}, _require_success)


def rename_version(server: VLLMServer, old: str, new: str) -> bool:
    """Change a server's version from `old` to `new` if it has not restarted since it got `old`; return whether so."""
    asked = time.monotonic()
    if weight_version(server) != old:
        return False
    name_version(server, new)
    if time.monotonic() - asked < FASTEST_RESTART:
        return True
    # It may have restarted between the two answers: take the name back.
    name_version(server, old)
    return False


def forget_cache(server: VLLMServer) -> None:
    """Make a server drop its prefix cache of older weights, also what a KV connector holds outside the GPU."""
    server.post("/reset_prefix_cache?reset_external=true", {}, _require_success)


def _require_success(answer: Any) -> None:
    if answer is not None and not Success.parse(answer).success:
        raise ValueError("it did not succeed, since other requests are running")


def loading_version(version: str) -> str:
    """Return the version of a server's weights while they are being loaded."""
    return _LOADING + version


def is_loading(version: str) -> bool:
    """Return whether a server with this version is loading weights."""
    return version.startswith(_LOADING)


def _folder_of(version: str) -> Path | None:
    folder, number = version.removeprefix(_LOADING).rpartition("#")[::2]
    return Path(folder) if folder and number else None


def shared_folder(sync_dir: str | None, urls: Sequence[str]) -> PrivateFolder:
    """Return a new folder that this process and the servers can see."""
    parent = sync_dir
    if parent is None:
        far = [url for url in urls if not _is_on_this_machine(url)]
        if far:
            raise GKDConfigError(
                f"{', '.join(far)} may be on another machine, which can't see this machine's /dev/shm: set "
                "vllm_sync_dir to a folder that both can see, such as one on a network file system"
            )
        parent = "/dev/shm" if Path("/dev/shm").is_dir() else None
    try:
        return PrivateFolder(parent)
    except OSError as error:
        raise GKDConfigError(
            f"vllm_sync_dir must be a writable folder that the servers can see too; got {sync_dir!r}: {error}"
        ) from error


def _is_on_this_machine(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    with contextlib.suppress(ValueError):
        return ip_address(host).is_loopback
    return host == "localhost"
