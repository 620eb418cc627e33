"""The speed of rollouts, the cost of a weight sync, and the cost of a teacher behind a server.

    python -m benchmarks.rollouts --pair .cache/smollm2

prints four tables: tokens per second of vLLM in process and of `transformers.generate`; seconds per sync; seconds per
on-policy step, compared with TRL's GKDTrainer; and seconds to score 32 sequences of 200 tokens by a server, compared
with a forward of the same model. Both sides of each take turns in this run, on one pinned core. `--parts` selects
tables.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from benchmarks.pair import (
    ON_POLICY,
    announce,
    conversations,
    in_turns,
    load,
    our_trainer,
    parser,
    pin,
    ratio,
    seconds_of,
    table,
    tokenizer_of,
    trl_trainer,
)

PARTS = ("generate", "sync", "steps", "teacher")
PROMPTS, NEW_TOKENS = 16, 128
SEQUENCES, SEQUENCE_LENGTH, TOP_K = 32, 200, 20
STEP = {**ON_POLICY, "beta": 1.0, "max_steps": 1, "bf16": False}


def main() -> None:
    """Measure the parts that were asked for."""
    options = parse_options()
    pin(options)
    announce(options)
    for part in options.parts:
        {"generate": generate, "sync": sync, "steps": steps, "teacher": teacher}[part](options)
        gc.collect()


def generate(options: argparse.Namespace) -> None:
    """Tokens per second of vLLM in process and of transformers, for 16 prompts with 128 new tokens each."""
    from gkd_trainer.rollouts import HFRollouts, VLLMColocateRollouts
    from gkd_trainer.types import Sampling

    prompts = prompt_ids(options, PROMPTS)
    rows = []
    for dtype in ("float32", "bfloat16"):
        student = load(options.pair / "student", dtype)
        hf = HFRollouts([], pad_token_id=2, vocab_size=student.config.vocab_size)
        vllm = VLLMColocateRollouts(
            student,
            [],
            student.config.vocab_size,
            max_model_length=512,
            engine_kwargs={"enforce_eager": options.eager},
        )
        sampling, seeds = Sampling(NEW_TOKENS), range(PROMPTS)
        calls: dict[str, Callable[[], float]] = {}
        for name, engine in (("transformers.generate", hf), ("vLLM colocate", vllm)):
            engine.sync(student)
            calls[name] = seconds_of(partial(engine.generate, prompts, sampling, seeds))
        seconds = in_turns(calls, options.repeats)
        for name, times in seconds.items():
            rows.append([name, dtype, f"{PROMPTS * NEW_TOKENS / statistics.median(times):.0f}"])
        vllm.close()
        rows[-1].append(f"{ratio(seconds['transformers.generate'], seconds['vLLM colocate']):.2f}")
    table(f"{PROMPTS} prompts, {NEW_TOKENS} new tokens", ["engine", "dtype", "tokens/s", "vLLM faster by"], rows)


def sync(options: argparse.Namespace) -> None:
    """Seconds to pass 135M parameters to an engine in process and to a server, in float32."""
    from gkd_trainer.rollouts import VLLMColocateRollouts, VLLMServerRollouts

    model = load(options.pair / "teacher", "float32")
    size = model.config.vocab_size
    arguments = ("--hf-overrides", json.dumps({"tie_word_embeddings": False}))
    with vllm_server(options, options.pair / "teacher", "float32", *arguments) as url:
        colocate = VLLMColocateRollouts(model, [2], size, max_model_length=512, engine_kwargs={"enforce_eager": True})
        server = VLLMServerRollouts(url, [2], size)
        calls = {
            "in process": seconds_of(lambda: colocate.sync(model)),
            "through a server": seconds_of(lambda: server.sync(model)),
        }
        seconds = in_turns(calls, 2 * options.repeats)
    rows = [[name, f"{statistics.median(times):.2f}", f"{min(times):.2f}"] for name, times in seconds.items()]
    count = sum(parameter.numel() for parameter in model.parameters())
    table(f"Sync of {count / 1e6:.0f}M parameters, float32", ["engine", "s, median", "s, minimum"], rows)


def steps(options: argparse.Namespace) -> None:
    """Seconds per on-policy step in float32: TRL's, and ours with either engine and either teacher."""
    from gkd_trainer.teachers import VLLMServerTeacher

    engine = {"use_vllm": True, "vllm_max_model_length": 640, "vllm_engine_kwargs": {"enforce_eager": options.eager}}
    trainers = {
        "TRL GKDTrainer": trl_trainer(options, STEP),
        "ours, transformers.generate": our_trainer(options, STEP),
        "ours, vLLM colocate": our_trainer(options, {**STEP, **engine}),
    }
    # A process has one engine: both trainers sync it before they generate.
    rollouts = trainers["ours, vLLM colocate"].rollouts
    with vllm_server(options, options.pair / "teacher", "float32") as url:
        teacher = VLLMServerTeacher(url, top_k=TOP_K)
        trainers[f"the same, served top-{TOP_K} teacher"] = our_trainer(
            options, STEP, teacher=teacher, rollouts=rollouts
        )
        # One step per call, from the current weights and on the same prompts; in turns, so that noise hits all alike.
        calls = {name: seconds_of(trainer.train) for name, trainer in trainers.items()}
        seconds = in_turns(calls, options.repeats)
    trl = seconds["TRL GKDTrainer"]
    rows = []
    for name, times in seconds.items():
        logged = next(entry for entry in reversed(trainers[name].state.log_history) if "loss" in entry)
        split = [
            f"{logged[f'seconds_{part}']:.1f}" if f"seconds_{part}" in logged else "—"
            for part in ("rollout", "sync", "teacher", "student")
        ]
        step = statistics.median(times)
        share = f"{logged['seconds_teacher'] / times[-1]:.0%}" if "seconds_teacher" in logged else "—"
        rows.append([name, f"{step:.1f}", f"{ratio(trl, times):.2f}", *split, share])
    header = [
        "trainer",
        "s per step",
        "faster than TRL by",
        "rollout",
        "of which sync",
        "teacher",
        "student",
        "teacher's share",
    ]
    table("On-policy steps: 2 sequences × accumulation 4, 96 new tokens, float32", header, rows)


def teacher(options: argparse.Namespace) -> None:
    """Seconds to score sequences by a forward, and by a server that does or does not turn candidates into text."""
    import torch

    from gkd_trainer.teachers import VLLMServerTeacher
    from gkd_trainer.types import TokenBatch

    ids_BL = torch.tensor(token_rows(options, SEQUENCES, SEQUENCE_LENGTH))
    labels_BL = ids_BL.clone()
    labels_BL[:, 0] = -100
    inputs = {"input_ids": ids_BL, "attention_mask": torch.ones_like(ids_BL)}
    batch = TokenBatch(inputs, labels_BL, torch.zeros(SEQUENCES, dtype=torch.bool))
    rows = []
    for dtype in ("float32", "bfloat16"):
        model = load(options.pair / "teacher", dtype)
        for kind, arguments in (("ordinary", ()), ("--skip-tokenizer-init", ("--skip-tokenizer-init",))):
            with vllm_server(options, options.pair / "teacher", dtype, *arguments) as url, torch.no_grad():
                scorer = VLLMServerTeacher(url, top_k=TOP_K)
                scorer.prepare(torch.device("cpu"), tokenizer_of(options))
                calls = {
                    "forward": seconds_of(partial(model, **inputs, use_cache=False)),
                    "server": seconds_of(partial(scorer.score, batch)),
                }
                seconds = in_turns(calls, options.repeats)
            forward, server = seconds["forward"], seconds["server"]
            figures = [f"{statistics.median(times):.2f}" for times in (forward, server)]
            rows.append([kind, dtype, *figures, f"{ratio(server, forward):.2f}"])
    title = f"Scores of {SEQUENCES} sequences of {SEQUENCE_LENGTH} tokens, top {TOP_K}"
    table(title, ["server", "dtype", "transformers forward, s", "server, s", "server over forward"], rows)


def prompt_ids(options: argparse.Namespace, count: int) -> list[list[int]]:
    """Return the token ids of `count` prompts."""
    tokenizer = tokenizer_of(options)
    rows = conversations(options)["messages"][:count]
    return [
        tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=True)["input_ids"]
        for messages in rows
    ]


def token_rows(options: argparse.Namespace, count: int, length: int) -> list[list[int]]:
    """Return `count` rows of real text, of `length` tokens each."""
    tokenizer = tokenizer_of(options)
    text = "\n".join(message["content"] for messages in conversations(options)["messages"] for message in messages)
    ids = tokenizer(text)["input_ids"]
    while len(ids) < count * length:
        ids = ids + ids
    return [ids[start : start + length] for start in range(0, count * length, length)]


@contextmanager
def vllm_server(options: argparse.Namespace, model: Path, dtype: str, *arguments: str) -> Iterator[str]:
    """Serve a model on the loopback interface and the same cores, and stop it at the end."""
    import httpx

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    fixed = ["--host", "127.0.0.1", "--port", str(port), "--max-model-len", "640", "--max-num-seqs", "32"]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--dtype", dtype]
    environment = {
        **os.environ,
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    process = subprocess.Popen(
        [*command, *fixed, "--enforce-eager", *arguments],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            time.sleep(0.5)
            try:
                if httpx.get(f"{url}/health", trust_env=False).is_success:
                    break
            except httpx.TransportError:
                if process.poll() is not None:
                    raise SystemExit("vLLM did not start: run its command by hand to see why") from None
        yield url
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def parse_options() -> argparse.Namespace:
    """Return the options of the command line."""
    options = parser(__doc__, PARTS)
    options.add_argument("--eager", action="store_true", help="vLLM without torch.compile, which starts faster")
    return options.parse_args()


if __name__ == "__main__":
    main()
