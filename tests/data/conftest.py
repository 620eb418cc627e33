"""Small tokenizers, and the default rules of most tests."""

import dataclasses

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, trainers
from transformers import PreTrainedTokenizerFast

from gkd_trainer.data import RowRules

CORPUS = [
    "What is the capital of France? The capital of France is Paris.",
    "hello there, how are you today? I am fine, thank you.",
    "system\nuser\nassistant\ntool\n\n\nYou are helpful.\n\n\n\nsystem\n\n\n",
    "one two three four five six seven eight nine ten",
]


@pytest.fixture
def space_adding():
    """A tokenizer that puts a space before every text that it is given, like older Llamas'."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=False, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator([text.replace("\n", " ") + "\n[USER][BOT]:" for text in CORPUS], trainer)
    tokenizer.add_special_tokens([AddedToken("</s>", normalized=False, special=True)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=(
            "{% for m in messages %}{% if m.role == 'user' %}{{ '[USER]: ' + m.content + ' [BOT]:' }}"
            "{% else %}{{ ' ' + m.content + '</s>' }}{% endif %}{% endfor %}"
        ),
    )


@pytest.fixture
def rules():
    """Make rules: off-policy and unbounded, but for the changes given."""
    base = RowRules(
        stop_ids=frozenset(),
        max_length=None,
        max_new_tokens=8,
        train_on="all_turns",
        is_generating=False,
        needs_completion=True,
        needs_prompt=False,
    )
    return lambda **changes: dataclasses.replace(base, **changes)


@pytest.fixture
def on_policy(rules):
    """Make rules of a run that generates every completion (lmbda = 1), but for the changes given."""
    return lambda **changes: rules(
        **{"is_generating": True, "needs_completion": False, "needs_prompt": True, **changes}
    )
