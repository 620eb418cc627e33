"""Weights from GPU to GPU, by vLLM's own weight transfer over NCCL."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gkd_trainer.errors import GKDConfigError, GKDError, GKDServerError
from gkd_trainer.models.weights import checkpoint_weights
from gkd_trainer.rollouts.vllm_sync import (
    WeightSync,
    forget_cache,
    gather_weights,
    is_loading,
    loading_version,
    name_version,
    rename_version,
    weight_version,
)
from gkd_trainer.vllm_answers import ServerInfo, WorldSize
from gkd_trainer.vllm_client import VLLMServer

logger = logging.getLogger(__name__)


class NCCLSync(WeightSync):
    """All weights, broadcast from rank 0 into the memory of each server's GPUs.

    The servers need VLLM_SERVER_DEV_MODE=1 and `--weight-transfer-config '{"backend": "nccl"}'`, and GPUs that rank 0
    can reach over NCCL. If a server restarts in the middle of a window, it can't get that window's weights again: the
    run ends, with a checkpoint. (vLLM's transfer by CUDA IPC is not offered, since it pickles memory handles into its
    requests.)
    """

    def __init__(self, servers: Sequence[VLLMServer]) -> None:
        super().__init__(servers)
        self._engines: list[Any] = []
        self._source = _Source()
        self._version: str | None = None

    def _send(self, model: nn.Module) -> None:
        self._source.model = model
        if not self._engines:
            try:
                self._engines = [self._connected(server) for server in self._servers]
            except Exception:
                self._gather(model)  # in which ranks that share the model await this one
                raise
        self._version = secrets.token_hex(8)
        for server, engine in zip(self._servers, self._engines, strict=True):
            self._broadcast(server, engine, self._version)

    def _broadcast(self, server: VLLMServer, engine: Any, version: str) -> None:
        name_version(server, loading_version(version))
        if torch.cuda.is_available():
            # vLLM reads the weights on its own streams, which don't wait for the step that wrote them.
            torch.cuda.synchronize()
        try:
            engine.send_weights()
        except GKDError:
            raise
        except Exception as error:  # from vLLM, NCCL or CUDA
            raise GKDServerError(
                f"sending weights to the vLLM server at {server.base_url} over NCCL failed with "
                f"{type(error).__name__}: {error}. Look at the server's log, and restart it; "
                "vllm_weight_sync='full' needs no NCCL"
            ) from error
        forget_cache(server)
        if not rename_version(server, loading_version(version), version):
            raise GKDServerError(
                f"the vLLM server at {server.base_url} restarted while it loaded weights, or another run also sends "
                "it weights: restart all servers, and resume"
            )

    def _gather(self, model: nn.Module) -> None:
        for _ in range(2 * len(self._servers)):  # the metadata, and the tensors
            gather_weights(model)

    def _note_version(self) -> None:
        self._version = None  # the servers say it

    def close(self) -> None:
        """Do nothing: vLLM's transfer can't be closed."""

    def confirmed_version(self, server: VLLMServer) -> str | None:
        """Return the number of the last broadcast if the server holds its weights, else None."""
        version = weight_version(server)
        if self._version is None and version != "default" and not is_loading(version):  # sent by another rank
            self._version = version
        return version if version == self._version else None

    def restore(self, server: VLLMServer) -> None:
        """Raise GKDServerError: the weights of the last sync are no longer available."""
        raise GKDServerError(
            f"the vLLM server at {server.base_url} no longer holds the student's weights; it seems to have "
            "restarted. vllm_weight_sync='full' survives that, 'nccl' does not: restart all servers, and resume"
        )

    def _connected(self, server: VLLMServer) -> Any:
        try:
            from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
            from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
            from vllm.utils.network_utils import get_ip, get_open_port
        except ImportError as error:
            raise GKDConfigError(
                'vllm_weight_sync="nccl" needs vLLM here too: pip install ".[vllm]" in a clone of gkd_trainer; '
                f"importing it failed with: {error}"
            ) from error
        if not torch.cuda.is_available():
            raise GKDConfigError('vllm_weight_sync="nccl" needs a CUDA device to send from; there is none: use "full"')
        # vLLM would wait a long time for a server that refuses.
        if _transfer_backend(server) != "nccl":
            raise GKDConfigError(
                f"the vLLM server at {server.base_url} takes no weights over NCCL: start it with "
                '--weight-transfer-config \'{"backend": "nccl"}\', and the environment variable VLLM_SERVER_DEV_MODE=1'
            )
        workers = server.get("/get_world_size", WorldSize.parse).world_size
        info = NCCLTrainerInitInfo(rank=0, master_address=get_ip(), master_port=get_open_port(), world_size=workers + 1)
        return WeightTransferTrainerFactory.trainer_init(info, client=_Client(server), source=self._source)


def _transfer_backend(server: VLLMServer) -> str | None:
    try:
        transfer = server.get("/server_info?config_format=json", ServerInfo.parse).vllm_config.weight_transfer
    except GKDServerError as error:
        logger.warning("%s", error)
        return None
    return None if transfer is None else transfer.backend


class _Client:
    """The four calls of vLLM's VLLMWeightSyncClient, by which its trainer side drives a server, through our client.

    Each is sent once: a second /update_weights would wait for a second broadcast.
    """

    def __init__(self, server: VLLMServer) -> None:
        self._server = server

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._server.post_unread("/init_weight_transfer_engine", {"init_info": init_info}, is_repeatable=False)

    def start_weight_update(self) -> None:
        self._server.post_unread("/start_weight_update", {}, is_repeatable=False)

    def update_weights(self, update_info: Any) -> None:
        self._server.post_unread("/update_weights", {"update_info": update_info}, is_repeatable=False)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._server.post_unread("/finish_weight_update", {"weight_version": weight_version}, is_repeatable=False)


class _Source:
    """The student's weights as vLLM's WeightSource: the metadata, then the tensors, in the same order."""

    model: nn.Module

    def metadata(self) -> list[Any]:
        from vllm.distributed.weight_transfer.base import ParamMeta

        return [ParamMeta(name, weight.dtype, tuple(weight.shape)) for name, weight in checkpoint_weights(self.model)]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return checkpoint_weights(self.model)
