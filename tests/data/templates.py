"""Chat templates of many models, and what each of them makes of an answer.

Those that TRL installs are the models' own; the others are written here, with the structure of the models' own.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import trl

_TRL_TEMPLATES = Path(trl.__file__).parent / "chat_templates"

ANSWER = "{answer}"


@dataclass(frozen=True)
class Chat:
    """A chat template with the special tokens of its tokenizer.

    `header` stands before what is trained on in an answer: `turn` in an earlier one, `last_turn` in the last one.
    `stops` are the tokens at which the model's generation ends, beside eos.
    """

    template: str
    eos: str
    special: tuple[str, ...]
    header: str
    turn: str
    last_turn: str
    stops: tuple[str, ...] = ()
    bos: str | None = None
    takes_system: bool = True


PHI4 = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '<|im_sep|>' + m.content + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)

# No header before an answer, and no generation prompt.
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'user' %}{{ '[INST] ' + m.content + '[/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}"
    "{% endfor %}"
)

# A system turn of its own in front of conversations without one.
SMOLLM2 = (
    "{% for m in messages %}"
    "{% if loop.first and m.role != 'system' %}{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# Markers of its own, around the header too. Without thinking, an empty reasoning belongs to header and turn alike.
SMOLLM3 = (
    "{% set thinks = enable_thinking if enable_thinking is defined else true %}"
    "{{ '<|im_start|>system\nReasoning: ' + ('/think' if thinks else '/no_think') + '\n' }}"
    "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}{{ '<|im_end|>\n' }}"
    "{% for m in messages %}"
    "{% if m.role == 'user' %}{{ '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}"
    "{% elif m.role == 'assistant' %}{% generation %}"
    "{{ '<|im_start|>assistant\n' + ('' if thinks else '<think>\n\n</think>\n') + m.content + '<|im_end|>\n' }}"
    "{% endgeneration %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' + ('' if thinks else '<think>\n\n</think>\n') }}{% endif %}"
)

GRANITE = (
    "{% for m in messages %}"
    "{{ '<|start_of_role|>' + m.role + '<|end_of_role|>' + m.content + '<|end_of_text|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}"
)

# The newline after an answer stands before the next turn alone.
OLMO2 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% if m.role != 'assistant' or not loop.last %}{{ '\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


_CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_LLAMA3 = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_GEMMA = ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")
_PHI3 = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>")
_GPT_OSS = tuple(f"<|{name}|>" for name in ("start", "end", "message", "channel", "return", "call"))
_R1 = ("<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>")


@cache
def trl_template(name: str) -> str:
    """Return a chat template that TRL installs; an empty one where this TRL does not have it."""
    file = _TRL_TEMPLATES / f"{name}.jinja"
    return file.read_text(encoding="utf-8") if file.exists() else ""


def _chatml(
    template: str, before: str = "", header: str = "<|im_start|>assistant\n", special: tuple[str, ...] = _CHATML
) -> Chat:
    turn = f"{before}{ANSWER}<|im_end|>"
    return Chat(template, "<|im_end|>", special, header, turn, turn)


def _llama3(name: str) -> Chat:
    header = "<|start_header_id|>assistant<|end_header_id|>\n\n"
    turn = f"{ANSWER}<|eot_id|>"
    return Chat(trl_template(name), "<|eot_id|>", _LLAMA3, header, turn, turn, bos="<|begin_of_text|>")


def _gemma(name: str, *, takes_system: bool) -> Chat:
    turn, stops = f"{ANSWER}<end_of_turn>", ("<end_of_turn>",)
    header = "<start_of_turn>model\n"
    return Chat(trl_template(name), "<eos>", _GEMMA, header, turn, turn, stops, "<bos>", takes_system)


def _phi3(name: str) -> Chat:
    turn, stops = f"{ANSWER}<|end|>", ("<|end|>", "<|assistant|>")
    return Chat(trl_template(name), "<|endoftext|>", _PHI3, "<|assistant|>\n", turn, turn, stops)


def _ended_by_eos(
    template: str, eos: str, special: tuple[str, ...], header: str, before: str = "", **options: Any
) -> Chat:
    turn = f"{before}{ANSWER}{eos}"
    return Chat(template, eos, (*special, eos), header, turn, turn, **options)


_REASONING = (*_CHATML, "<think>", "</think>")
_EMPTY = "<think>\n\n</think>\n\n"
_FINAL = f"<|channel|>final<|message|>{ANSWER}"
_OPEN_THINK = "<|im_start|>assistant\n<think>"


class _Chats(dict[str, Chat]):
    """Chats by name; the test that takes one whose template the installed TRL does not have is skipped."""

    def __getitem__(self, name: str) -> Chat:
        chat = super().__getitem__(name)
        if not chat.template:
            pytest.skip(f"TRL {trl.__version__} has no template for {name}")
        return chat


CHATS = _Chats(
    {
        "phi3": _phi3("phi3"),
        "phi3.5": _phi3("phi3_5"),
        "phi4": _chatml(PHI4, header="<|im_start|>assistant<|im_sep|>", special=(*_CHATML, "<|im_sep|>")),
        "llama3": _llama3("llama3"),
        "llama3.1": _llama3("llama3_1"),
        "llama3.2": _llama3("llama3_2"),
        "qwen2.5": _chatml(trl_template("qwen2_5")),
        "qwen3": _chatml(trl_template("qwen3"), _EMPTY, special=_REASONING),
        "qwen3-instruct": _chatml(trl_template("qwen3_instruct_2507")),
        # Its generation prompt opens the reasoning, as Nemotron's does.
        "qwen3.5": _chatml(trl_template("qwen3_5_think"), "\n</think>\n\n", f"{_OPEN_THINK}\n", _REASONING),
        "r1-distill": _ended_by_eos(
            trl_template("deepseek_r1_distill"), "<｜end▁of▁sentence｜>", _R1, "<｜Assistant｜>", bos=_R1[0]
        ),
        "deepseek-v3": _ended_by_eos(
            trl_template("deepseekv3"), "<｜end▁of▁sentence｜>", _R1, "<｜Assistant｜>", bos=_R1[0]
        ),
        "gemma2": _gemma("gemma", takes_system=False),
        "gemma3": _gemma("gemma3", takes_system=True),
        "gemma4": Chat(
            trl_template("gemma4"),
            "<eos>",
            ("<bos>", "<|turn>", "<turn|>", "<|tool_call>", "<tool_call|>"),
            "<|turn>model\n",
            f"{ANSWER}<turn|>",
            f"{ANSWER}<turn|>",
            ("<turn|>",),
            "<bos>",
        ),
        "mistral": _ended_by_eos(MISTRAL, "</s>", ("<s>",), "[/INST]", " ", bos="<s>", takes_system=False),
        "gpt-oss": Chat(
            trl_template("gptoss"),
            "<|return|>",
            _GPT_OSS,
            "<|start|>assistant",
            f"{_FINAL}<|end|>",
            f"{_FINAL}<|return|>",
            ("<|call|>",),
        ),
        "nemotron3": _chatml(trl_template("nemotron_3_nano"), "</think>", _OPEN_THINK, _REASONING),
        "smollm2": _chatml(SMOLLM2),
        "smollm3": _chatml(SMOLLM3, special=_REASONING),
        "granite": _ended_by_eos(
            GRANITE,
            "<|end_of_text|>",
            ("<|start_of_role|>", "<|end_of_role|>"),
            "<|start_of_role|>assistant<|end_of_role|>",
        ),
        "olmo2": _ended_by_eos(OLMO2, "<|endoftext|>", (), "<|assistant|>\n", bos="<|endoftext|>"),
    }
)
"""The templates by the model's name."""
