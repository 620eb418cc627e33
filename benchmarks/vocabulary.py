"""How much of GSM8K can be compared with a teacher of another tokenizer, and what aligning costs.

    python -m benchmarks.vocabulary --data FOLDER [--teacher FOLDER]

FOLDER has GSM8K's train.jsonl and test.jsonl. The student is SmolLM2 (examples/smollm2.py). `--teacher` is a folder
with another tokenizer; by default a SentencePiece-like one with byte fallback is trained on the training split. It
prints the share of the answers' tokens that begin where one of the teacher's does, the student's probability of the
tokens that match there, how much is compared if the next byte is where that is below 0.9, and the processor's time per
token. The teacher's own probabilities decide in training, but a trained tokenizer has no model.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from gkd_trainer.teachers.alignment import Aligner, matched_ids

ROOT = Path(__file__).parents[1]
SPECIAL = ["<pad>", "<eos>", "<bos>"]
LEAST = 0.9  # teacher_min_matched_mass by default


def main() -> None:
    """Measure, and print one line for each figure."""
    options = parse_args()
    student = AutoTokenizer.from_pretrained(options.student)
    if options.teacher is None:
        teacher = trained(texts_of(options.data / "train.jsonl"), options.vocabulary)
    else:
        teacher = AutoTokenizer.from_pretrained(options.teacher)
    began = time.process_time()
    aligner = Aligner(student, teacher)
    pairs = matched_ids(aligner)
    print(
        f"{len(student)} tokens of the student, {len(teacher)} of the teacher, {len(pairs)} match by bytes "
        f"(found in {time.process_time() - began:.1f} s)"
    )
    rows = [json.loads(line) for line in (options.data / "test.jsonl").read_text().splitlines()]
    encoded = [encoded_row(student, row) for row in rows]
    measure_positions(aligner, encoded)
    measure_mass(options, aligner, pairs, encoded[: options.mass_rows])


def measure_positions(aligner: Aligner, encoded: list[tuple[list[int], int]]) -> None:
    """Print the share of positions that are compared, and the seconds per token, in all and without tokenising."""
    shared = sum(int((aligner.aligned(ids, [start]).student_A >= start).sum()) for ids, start in encoded)
    positions = sum(len(ids) - start for ids, start in encoded)
    print(f"{shared / positions:.2%} of {positions} answer tokens begin where one of the teacher's does")
    timed = encoded[:200]
    tokens = sum(len(ids) for ids, _ in timed)
    texts = [aligner.student.of(part).decode() for ids, start in timed for part in (ids[:start], ids[start:-1])]
    in_all = fastest(lambda: [aligner.aligned(ids, [start]) for ids, start in timed]) / tokens
    tokenising = fastest(lambda: [aligner.teacher.encoded(text) for text in texts]) / tokens
    print(f"{1e6 * in_all:.2f} µs per token, of which the teacher's tokenizer takes {1e6 * tokenising:.2f}")


def fastest(run: Callable[[], object], turns: int = 9) -> float:
    """Return the processor's seconds of the fastest of several turns: others on the machine slow some down."""
    seconds = []
    for _ in range(turns):
        began = time.process_time()
        run()
        seconds.append(time.process_time() - began)
    return min(seconds)


def measure_mass(
    options: argparse.Namespace, aligner: Aligner, pairs: list[tuple[int, int]], encoded: list[tuple[list[int], int]]
) -> None:
    """Print the mean probability that the student gives to matched tokens at the positions that are compared.

    And how much of it is compared if the next byte, which leaves nothing out, is where less than LEAST is on them.
    """
    if not encoded:
        return
    model: Any = AutoModelForCausalLM.from_pretrained(options.student, dtype=torch.float32).eval()
    matched = torch.tensor([mine for mine, _ in pairs])
    total, with_bytes, count = 0.0, 0.0, 0
    for ids, start in encoded:
        row = aligner.aligned(ids, [start])
        columns = torch.from_numpy(row.student_A[row.student_A >= start]) - 1
        with torch.no_grad():
            p_LV = model(input_ids=torch.tensor([ids])).logits[0, columns].softmax(dim=1)
        mass_L = p_LV[:, matched].sum(dim=1)
        total += float(mass_L.sum())
        with_bytes += float(torch.where(mass_L < LEAST, 1.0, mass_L).sum())
        count += len(columns)
    print(f"{total / count:.4f} of the student's probability is on tokens that match, over {count} positions")
    print(f"{with_bytes / count:.4f} is compared, with the next byte where less than {LEAST} is on tokens that match")


def encoded_row(student: Any, row: dict[str, str]) -> tuple[list[int], int]:
    """Return the tokens of a question and its answer, and where the answer begins."""
    messages = [{"role": "user", "content": row["question"]}]
    prompt = student.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    prompt_ids = student(prompt, add_special_tokens=False)["input_ids"]
    answer_ids = student(row["answer"], add_special_tokens=False)["input_ids"]
    return [*prompt_ids, *answer_ids, student.eos_token_id], len(prompt_ids)


def trained(texts: list[str], vocabulary: int) -> Any:
    """Train a BPE tokenizer like Gemma's: ▁ for a space, single digits, <0xNN> for what has no token."""
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    backend = Tokenizer(models.BPE(byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    # As larger corpora teach it: contractions, words, single digits, and runs of one sign or of line breaks.
    parts = Regex(r"'(?:s|t|re|ve|m|ll|d)|▁?\p{L}+|\p{N}|\n+|▁?([^\p{L}\p{N}\s▁])\1*|▁+")
    backend.pre_tokenizer = pre_tokenizers.Split(parts, "isolated")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=SPECIAL + byte_tokens, show_progress=False)
    backend.train_from_iterator(texts, trainer)
    state = json.loads(backend.to_str())  # the trainer takes byte tokens only as special tokens
    state["added_tokens"] = [added for added in state["added_tokens"] if added["content"] in SPECIAL]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )


def texts_of(file: Path) -> list[str]:
    """Return the questions and answers of a split."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return [row[name] for row in rows for name in ("question", "answer")]


def parse_args() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder with GSM8K's train.jsonl and test.jsonl")
    parser.add_argument("--student", type=Path, default=ROOT / ".cache" / "smollm2" / "teacher")
    parser.add_argument("--teacher", type=Path, help="a folder with another tokenizer")
    parser.add_argument("--vocabulary", type=int, default=32_000, help="the size of the tokenizer that is trained")
    parser.add_argument("--mass_rows", type=int, default=20, help="how many test rows the student scores")
    return parser.parse_args()


if __name__ == "__main__":
    main()
