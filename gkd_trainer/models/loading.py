"""Load models and tokenizers by name; add or refuse adapters; prepare the student for training."""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import try_to_load_from_cache
from peft import PeftConfig, PeftMixedModel, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)
from transformers.utils import CONFIG_NAME
from transformers.utils.peft_utils import find_adapter_config_file

from gkd_trainer.batch_keys import MEDIA_INPUTS
from gkd_trainer.compat import without_mistral_common
from gkd_trainer.errors import GKDConfigError, GKDDataError, GKDTeacherError
from gkd_trainer.types import MediaTokens

logger = logging.getLogger(__name__)

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
)

PLACE = ("revision", "token", "subfolder", "cache_dir", "local_files_only")
"""Options of from_pretrained that say where a model is stored."""

_CONFIG_OPTIONS = ("trust_remote_code", "code_revision", "gguf_file")


def load_student(name_or_path: str, init_kwargs: Mapping[str, Any] | None, trust_remote_code: bool) -> PreTrainedModel:
    """Load a causal LM, a vision-language model or an encoder-decoder, in float32 unless `init_kwargs` give a dtype.

    By default `from_pretrained` takes the checkpoint's dtype, and a student in pure bf16 loses small updates.
    """
    kwargs = {"trust_remote_code": trust_remote_code, **(init_kwargs or {})}
    if kwargs.get("torch_dtype") is None and kwargs.get("dtype") is None:  # torch_dtype is the older name
        kwargs["dtype"] = torch.float32
    try:
        model: PreTrainedModel = auto_class(name_or_path, kwargs).from_pretrained(name_or_path, **kwargs)
    except Exception as error:  # from_pretrained and the libraries below it may raise anything
        raise GKDConfigError(loading_failure("student", name_or_path, "model_init_kwargs", error)) from error
    return model


def auto_class(name_or_path: str, init_kwargs: Mapping[str, Any]) -> Any:
    """Return the auto class that loads a model by name, by its config.

    It is AutoModelForSeq2SeqLM for an encoder-decoder, AutoModelForImageTextToText for a vision-language model, and
    AutoModelForCausalLM for any other.

    Raises what AutoConfig.from_pretrained raises if there is no config.
    """
    config = stored_config(name_or_path, init_kwargs)
    if config.is_encoder_decoder:
        return AutoModelForSeq2SeqLM
    kind = type(config)
    if kind not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForCausalLM
    # Some configs fit a class for text too; the checkpoint names its own.
    own: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[kind]
    is_named = getattr(own, "__name__", None) in (getattr(config, "architectures", None) or ())
    return AutoModelForImageTextToText if is_named or kind not in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModelForCausalLM


def stored_config(name_or_path: str, init_kwargs: Mapping[str, Any]) -> Any:
    """Return the config with which a model is loaded by name: that of the base model for an adapter.

    A folder with an adapter and a config of its own holds its base model too.

    Raises what AutoConfig.from_pretrained raises if there is none.
    """
    config = init_kwargs.get("config")
    if isinstance(config, PreTrainedConfig):
        return config
    read = {key: value for key, value in init_kwargs.items() if key in (*PLACE, *_CONFIG_OPTIONS)}
    place = {key: value for key, value in init_kwargs.items() if key in PLACE}
    is_whole = Path(name_or_path, CONFIG_NAME).is_file()
    if not is_whole and find_adapter_config_file(name_or_path, **place) is not None:
        # The auto classes also load an adapter's folder, which names the model that it belongs to.
        base = PeftConfig.from_pretrained(name_or_path, **place).base_model_name_or_path
        return stored_config(base, _for_base(init_kwargs))
    return AutoConfig.from_pretrained(config or name_or_path, **read)


def _for_base(init_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options with which an adapter's base model is loaded: it is in another repository."""
    return {key: value for key, value in init_kwargs.items() if key not in ("revision", "subfolder")}


def outline(name_or_path: str, init_kwargs: Mapping[str, Any] | None, trust_remote_code: bool) -> PreTrainedModel:
    """Return a causal LM without its weights: they are on the meta device. Its configs are those that are stored.

    Of an adapter it is the base model.

    Raises GKDConfigError if that fails.
    """
    place = {key: value for key, value in (init_kwargs or {}).items() if key in PLACE}
    kwargs = {"trust_remote_code": trust_remote_code, **place}
    try:
        config = stored_config(name_or_path, kwargs)
        if config.is_encoder_decoder:
            raise ValueError("it is an encoder-decoder, and only causal LMs can be loaded without their weights")
        auto: Any = auto_class(name_or_path, {"config": config})
        with torch.device("meta"):
            model: PreTrainedModel = auto.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # a malformed config fails in any way
        raise GKDConfigError(loading_failure("student", name_or_path, "model_init_kwargs", error)) from error
    own_place = place if config.name_or_path == name_or_path else _for_base(place)
    with contextlib.suppress(OSError):  # else transformers made it from the config
        model.generation_config = GenerationConfig.from_pretrained(config.name_or_path, **own_place)
    return model


def loading_failure(role: str, name_or_path: str, init_kwargs: str, error: Exception) -> str:
    """Return the message for a model that could not be loaded by name."""
    return (
        f"could not load the {role} from {name_or_path!r}: expected a folder with a causal LM or an encoder-decoder, "
        f"or the name of one on the hub, with the arguments to load it in {init_kwargs} "
        f"({type(error).__name__}: {error})"
    )


def find_tokenizer(
    name_or_path: str, trust_remote_code: bool, init_kwargs: Mapping[str, Any] | None = None
) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer stored with a model's weights, or None if there is none.

    The `init_kwargs` that locate the model also locate the tokenizer.

    Raises:
        GKDConfigError: The tokenizer's files are there but can't be read, or only mistral-common's tokenizer can.
    """
    if not name_or_path:
        return None
    place = {key: value for key, value in (init_kwargs or {}).items() if key in PLACE}
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            name_or_path, trust_remote_code=trust_remote_code, **place, **without_mistral_common()
        )
    except Exception as error:  # of any type, also if there is no tokenizer
        files = _tokenizer_files(name_or_path, place)
        if files:
            raise GKDConfigError(
                f"could not read the tokenizer of {name_or_path!r} from {', '.join(files)}: expected files that "
                f"AutoTokenizer.from_pretrained can load ({type(error).__name__}: {error}). Replace them, or pass a "
                "tokenizer"
            ) from error
        if not isinstance(error, OSError | ValueError | KeyError):
            raise
        return None
    refuse_mistral_common(tokenizer)
    # For some architectures transformers makes one without words.
    has_words = not set(tokenizer.get_vocab().values()) <= set(tokenizer.all_special_ids)
    return tokenizer if has_words else None


def refuse_mistral_common(tokenizer: Any) -> None:
    """Raise GKDConfigError for a tokenizer of mistral-common, which has neither token names nor a chat template."""
    if any(kind.__name__ == "MistralCommonBackend" for kind in type(tokenizer).__mro__):
        raise GKDConfigError(
            "expected a tokenizer of transformers; got MistralCommonBackend, which AutoTokenizer returns for a "
            "tekken.json if mistral-common is installed, and which hides its added tokens and has no chat template: "
            "leave it out, or load transformers.PreTrainedTokenizerFast.from_pretrained(name) in its place"
        )


def find_processing_class(
    name_or_path: str, trust_remote_code: bool, init_kwargs: Mapping[str, Any] | None = None
) -> PreTrainedTokenizerBase | ProcessorMixin | None:
    """Return the processor stored with a vision-language model's weights, or the tokenizer of any other model.

    See `find_tokenizer`. A processor that can't be loaded is replaced by its tokenizer, with a warning.
    """
    kwargs = {"trust_remote_code": trust_remote_code, **(init_kwargs or {})}
    kind: Any = None
    if name_or_path:
        with contextlib.suppress(Exception):  # without a config, loading the model says why
            kind = auto_class(name_or_path, kwargs)
    if kind is AutoModelForImageTextToText:
        place = {key: value for key, value in kwargs.items() if key in (*PLACE, "trust_remote_code")}
        try:
            processor = AutoProcessor.from_pretrained(name_or_path, **place, **without_mistral_common())
        except Exception as error:  # of any type, also if a package that it needs is missing
            logger.warning(
                "The processor of %r can't be loaded (%s: %s), so rows can't have images: only its tokenizer is used.",
                name_or_path,
                type(error).__name__,
                error,
            )
        else:
            if isinstance(processor, ProcessorMixin):
                return processor
    return find_tokenizer(name_or_path, trust_remote_code, init_kwargs)


def _tokenizer_files(name_or_path: str, place: Mapping[str, Any]) -> list[str]:
    """Return the vocabulary files of a folder, or those already downloaded for a name on the hub."""
    folder = Path(name_or_path, place.get("subfolder") or "")
    if Path(name_or_path).is_dir():
        return [name for name in _TOKENIZER_FILES if (folder / name).is_file()]
    try:
        return [
            name
            for name in _TOKENIZER_FILES
            if isinstance(
                try_to_load_from_cache(
                    name_or_path,
                    "/".join(filter(None, (place.get("subfolder"), name))),
                    cache_dir=place.get("cache_dir"),
                    revision=place.get("revision"),
                ),
                str,
            )
        ]
    except ValueError:  # not a valid name on the hub
        return []


def name_of(model: nn.Module | None) -> str:
    """Return the name or folder that a model was loaded from; empty if it was built in memory."""
    return str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")


def media_tokens(model: nn.Module) -> MediaTokens:
    """Return the tokens that stand for images and other media in a model's input, from its config."""
    config = getattr(model, "config", None)

    def token(kind: str) -> int | None:
        ids = (getattr(config, f"{kind}_token_{suffix}", None) for suffix in ("id", "index"))
        return next((token_id for token_id in ids if isinstance(token_id, int)), None)

    return MediaTokens(token("image"), token("video"), token("audio"))


def reads_images(model: nn.Module) -> bool:
    """Return whether a model is a vision-language model, as AutoModelForImageTextToText loads them."""
    inner = base_model(model)
    config: Any = getattr(inner, "config", None)
    kind = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(type(config), None)
    return isinstance(kind, type) and isinstance(inner, kind)


def refuse_unread_media(model: nn.Module, model_inputs: Mapping[str, Any], role: str) -> None:
    """Raise GKDDataError for a batch with images or other media that a model's forward does not take.

    Forwards ignore arguments that they don't know: the model would read only the placeholders.
    """
    media = MEDIA_INPUTS & model_inputs.keys()
    if not media:
        return
    inner = base_model(model)
    parameters = inspect.signature(inner.forward).parameters
    if "input_ids" in parameters and (unread := sorted(media - parameters.keys())):
        raise GKDDataError(
            f"this batch holds {', '.join(unread)}, which the {role} ({type(inner).__name__}) does not take: it would "
            f"read the text without them. Use a {role} that takes the same inputs, or rows without images"
        )


def uncompiled(model: nn.Module, role: str, remedy: str = "") -> nn.Module:
    """Return the module inside `torch.compile(model)`, with a warning; any other module unchanged.

    A compiled forward hides the model's head, so all logits would have to be built.
    """
    inner = getattr(model, "_orig_mod", None)
    if not isinstance(inner, nn.Module):
        return model
    logger.warning("The %s was compiled, but runs uncompiled; otherwise all its logits would be built%s.", role, remedy)
    return inner


def give_pad_token(model: nn.Module, token_id: int) -> None:
    """Set the pad token of a model that has none, in its config and its generation config."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    for holder in (config, getattr(model, "generation_config", None)):
        if holder is not None and getattr(holder, "pad_token_id", None) is None:
            holder.pad_token_id = token_id


def wrap_in_adapter(model: nn.Module, peft_config: PeftConfig) -> PeftModel:
    """Return the student with a new adapter; refuse one that already has an adapter."""
    # AutoModel loads an adapter's folder as a plain model whose layers PEFT would initialise again.
    if isinstance(model, PeftModel) or any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise GKDConfigError(
            "got peft_config and a model that already has an adapter. To train that adapter, leave peft_config out and "
            "pass peft.AutoPeftModelForCausalLM.from_pretrained(folder, is_trainable=True); for a new one, pass the "
            "model that .merge_and_unload() of it returns"
        )
    return get_peft_model(model, peft_config)


def refuse_prompt_learning(adapted: nn.Module | PeftConfig | None, role: str = "student") -> None:
    """Raise if an adapter adds virtual tokens: the other model has no positions to compare them with.

    Args:
        adapted: A model, wrapped by PEFT or not, or the config of an adapter to add.
        role: The model that has the adapter, "student" or "teacher".

    Raises:
        GKDConfigError: An adapter of the student adds virtual tokens.
        GKDTeacherError: An adapter of the teacher does.
    """
    if isinstance(adapted, PeftModel):
        named = {f"the {role}'s adapter {name!r} is ": config for name, config in adapted.peft_config.items()}
    else:
        named = {"": adapted} if isinstance(adapted, PeftConfig) else {}
    for name, config in named.items():
        if config.is_prompt_learning:
            other, error = ("teacher", GKDConfigError) if role == "student" else ("student", GKDTeacherError)
            raise error(
                f"{name}{type(config).__name__}{', which' if name else ''} learns virtual tokens that the {other} does "
                "not see: use an adapter that changes weights, such as peft.LoraConfig"
            )


def base_model(model: nn.Module) -> nn.Module:
    """Return the causal LM inside PEFT's (adapters stay active) and FSDP's wrappers, or the model itself."""
    if isinstance(model, FullyShardedDataParallel):
        model = model.module
    if isinstance(model, PeftMixedModel):
        return cast(nn.Module, model.base_model.model)
    return model.get_base_model() if isinstance(model, PeftModel) else model


def refuse_frozen(model: nn.Module) -> None:
    """Raise GKDConfigError if no parameter of the student would be trained."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise GKDConfigError(
            "no parameter of the student requires a gradient, so nothing would be trained. An adapter loaded from a "
            "folder is frozen: pass peft.AutoPeftModelForCausalLM.from_pretrained(folder, is_trainable=True)"
        )


def refuse_packed_by_forwards(model: nn.Module) -> None:
    """Raise GKDConfigError for a student in 4 bit on a CPU on which bitsandbytes repacks its weights.

    On CPUs with AVX512-BF16, the first forward in eval mode without gradients (a rollout, an evaluation) does so for
    good, and the product with repacked weights has no backward: the adapters would get no gradients, without an error.
    """
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if getattr(module, "support_avx512bf16_for_cpu", False) and isinstance(weight, Tensor) and weight.is_cpu:
            raise GKDConfigError(
                "the student is in 4 bit on a CPU, where bitsandbytes repacks the weights in the first forward without "
                "gradients, and computes no gradients from then on: load it in 8 bit or unquantised, or train on a GPU"
            )


def has_dropout(model: nn.Module) -> bool:
    """Return whether a model in training drops anything at random."""
    return any(
        "drop" in name and isinstance(value, float) and value > 0
        for module in model.modules()
        for name, value in (vars(module) | ({"dropout": module.p} if isinstance(module, nn.Dropout) else {})).items()
    )


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability of a model to 0, including those that attention layers keep as plain numbers."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            # attention_dropout, attn_dropout_p, dropout_prob, resid_pdrop
            if ("dropout" in name or name.endswith("pdrop")) and isinstance(value, float):
                setattr(module, name, 0.0)
