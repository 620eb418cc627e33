"""A micro-batch is queued on the device without waiting for it, whatever its batch, teacher and loss.

On a meta tensor everything that would wait for a GPU raises, since there is nothing to read: its values, how many of
them are not zero, its copy on the CPU. So the window is prepared on the CPU, as in a run, and its micro-batches are
computed on the meta device, by the trainer's own hooks. Copies to it from the host's ordinary memory, for which CUDA
waits too, are looked for.
"""

import sys
from collections import Counter
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import masking_utils

from gkd_trainer import (
    CachedTeacher,
    ContextTeacher,
    FrozenTeacher,
    GKDTrainer,
    OtherTokenizerTeacher,
    RoutedTeachers,
    SelfTeacher,
    WeightedTeachers,
    cache_predictions,
)
from gkd_trainer.errors import GKDTeacherError
from gkd_trainer.rollouts import HFRollouts
from gkd_trainer.signals import MODES
from gkd_trainer.teachers.base import all_teachers
from gkd_trainer.trainer.placement import Placement
from tests.copies import NoOrdinaryCopies
from tests.vocabularies import sentencepiece_backend, sentencepiece_like

META = torch.device("meta")


@pytest.fixture(autouse=True)
def autocast_of_meta(monkeypatch):
    """Torch has no autocast for meta tensors, even to switch it off."""
    autocast = torch.autocast
    monkeypatch.setattr(
        torch, "autocast", lambda kind, **options: autocast("cpu" if kind == "meta" else kind, **options)
    )


@pytest.fixture(autouse=True)
def queued_masks(monkeypatch):
    """Have eager attention make its masks on the device: transformers copies a zero to it, and waits."""

    def additive_mask(*args, dtype=torch.float32, **options):
        options.pop("allow_is_causal_skip", None)
        mask = masking_utils.sdpa_mask(*args, allow_is_causal_skip=False, **options)
        if mask is None:
            return None
        return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)

    monkeypatch.setitem(masking_utils.ALL_MASK_ATTENTION_FUNCTIONS, "eager", additive_mask)


@pytest.fixture
def student(tiny_model):
    """Make a student whose attention does not read the mask, as transformers' SDPA does."""
    return lambda family="llama", **options: tiny_model(family, attn_implementation="eager", **options)


@pytest.fixture
def frozen(student, byte_level):
    return lambda seed=1, top_k=None, **options: FrozenTeacher(
        student(hidden=48, seed=seed, **options), byte_level(), top_k=top_k
    )


def window(trainer, size=1):
    """Return the micro-batches of the trainer's next window on the meta device, and their number of tokens."""
    loader = trainer.get_train_dataloader()
    trainer.callback_handler.train_dataloader = loader
    trainer.state.max_steps, trainer._train_batch_size = 1, 4
    trainer.current_gradient_accumulation_steps = size
    trainer._placement = Placement(META)
    return trainer.get_batch_samples(iter(loader), size, META)


def on_meta(trainer):
    """Move both models of a trainer to the meta device, with what else teachers have there."""
    trainer.model.to(META)
    for each in all_teachers(trainer.teacher):
        if each.model is not None:
            each.model.to(META)
        if isinstance(each, OtherTokenizerTeacher):
            each._prepared = replace(each._prepared, mapping=each._prepared.mapping.to(META))
        if isinstance(each, CachedTeacher) and each._head is not None:
            each._head = replace(each._head, weight_VH=each._head.weight_VH.to(META))


def step(trainer, size=1):
    """Queue forward and backward of the micro-batches of a window, and return their losses."""
    batches, count = window(trainer, size)
    on_meta(trainer)
    trainer.model.train()
    losses = []
    with NoOrdinaryCopies():
        for batch in batches:
            loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=count)
            loss.backward()
            losses.append(loss)
    weights = [weight for weight in trainer.model.parameters() if weight.requires_grad]
    assert any(weight.grad is not None for weight in weights)
    assert all(loss.device == META for loss in losses)
    return losses


def make_rows(extra=None, count=8):
    """Rows of different lengths, with further columns by their index."""
    rows = []
    for index in range(count):
        ids = [4 + (7 * index + place) % 300 for place in range(6 + index)]
        labels = [-100, -100, -100, *ids[3:]]
        rows.append({"input_ids": ids, "labels": labels, **(extra(index) if extra is not None else {})})
    return Dataset.from_list(rows)


class Telling(HFRollouts):
    """An engine that tells log-probs of its tokens, as one with numerics of its own does."""

    def __init__(self):
        super().__init__(stop_ids=[2])

    def generate(self, *args, **kwargs):
        found = super().generate(*args, **kwargs)
        return [replace(completion, log_probs=[-5.0] * len(completion.token_ids)) for completion in found]


@pytest.mark.parametrize("lmbda", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("size", [1, 2])
def test_a_micro_batch_of_data_or_rollouts_waits_for_nothing(make_trainer, student, frozen, lmbda, size):
    trainer = make_trainer(trainer_args={"model": student(), "teacher": frozen()}, lmbda=lmbda)
    assert len(step(trainer, size)) == size


@pytest.mark.parametrize(
    "options",
    [
        {"beta": 0.0},
        {"beta": 1.0, "loss_temperature": 2.0},
        {"ce_weight": 0.25},
        {"divergence": "total_variation"},
        {"divergence_scale": "continuous"},
        {"loss_workspace_mb": 1},
        {"report_samples": 0, "logging_nan_inf_filter": False},
    ],
    ids=str,
)
def test_no_loss_waits(make_trainer, student, frozen, options):
    step(make_trainer(trainer_args={"model": student(), "teacher": frozen()}, lmbda=0.5, **options))


@pytest.mark.parametrize("options", [{}, {"loss_temperature": 2.0}, {"ce_weight": 0.25}], ids=str)
def test_the_comparison_with_the_rollout_engine_does_not_wait(make_trainer, student, frozen, options):
    arguments = {"model": student(), "teacher": frozen(), "rollouts": Telling()}
    step(make_trainer(trainer_args=arguments, lmbda=0.5, **options))


@pytest.mark.parametrize("family", ["gemma2", "phi", "cohere", "granite", "qwen2"])
def test_no_head_waits(make_trainer, student, frozen, family):
    step(make_trainer(trainer_args={"model": student(family), "teacher": frozen(family=family)}))


def test_a_student_with_full_logits_does_not_wait(make_trainer, student, frozen):
    adapter = LoraConfig(r=2, target_modules=["q_proj", "lm_head"])
    step(make_trainer(trainer_args={"model": get_peft_model(student(), adapter), "teacher": frozen()}))


@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
def test_a_top_k_teacher_does_not_wait(make_trainer, student, frozen, tail):
    step(make_trainer(trainer_args={"model": student(), "teacher": frozen(top_k=5)}, teacher_tail=tail, ce_weight=0.1))


def test_packed_rows_do_not_wait(make_trainer, student, frozen):
    def collate(rows):
        ids = [token_id for row in rows for token_id in row["input_ids"]]
        labels = [label for row in rows for label in row["labels"]]
        places = [place for row in rows for place in range(len(row["input_ids"]))]
        names = {"input_ids": ids, "labels": labels, "position_ids": places, "attention_mask": [1] * len(ids)}
        return {name: torch.tensor([values]) for name, values in names.items()}

    arguments = {"model": student(), "teacher": frozen(), "data_collator": collate, "train_dataset": make_rows()}
    step(make_trainer(trainer_args=arguments))


@pytest.mark.parametrize("lmbda", [0.0, 1.0])
def test_an_encoder_decoder_does_not_wait(make_trainer, tiny_encoder_decoder, byte_level, lmbda, monkeypatch):
    # Transformers looks for padding in the encoder's mask.
    monkeypatch.setattr(masking_utils, "_ignore_bidirectional_mask_sdpa", lambda *args, **kwargs: False)
    pair = (tiny_encoder_decoder("bart", seed=seed, attn_implementation="eager") for seed in (0, 1))
    model, teacher = pair
    arguments = {"model": model, "teacher": FrozenTeacher(teacher, byte_level()), "train_dataset": make_rows()}
    step(make_trainer(trainer_args=arguments, lmbda=lmbda))


@pytest.mark.parametrize("routes", [lambda index: index % 2, lambda index: 0], ids=["both", "one without samples"])
def test_routed_teachers_do_not_wait(make_trainer, student, frozen, routes):
    teacher = RoutedTeachers({"first": frozen(1), "second": frozen(2, top_k=4)})
    rows = make_rows(lambda index: {"teacher": ["first", "second"][routes(index)]})
    step(make_trainer(trainer_args={"model": student(), "teacher": teacher, "train_dataset": rows}, lmbda=0.5))


def test_summed_teachers_do_not_wait(make_trainer, student, frozen):
    teacher = WeightedTeachers({"first": frozen(1), "second": frozen(2)}, {"first": 1.0, "second": 2.0})
    step(make_trainer(trainer_args={"model": student(), "teacher": teacher}))


@pytest.mark.parametrize("source", ["base", "ema"])
def test_a_student_that_teaches_itself_does_not_wait(make_trainer, student, source):
    model = get_peft_model(student(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    step(make_trainer(trainer_args={"model": model, "teacher": SelfTeacher(source)}))


def test_prompts_of_the_teacher_s_own_do_not_wait(make_trainer, student, frozen):
    rows = make_rows(lambda index: {"teacher_prompt_ids": list(range(5, 5 + index % 3))})
    step(make_trainer(trainer_args={"model": student(), "teacher": frozen(), "train_dataset": rows}, lmbda=0.5))


def test_prompts_made_for_completions_do_not_wait(make_trainer, student, frozen):
    rows = make_rows(lambda index: {"row_key": index})
    teacher = ContextTeacher(frozen(), lambda row, completion: f"hello {completion}", rows)
    step(make_trainer(trainer_args={"model": student(), "teacher": teacher, "train_dataset": rows}, lmbda=0.5))


@pytest.mark.parametrize("kind", ["hidden", "topk"])
def test_cached_teachers_do_not_wait(make_trainer, student, frozen, config, byte_level, tmp_path, kind):
    rows = make_rows()
    teacher = frozen(top_k=5 if kind == "topk" else None)
    folder = tmp_path / "cache"
    cache_predictions(teacher, rows, folder, config(), processing_class=byte_level(), student=student(), kind=kind)
    cached = CachedTeacher(folder)
    step(make_trainer(trainer_args={"model": student(), "teacher": cached, "train_dataset": rows}))


@pytest.mark.parametrize("mode", MODES)
def test_a_teacher_with_another_tokenizer_does_not_wait(make_trainer, student, mode):
    other = sentencepiece_like(sentencepiece_backend())
    teacher = OtherTokenizerTeacher(FrozenTeacher(student(hidden=48, vocab=len(other), seed=1), other), mode=mode)
    rows = Dataset.from_list([{"text": f"Add {index} and 24: one two three."} for index in range(8)])
    arguments = {"model": student(), "teacher": teacher, "train_dataset": rows}
    trainer = make_trainer(trainer_args=arguments, lmbda=0.5, max_length=256)
    step(trainer)


def test_a_batch_that_was_changed_after_its_placement_is_read_again(make_trainer, student, frozen):
    trainer = make_trainer(trainer_args={"model": student(), "teacher": frozen()})
    [batch], count = window(trainer)
    on_meta(trainer)
    changed = {**batch, "labels": batch["labels"].clone()}
    with pytest.raises(GKDTeacherError, match="Cannot copy out of meta tensor"):
        trainer.compute_loss(trainer.model, changed, num_items_in_batch=count)
    trainer.compute_loss(trainer.model, batch, num_items_in_batch=count)
    batch["labels"][0, 0] = -100
    with pytest.raises(GKDTeacherError, match="Cannot copy out of meta tensor"):
        trainer.compute_loss(trainer.model, batch, num_items_in_batch=count)


# On the CPU, in a whole run: what its operators read.

_READING = {"nonzero", "_local_scalar_dense", "masked_select", "_unique2", "unique_dim", "equal", "is_nonzero"}
_OURS, _THEIRS = "gkd_trainer", ("transformers", "accelerate", "peft")


class Reads(TorchDispatchMode):
    """Counts the operators whose results the host must read, or whose shapes, by the package that asked for them."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in _READING or (name in ("index", "index_put", "index_put_") and has_mask(args[1])):
            self.counts[asking(sys._getframe(1)), name] += 1
        return function(*args, **(kwargs or {}))


def has_mask(indices):
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)


def asking(frame):
    """Return the first of the packages among the callers of an operator."""
    while frame is not None:
        name = frame.f_globals.get("__name__", "").split(".")[0]
        if name in (_OURS, *_THEIRS):
            return name
        frame = frame.f_back
    return None


def reads_of_a_run(trainer, monkeypatch):
    """Train, and return what `training_step` read in each micro-batch."""
    of_each, training_step = [], trainer.training_step

    def counted(*args, **kwargs):
        with Reads() as reads:
            loss = training_step(*args, **kwargs)
        of_each.append(dict(reads.counts))
        return loss

    monkeypatch.setattr(trainer, "training_step", counted)
    trainer.train()
    return of_each


@pytest.mark.parametrize(("lmbda", "engine"), [(0.0, None), (0.5, None), (0.5, Telling)])
def test_a_run_reads_one_flag_per_step_and_nothing_per_micro_batch(
    make_trainer, student, frozen, lmbda, engine, monkeypatch
):
    options = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "max_steps": 3, "lmbda": lmbda}
    arguments = {"model": student(), "teacher": frozen(), "rollouts": engine and engine()}
    trainer = make_trainer(trainer_args=arguments, **options)
    # After the backward, from a copy that began before it.
    assert reads_of_a_run(trainer, monkeypatch) == [{}, {(_OURS, "_local_scalar_dense"): 1}] * 3


@pytest.mark.parametrize("family", ["smolvlm", "qwen2.5"])
def test_a_run_on_images_reads_no_more(config_of, family, monkeypatch):
    from tests.vision import conversation, make_pair, picture  # PIL, which a GPU machine may lack

    pair = make_pair(family)
    rows = [{"images": [picture(seed, 16, 8)], "messages": conversation("What?", "A cat.")} for seed in range(4)]
    args = config_of(max_steps=2, per_device_train_batch_size=2, max_new_tokens=4, max_length=160, lmbda=0.5)
    models = {"teacher_model": pair.teacher, "processing_class": pair.processor}
    trainer = GKDTrainer(pair.student, args, train_dataset=rows, **models)
    for reads in reads_of_a_run(trainer, monkeypatch):
        assert {name: count for (package, name), count in reads.items() if package == _OURS} == {
            "_local_scalar_dense": 1
        }


def test_transformers_reads_the_mask_for_sdpa(make_trainer, tiny_model, monkeypatch):
    """It looks for padding in each forward, which is not ours to leave out."""
    trainer = make_trainer(trainer_args={"model": tiny_model()}, gradient_accumulation_steps=2, max_steps=1)
    assert reads_of_a_run(trainer, monkeypatch)[0].keys() == {("transformers", "_local_scalar_dense")}


def test_the_flag_begins_to_be_read_before_the_last_backward_of_a_window(make_trainer, monkeypatch):
    trainer = make_trainer(gradient_accumulation_steps=3, per_device_train_batch_size=1, max_steps=2)
    events = []
    begin_reading, backward = trainer._checks.finite.begin_reading, trainer.accelerator.backward
    monkeypatch.setattr(
        trainer._checks.finite, "begin_reading", lambda reduce: (events.append("read"), begin_reading(reduce))
    )
    monkeypatch.setattr(
        trainer.accelerator, "backward", lambda *args, **kwargs: (events.append("backward"), backward(*args, **kwargs))
    )
    trainer.train()
    assert events == ["backward", "backward", "read", "backward"] * 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
@pytest.mark.parametrize(
    ("options", "top_k"),
    [({"lmbda": 0.0}, None), ({"lmbda": 0.5}, None), ({"lmbda": 0.5, "ce_weight": 0.2}, 5), ({"beta": 1.0}, None)],
    ids=str,
)
def test_on_a_gpu_nothing_waits_for_the_device(make_trainer, student, frozen, options, top_k, monkeypatch):
    arguments = {"model": student(), "teacher": frozen(top_k=top_k)}
    trainer = make_trainer(
        trainer_args=arguments, use_cpu=False, max_steps=4, gradient_accumulation_steps=2, logging_steps=4, **options
    )
    # The first step compiles kernels and copies constants. Rollouts wait for their tokens.
    names = ["training_step"] if trainer.args.generates else ["training_step", "get_batch_samples"]
    for name in names:
        monkeypatch.setattr(trainer, name, never_waiting(trainer, getattr(trainer, name)))
    trainer.train()
    assert trainer.state.global_step == 4


def never_waiting(trainer, method):
    """Return a method that raises, after the first step of a run, if it waits for the GPU."""

    def call(*args, **kwargs):
        torch.cuda.set_sync_debug_mode("error" if trainer.state.global_step > 0 else "default")
        try:
            return method(*args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return call
