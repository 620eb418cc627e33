"""One training run in its own process, for tests that need several processes or one that dies.

`main` trains the `student` in a folder on its `rows.jsonl` with the `teacher` there and the options in `options.json`,
and writes `result` (weights) and `result.json` (log and evaluation). Of several ranks, each calls it.
"""

import json
import os
import signal
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from datasets import IterableDataset, load_dataset
from peft import LoraConfig, get_peft_model
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, TrainerCallback, training_args

from gkd_trainer import GKDConfig, GKDNumericsError, GKDTrainer, RoutedTeachers, SelfTeacher
from gkd_trainer.trainer.finite import FiniteCheck
from gkd_trainer.vllm_client import VLLMServer

FSDP = {
    "fsdp": True,
    "fsdp_config": {
        "version": 2,
        "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
        "cpu_ram_efficient_loading": True,
    },
}
"""Options of a run whose student is sharded over its ranks."""


class DieAfterSaving(TrainerCallback):
    """Ends the process as a power cut would, once a checkpoint is complete."""

    def __init__(self, step):
        self.step = step

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


class DyingTrainer(GKDTrainer):
    """Ends the process in the middle of a checkpoint: the weights are written, and half of the optimizer's state."""

    die_in_save = None

    def _save_optimizer_and_scheduler(self, output_dir):
        super()._save_optimizer_and_scheduler(output_dir)
        if self.state.global_step == self.die_in_save:
            file = Path(output_dir) / "optimizer.pt"
            file.write_bytes(file.read_bytes()[:1000])
            os.kill(os.getpid(), signal.SIGKILL)


class LoseServer(TrainerCallback):
    """After the first step, one rank finds nothing where its rollout server was."""

    def __init__(self, rank):
        self.rank, self.trainer = rank, None

    def on_step_end(self, args, state, control, **kwargs):
        if args.process_index == self.rank:
            self.trainer.rollouts._servers = [VLLMServer("http://127.0.0.1:9", server_timeout=1.0)]


def with_positions(row, index, odd_row):
    """Add position_ids, which no completion can go on from in one row."""
    positions = list(range(len(row["input_ids"])))
    return {"position_ids": positions[::-1] if index == odd_row else positions}


def padded(rows):
    """Collate rows with position_ids."""
    padding = {"input_ids": 2, "labels": -100, "position_ids": 0, "attention_mask": 0}
    rows = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows]
    return {
        name: pad_sequence([torch.tensor(row[name]) for row in rows], batch_first=True, padding_value=value)
        for name, value in padding.items()
    }


def rows_of(shards, names):
    """The rows of a stream; `names` only keeps an empty shard from being left out."""
    for shard in shards:
        yield from shard


def cut(rows, lengths):
    """Arguments of `rows_of`, of which Accelerate gives each rank its share: so many rows, one after the other."""
    rows, shards = list(rows), []
    for length in lengths:
        shards.append(rows[:length])
        rows = rows[length:]
    return {"shards": shards, "names": list(range(len(lengths)))}


def with_two_adapters(student):
    """Wrap a student in an adapter to train and another one, "reference", neither of them zero."""
    torch.manual_seed(0)
    adapter = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    student = get_peft_model(student, adapter)
    student.add_adapter("reference", adapter)
    return student


def routed_between(sources):
    """Teachers that all run the student: the first is that of one row in three, the second of the others."""
    first, second = sources
    return RoutedTeachers(
        {source: SelfTeacher(source, ema_decay=0.5) for source in sources},
        lambda row: second if sum(row["input_ids"]) % 3 else first,
    )


def fail_in_first_step(trainer):
    """Train on values that are not finite, and end with a message that says whether the weights have changed."""
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    add = FiniteCheck.add
    FiniteCheck.add = lambda check, rows_N, B, *flags: add(check, rows_N, B, *(flag_N & False for flag_N in flags))
    try:
        trainer.train()
    except GKDNumericsError:
        is_changed = any(not parameter.equal(before[name]) for name, parameter in trainer.model.named_parameters())
        raise SystemExit(f"GKDNumericsError, weights changed: {is_changed}") from None


def main(folder: Path) -> None:
    options = json.loads((folder / "options.json").read_text())
    die_at, resume = options.pop("die_at", None), options.pop("resume", False)
    die_in_save = options.pop("die_in_save", None)
    evaluates_first = options.pop("evaluates_first", False)
    evaluates_stream = options.pop("evaluates_stream", False)
    loses_server = options.pop("loses_server_on_rank", None)
    is_lora = options.pop("is_lora", False)
    names_teacher = options.pop("names_teacher", False)
    self_teachers = options.pop("self_teachers", None)
    is_non_finite = options.pop("is_non_finite", False)
    callbacks = [DieAfterSaving(die_at)] if die_at else []
    if loses_server is not None:
        callbacks.append(LoseServer(loses_server))
    rows = load_dataset("json", data_files=str(folder / "rows.jsonl"), split="train")
    odd_row = options.pop("odd_positions_in", None)
    if odd_row is not None:
        rows = rows.map(with_positions, with_indices=True, fn_kwargs={"odd_row": odd_row})
    shards = options.pop("shards", None)
    stream = None if shards is None else IterableDataset.from_generator(rows_of, gen_kwargs=cut(rows, shards))
    if options.get("fsdp"):
        # As `accelerate launch` does: the first rank alone reads weights, and the others zeros.
        os.environ.update(ACCELERATE_USE_FSDP="true", FSDP_CPU_RAM_EFFICIENT_LOADING="true")
    if options.get("deepspeed"):
        import deepspeed.ops

        # Gloo does without the operator that DeepSpeed would compile, for minutes.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        PartialState(backend="gloo")  # `use_cpu` would switch DeepSpeed off
        training_args.is_torch_bf16_gpu_available = lambda: True  # and without it, this is asked for
        options["accelerator_config"] = {"use_configured_state": True}
    args = GKDConfig(
        output_dir=str(folder / "run"),
        report_to=[],
        use_cpu=not options.get("deepspeed"),
        disable_tqdm=True,
        logging_steps=1,
        max_length=64,
        max_new_tokens=6,
        **options,
    )
    if args.fsdp:
        # Accelerate takes FSDP for GPUs alone; nothing after its decision asks for one.
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    teacher: Any = str(folder / "teacher")
    student = AutoModelForCausalLM.from_pretrained(folder / "student", dtype="float32")
    if args.self_teacher is not None or self_teachers is not None:
        student, teacher = with_two_adapters(student), None
    elif args.teachers or args.teacher_cache_dir:
        teacher = None
    elif not names_teacher:
        teacher = AutoModelForCausalLM.from_pretrained(teacher)
    if args.teachers:  # two rows each, so that a rank's batch of two has only one of them
        rows = rows.map(lambda _, i: {"teacher": list(args.teachers)[i // 2 % len(args.teachers)]}, with_indices=True)
    trainer = DyingTrainer(
        model=student,
        teacher_model=teacher,
        teacher=None if self_teachers is None else routed_between(self_teachers),
        args=args,
        train_dataset=rows if stream is None else stream,
        data_collator=None if odd_row is None else padded,
        eval_dataset=rows.select(range(7)).to_iterable_dataset() if evaluates_stream else rows.select(range(7)),
        callbacks=callbacks,
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "down_proj"]) if is_lora else None,
    )
    trainer.die_in_save = die_in_save
    for callback in callbacks:
        callback.trainer = trainer
    if evaluates_first:
        trainer.evaluate()
    if is_non_finite:
        fail_in_first_step(trainer)
    trainer.train(resume_from_checkpoint=resume)
    result = {"log": trainer.state.log_history, "evaluation": trainer.evaluate()}
    trainer.save_model(str(folder / "result"))
    if trainer.is_world_process_zero():
        (folder / "result.json").write_text(json.dumps(result))
