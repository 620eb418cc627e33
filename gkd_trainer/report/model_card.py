"""The model card of a student: its teacher, its data, and how it was distilled."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from peft import PeftConfig, PeftModel
from transformers.modelcard import TrainingSummary

from gkd_trainer import __version__
from gkd_trainer.config import GKDArguments
from gkd_trainer.redaction import redacted

CARD_TAGS = ("gkd", "knowledge-distillation", "generated_from_trainer")

_TEMPLATE = Path(__file__).with_suffix(".md")
_BASE = "base_model:adapter:"
_COMPARED = {
    "matched": "those with the same bytes in both tokenizers, one bucket for all others",
    "next_byte": "all, by their first byte",
    "uld": "all, by their sorted probabilities",
    "gold": "those with the same bytes in both tokenizers; all others by their sorted probabilities",
}
_LIBRARIES = ("transformers", "torch", "datasets", "tokenizers", "trl")


def distillation_card(
    summary: TrainingSummary,
    *,
    args: GKDArguments,
    student: str,
    teacher: str | Mapping[str, str],
    teacher_urls: Sequence[str] = (),
    teacher_top_k: int | None = None,
    vocabulary_mode: str | None = None,
    adapter: PeftConfig | None = None,
    n_rows: int | None = None,
    task: str = "text-generation",
) -> ModelCard:
    """Return the card of a run.

    Args:
        summary: transformers' summary of the run: metadata, hyper-parameters, evaluations, names of datasets.
        args: The run's options.
        student: The student's name on the hub, or its folder, only the last part of which is shown.
        teacher: The same for the teacher, or for each of several by a label.
        teacher_urls: URLs of the teacher's servers; shown without credentials.
        teacher_top_k: How many of the teacher's tokens were compared; None for all.
        vocabulary_mode: How a teacher with another tokenizer was compared (one of MODES); None for the student's.
        adapter: The adapter that was trained; None if all weights were.
        n_rows: The number of rows trained on; None if unknown.
        task: The student's task on the hub.
    """
    metadata = summary.create_metadata()
    index = metadata.pop("model-index")
    if any(entry["results"] for entry in index):
        metadata["model-index"] = index
    lines: list[Any] = list(summary.eval_lines or [])
    columns = list(dict.fromkeys(name for line in lines for name in line))
    datasets = [summary.dataset] if isinstance(summary.dataset, str) else list(summary.dataset or [])
    served = (
        f", served at {', '.join(_code(_without_credentials(url)) for url in teacher_urls)}" if teacher_urls else ""
    )
    procedure = {
        "method": "generalised knowledge distillation (GKD)",
        "student": f"{_linked(student)}, {_trained_weights(adapter)}",
        "teacher": _linked_teacher(teacher) + served,
        "data": _data(datasets, n_rows),
        **_options(args, teacher_top_k, vocabulary_mode),
    }
    card: ModelCard = ModelCard.from_template(
        ModelCardData(**metadata, pipeline_tag=task, ignore_metadata_errors=True),
        template_str=_TEMPLATE.read_text(encoding="utf-8"),
        title=_plain(summary.model_name),
        student=_linked(student),
        teacher=_linked_teacher(teacher),
        data=" and ".join(_linked(name, "datasets/") for name in datasets),
        results={_plain(name): _rounded(value) for name, value in (summary.eval_results or {}).items()},
        procedure={name: text for name, text in procedure.items() if text},
        hyperparameters={name: _plain(value) for name, value in (summary.hyperparameters or {}).items()},
        columns=[_plain(column) for column in columns],
        evaluations=[[_rounded(line.get(column, "")) for column in columns] for line in lines],
        versions={"gkd_trainer": __version__, **{library: version(library) for library in _LIBRARIES}},
    )
    return card


def with_adapter(card: ModelCard, model: PeftModel, output_dir: str) -> ModelCard:
    """Return the card with PEFT's additions: its library, its version, and tags to find the adapter by."""
    path = os.path.join(output_dir, "README.md")
    card.save(path)
    model.create_or_update_model_card(output_dir)
    merged: ModelCard = ModelCard.load(path)
    # PEFT replaces the tags, and names the base model by the folder it was loaded from.
    data: Any = merged.data
    own: Any = card.data
    tags = dict.fromkeys([*(own.tags or []), *(data.tags or [])])
    data.tags = [tag for tag in tags if not tag.startswith(_BASE) or is_on_hub(tag.removeprefix(_BASE))]
    data.base_model = own.base_model
    return merged


def is_on_hub(name: str) -> bool:
    """Return whether a name may be one on the hub, and is not a path on this machine."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not os.path.exists(name)


def public_name(name: str) -> str:
    """Return a hub name unchanged, or the last part of a path or URL, without secrets."""
    if is_on_hub(name):
        return name
    shown: str = redacted(name)
    if "://" in shown:
        shown = re.split("[?#]", shown)[0]
    return Path(shown).name or shown


def _options(args: GKDArguments, teacher_top_k: int | None, vocabulary_mode: str | None) -> dict[str, str]:
    share = "share of samples that the student generates; the others are from the data"
    lmbda = f"{args.lmbda} → {args.lmbda_end}, linear over the run" if args.lmbda_schedule == "linear" else args.lmbda
    others = ", with completions by the teacher" if args.seq_kd else ""
    sampling = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": None, "repetition_penalty": 1.0}
    sampled = [f"{name} {getattr(args, name)}" for name, off in sampling.items() if getattr(args, name) != off]
    return {
        **_divergence(args, vocabulary_mode),
        "compared tokens": _compared(args, teacher_top_k, vocabulary_mode),
        "loss temperature": str(args.loss_temperature),
        "cross-entropy weight": str(args.ce_weight) if args.ce_weight else "",
        "λ": f"{lmbda} ({share}{others})",
        "completions": ", ".join(
            [
                f"by {'vLLM' if args.use_vllm else 'transformers'}",
                f"at most {args.max_new_tokens} tokens",
                *(sampled or ["sampled as the model predicts"]),
            ]
        )
        if args.generates
        else "",
        "longest sequence": f"{args.max_length} tokens" if args.max_length is not None else "",
    }


def _divergence(args: GKDArguments, vocabulary_mode: str | None) -> dict[str, str]:
    if vocabulary_mode == "uld":
        return {"divergence": "sum of the differences between sorted probabilities (ULD)"}
    if args.divergence == "jsd":
        meaning = "0 is forward KL(teacher‖student), 1 is reverse KL(student‖teacher), between is the generalised JSD"
        name = _jsd(args.beta, args.divergence_scale)
        if vocabulary_mode == "gold":
            name += ", and the sum of the differences between sorted probabilities (GOLD)"
        return {"divergence": name, "β": f"{args.beta} ({meaning})"}
    parsed = args.divergence_options if isinstance(args.divergence_options, dict) else {}
    options = ", ".join(f"{name} = {value}" for name, value in parsed.items())
    return {"divergence": " with ".join(filter(None, [args.divergence.replace("_", " "), options]))}


def _compared(args: GKDArguments, teacher_top_k: int | None, vocabulary_mode: str | None) -> str:
    if not teacher_top_k:
        return "all" if vocabulary_mode is None else _COMPARED[vocabulary_mode]
    known = "" if vocabulary_mode is None else " that the student has too"
    rest = "one bucket for the rest" if args.teacher_tail == "bucket" else "renormalised over them"
    return f"the teacher's {teacher_top_k} most probable{known}, {rest}"


def _jsd(beta: float, scale: str) -> str:
    if beta in (0, 1):
        return "forward KL(teacher‖student)" if beta == 0 else "reverse KL(student‖teacher)"
    return "generalised Jensen-Shannon divergence" + (", divided by β(1−β)" if scale == "continuous" else "")


def _trained_weights(adapter: PeftConfig | None) -> str:
    if adapter is None:
        return "all weights"
    kind = getattr(adapter.peft_type, "value", adapter.peft_type)
    rank = getattr(adapter, "r", None)
    return f"{_plain(kind).replace('LORA', 'LoRA')} adapter" + (f" of rank {rank}" if rank is not None else "")


def _data(names: Sequence[str], n_rows: int | None) -> str:
    rows = "" if n_rows is None else f"{n_rows} {'row' if n_rows == 1 else 'rows'}"
    return ", ".join(filter(None, [*(_linked(name, "datasets/") for name in names), rows]))


def _linked(name: str, kind: str = "") -> str:
    """Return a name as a link if the hub may have it, else as code."""
    # A hub name needs no escapes. One without an owner may just as well be local.
    if is_on_hub(name) and "/" in name:
        return f"[{name}](https://huggingface.co/{kind}{name})"
    return _code(public_name(name))


def _linked_teacher(teacher: str | Mapping[str, str]) -> str:
    if isinstance(teacher, str):
        return _linked(teacher)
    return "; ".join(f"{_plain(label)}: {_linked(name)}" for label, name in teacher.items())


def _without_credentials(url: str) -> str:
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}"


def _code(text: object) -> str:
    """Return text as inline code, without characters that would end it, also in a table."""
    return "`" + re.sub(r"\s+", " ", str(text)).replace("`", "'").replace("|", "\\|") + "`"


def _plain(text: object) -> str:
    """Return text on one line, escaped so that Markdown shows it as it is."""
    return re.sub(r"([\\`*\[\]<>|])", r"\\\1", re.sub(r"\s+", " ", str(text)))


def _rounded(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else _plain(value)
