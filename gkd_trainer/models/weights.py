"""The student's weights in the form of a checkpoint, for another engine to load."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import save_torch_state_dict
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from gkd_trainer.errors import GKDConfigError, GKDRolloutError
from gkd_trainer.models.loading import base_model


def checkpoint_weights(model: nn.Module, with_adapters: bool = True) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and value of each weight that `save_pretrained` of the merged model would write.

    Adapters are merged into copies, one layer at a time: the model itself is not touched, so nothing drifts. A tied
    head comes under both names, for engines that keep two weights. Sharded weights (DTensor) are gathered one by one:
    all ranks must iterate.

    Args:
        model: A causal LM, wrapped by PEFT or not.
        with_adapters: Whether to merge adapters; else yields the base model's own weights.

    Raises:
        GKDConfigError: A weight is quantised, so another engine can't take it, or an adapter can't be merged.
    """
    refuse_quantised(model)
    student: Any = base_model(model)
    shapes = {name: torch.empty(weight.shape, device="meta") for name, weight in _named(student, "", False)}
    named: Iterable[tuple[str, Tensor]] = _named(student, "", with_adapters)
    if revert_weight_conversion(student, shapes).keys() != shapes.keys():
        # If checkpoints name or split weights differently, such as those of experts, convert all of them at once.
        named = revert_weight_conversion(student, dict(named)).items()
    for name, weight in named:
        yield name, _gathered(weight)


def load_converted(model: nn.Module, folder: str | Path) -> bool:
    """Load weights that checkpoints name or split differently than the model does; return whether it is such a model.

    Trainer loads a checkpoint's weights by the model's own names, and only warns of those that it does not find:
    vision-language models, and the experts of a mixture, would keep their initial weights.

    Raises:
        GKDConfigError: The checkpoint lacks some of the model's weights.
    """
    if not isinstance(model, PreTrainedModel):  # also an adapter's: its weights have their own names
        return False
    shapes = {name: torch.empty(weight.shape, device="meta") for name, weight in _named(model, "", False)}
    if revert_weight_conversion(model, shapes).keys() == shapes.keys():
        return False
    options: dict[str, Any] = {"config": model.config, "dtype": model.dtype, "output_loading_info": True}
    loaded, found = cast(Any, type(model)).from_pretrained(folder, **options)
    if missing := sorted(found["missing_keys"]):
        raise GKDConfigError(
            f"the checkpoint {folder} lacks {len(missing)} weights of the {type(model).__name__}, such as "
            f"{missing[0]}: resume from a checkpoint that was saved by training this model"
        )
    model.load_state_dict(loaded.state_dict())
    return True


def refuse_quantised(model: nn.Module) -> None:
    """Raise GKDConfigError if weights are packed, so that another engine can't take them."""
    student: Any = base_model(model)
    packed = [name for name, weight in _named(student, "", False) if not weight.is_floating_point()]
    if packed or getattr(student, "is_quantized", False):
        raise GKDConfigError(
            f"the student's weights are quantised ({', '.join(packed[:2]) or 'see its quantization_config'}), and "
            "vLLM can't take those: set use_vllm=False, or vllm_weight_sync='adapter' with a server that serves the "
            "base model"
        )


def is_sharded(model: nn.Module) -> bool:
    """Return whether weights are sharded over ranks (DTensor), which must then gather them together."""
    return any(hasattr(parameter, "full_tensor") for parameter in model.parameters())


def config_ties_head(model: nn.Module) -> bool:
    """Return whether a model built from the model's configuration ties its head to its embeddings."""
    student: Any = base_model(model)
    # As transformers ties them: the configuration of a text model inside may lack the option, or say otherwise.
    return bool(getattr(student.config, "tie_word_embeddings", False))


def has_tied_head(model: nn.Module) -> bool:
    """Return whether the head and the embeddings share one weight, adapters on either included."""
    student: Any = base_model(model)
    if not config_ties_head(model):
        return False
    embeddings, head = student.get_input_embeddings(), student.get_output_embeddings()
    if isinstance(embeddings, _ADAPTED) or isinstance(head, _ADAPTED):
        return False
    return head is None or embeddings.weight is head.weight


def is_plain_lora(model: nn.Module) -> bool:
    """Return whether vLLM can load the model's adapter as it is: LoRA on linear layers, and nothing else trained."""
    if not isinstance(model, PeftModel) or len(model.active_adapters) != 1:
        return False
    config = model.peft_config[model.active_adapters[0]]
    if not isinstance(config, LoraConfig):
        return False
    if any(getattr(config, name, None) for name in _NOT_PLAIN_LORA) or config.bias != "none":
        return False
    if changes_base_weights(config):  # which a server does not have
        return False
    if any(parameter.requires_grad and ".lora_" not in name for name, parameter in model.named_parameters()):
        return False
    student: Any = base_model(model)
    return not any(
        isinstance(module, BaseTunerLayer)
        for module in (student.get_input_embeddings(), student.get_output_embeddings())
    )


def changes_base_weights(config: PeftConfig) -> bool:
    """Return whether PEFT changes the frozen weights of a model to add this adapter, as PiSSA and KaSA do."""
    if not isinstance(config, LoraConfig):
        return False
    init = config.init_lora_weights
    is_changing = isinstance(init, str) and init.lower() not in _INITS_OF_ADAPTER_ONLY
    return is_changing or getattr(config, "kasa_config", None) is not None


def write_weights(model: nn.Module, folder: Path) -> None:
    """Write `checkpoint_weights` as safetensors; the folder appears only when it is complete.

    Raises:
        GKDRolloutError: It could not be written, for example for lack of space; nothing of it is left.
        FileExistsError: The folder already exists.
    """
    weights: dict[str, Tensor] = {}
    places = set()
    for name, weight in checkpoint_weights(model):
        # To the host one by one: the full model may not fit on a GPU beside the training.
        weight = weight.cpu()
        # safetensors would drop the second of two names for the same memory, such as a tied head's.
        weights[name] = weight.clone() if weight.data_ptr() in places else weight
        places.add(weight.data_ptr())
    size = sum(weight.nbytes for weight in weights.values())
    with _at_once(folder, size) as aside:
        save_torch_state_dict(weights, aside, metadata={"format": "pt"})


def write_adapter(model: nn.Module, folder: Path) -> None:
    """Write the active adapter as PEFT does, whatever its name; the folder appears only when it is complete.

    Raises:
        GKDRolloutError: It could not be written, for example for lack of space; nothing of it is left.
        FileExistsError: The folder already exists.
    """
    student: Any = model
    adapter = student.active_adapter
    size = sum(weight.nbytes for name, weight in student.named_parameters() if ".lora_" in name)
    with _at_once(folder, size) as aside:
        # "auto" would ask the hub for the base model's configuration; a plain LoRA adapter has no embeddings.
        student.save_pretrained(aside, selected_adapters=[adapter], save_embedding_layers=False)
        for file in (aside / adapter).glob("*"):  # PEFT's place for any adapter but "default"
            file.rename(aside / file.name)


@contextmanager
def _at_once(folder: Path, size: int) -> Iterator[Path]:
    if folder.exists():
        raise FileExistsError(f"the folder {folder} already exists")
    aside = folder.with_name(folder.name + ".part")
    try:
        aside.mkdir(mode=0o700)
        yield aside
        aside.rename(folder)
    except BaseException as error:
        shutil.rmtree(aside, ignore_errors=True)
        if not isinstance(error, OSError | SafetensorError):
            raise
        try:
            free = f"{shutil.disk_usage(folder.parent).free / 1e6:,.1f} MB are free there"
        except OSError as cause:
            free = f"the free space there is unknown ({cause})"
        raise GKDRolloutError(
            f"the student's weights could not be written to {folder}: {error}. They take {size / 1e6:,.1f} MB, and "
            f"{free}. Make room for twice the weights (a container's /dev/shm is small unless started with, for "
            "example, --shm-size), or choose a folder with enough space: set vllm_sync_dir for servers, TMPDIR for an "
            "engine in this process"
        ) from error


# Options of an adapter that vLLM ignores or reads differently.
_NOT_PLAIN_LORA = (
    "alora_invocation_tokens",
    "alpha_pattern",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "modules_to_save",
    "monteclora_config",
    "rank_pattern",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
    "velora_config",
)
_INITS_OF_ADAPTER_ONLY = ("gaussian", "eva", "orthogonal", "mica")
_ADAPTED = (BaseTunerLayer, AuxiliaryTrainingWrapper)


def _gathered(weight: Any) -> Tensor:
    gathered: Tensor = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
    return gathered


def _named(module: nn.Module, prefix: str, with_adapters: bool) -> Iterator[tuple[str, Tensor]]:
    if isinstance(module, _ADAPTED):
        try:
            module = _merged_copy(module) if with_adapters else _base_of(module)
        except (RuntimeError, ValueError, NotImplementedError) as error:  # raised by PEFT
            raise GKDConfigError(
                f"the adapter on {prefix.removesuffix('.')} can't be merged: {error}. vLLM takes merged weights, or a "
                "plain LoRA adapter: train another kind of adapter, or set use_vllm=False"
            ) from error
    own = {**module._parameters, **_persistent_buffers(module)}
    for name, weight in own.items():
        if weight is not None:
            yield prefix + name, weight.detach()
    for name, child in module._modules.items():
        # Activation checkpointing, compiling and FSDP insert modules that checkpoints do not name.
        if child is not None:
            inner = name in ("_checkpoint_wrapped_module", "_orig_mod", "_fsdp_wrapped_module")
            yield from _named(child, prefix if inner else f"{prefix}{name}.", with_adapters)


def _merged_copy(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        merged: Any = copy.deepcopy(module)
        if hasattr(merged, "unload_and_optionally_merge_module"):
            base: nn.Module = merged.unload_and_optionally_merge_module(
                merge=True, safe_merge=False, adapter_names=None
            )
            return base
        merged.merge(safe_merge=False)
        return _base_of(merged)


def _base_of(module: nn.Module) -> nn.Module:
    base: Any = module
    inner: nn.Module = base.get_base_layer() if isinstance(module, BaseTunerLayer) else base.original_module
    return inner


def _persistent_buffers(module: nn.Module) -> dict[str, Tensor | None]:
    return {name: buffer for name, buffer in module._buffers.items() if name not in module._non_persistent_buffers_set}
