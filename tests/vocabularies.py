"""Small tokenizers of two kinds, trained here: byte-level, and SentencePiece-like with byte fallback."""

import copy
import json

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

GEMMA_LIKE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' }}"
    "{{ message['content'] | trim }}{{ '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)

TEXTS = [
    "What is the capital of France? The capital of France is Paris.",
    "hello there, how are you today? I am fine, thank you.",
    "Natalia sold 48 clips in April, and half as many in May: 48 + 24 = 72.",
    "def add(a, b):\n    return a + b\n\n\nfor i in range(10):\n\tprint(i)\n",
    "one two three four five six seven eight nine ten eleven twelve",
    "naïve café, Ångström; 你好，世界。こんにちは",
]

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SPECIAL = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"]


def sentencepiece_backend(vocab_size=500, *, prepends_space=False, texts=TEXTS):
    """A BPE tokenizer like Gemma's: ▁ for a space, <0xNN> for the bytes of a character without a token."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True))
    replace = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if prepends_space else replace
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prepends_space else steps)
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[*SPECIAL, *BYTES], show_progress=False)
    tokenizer.train_from_iterator(texts * 4, trainer)
    return _with_byte_tokens(tokenizer)


def unigram_backend(vocab_size=420):
    """A Unigram tokenizer like T5's, with byte fallback: its pre-tokenizer puts a ▁ before a text."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])
    special = [*SPECIAL, "<unk>", *BYTES]
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 4, trainer)
    return _with_byte_tokens(tokenizer)


def sentencepiece_like(backend, chat_template=GEMMA_LIKE, *, has_bos=True):
    """A tokenizer with Gemma's template, pad, and by default its bos before a text."""
    backend = copy.deepcopy(backend)
    if has_bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", backend.token_to_id("<bos>"))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        extra_special_tokens=["<start_of_turn>", "<end_of_turn>"],
        chat_template=chat_template,
    )


def permuted(tokenizer, new_ids):
    """The same tokenizer with other ids: `new_ids[i]` for what was i."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    model = state["model"]
    model["vocab"] = {token: new_ids[token_id] for token, token_id in model["vocab"].items()}
    for added in state["added_tokens"]:
        added["id"] = new_ids[added["id"]]
    state["added_tokens"].sort(key=lambda added: added["id"])
    state["post_processor"] = None
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        **{name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "pad_token", "chat_template")},
    )


def _with_byte_tokens(tokenizer):
    """Make the trained byte tokens a fallback: the trainer takes them only as special tokens."""
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [added for added in state["added_tokens"] if added["content"] not in BYTES]
    state["model"]["byte_fallback"] = True
    return Tokenizer.from_str(json.dumps(state))
