"""The trainer's loss: the divergence over the window's trained tokens, on every path."""

import math

import pytest
import torch
from peft import LoraConfig
from torch import nn
from transformers import TrainerCallback

from gkd_trainer import FrozenTeacher, GKDTrainer
from gkd_trainer.divergence import reference_jsd
from tests.memory import NewStorages


def batch_of(trainer, count=4):
    return trainer.data_collator([trainer.train_dataset[index] for index in range(count)])


def expected_loss(trainer, inputs, vocab_size=None, beta=0.5, temperature=1.0):
    """The mean divergence in float64, from plain forwards of both models."""
    model_inputs = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    is_scored = inputs["labels"][:, 1:] != -100
    student = trainer.model(**model_inputs).logits[:, :-1][is_scored][:, :vocab_size]
    with torch.no_grad():
        teacher = trainer.teacher_model(**model_inputs).logits[:, :-1][is_scored][:, :vocab_size]
    return reference_jsd(student.double(), teacher.double(), beta=beta, temperature=temperature).mean()


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(actual, expected, tolerance=1e-5):
    assert actual.keys() == expected.keys()
    scale = max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in expected.items():
        assert (actual[name] - gradient).abs().max() <= tolerance * scale, name


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "phi", "cohere", "granite"])
@pytest.mark.parametrize("tied", [True, False])
def test_loss_and_gradients_are_those_of_the_float64_divergence(make_trainer, tiny_model, family, tied):
    student = tiny_model(family, tie_word_embeddings=tied)
    teacher = tiny_model(family, hidden=48, seed=1)
    trainer = make_trainer(trainer_args={"model": student, "teacher_model": teacher}, loss_temperature=2.0)
    inputs = batch_of(trainer)

    expected = expected_loss(trainer, inputs, temperature=2.0)
    expected.backward()
    expected_gradients = gradients(student)
    student.zero_grad()
    loss = trainer.compute_loss(student, inputs)
    loss.backward()

    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_same_gradients(gradients(student), expected_gradients, 1e-4)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_beta_of_the_config_is_the_beta_of_the_loss(make_trainer, beta):
    trainer = make_trainer(beta=beta)
    inputs = batch_of(trainer)
    expected = expected_loss(trainer, inputs, beta=beta).item()
    assert trainer.compute_loss(trainer.model, inputs).item() == pytest.approx(expected, rel=1e-5)


def test_continuous_scale_divides_by_beta_and_its_complement(make_trainer):
    paper, continuous = make_trainer(beta=0.1), make_trainer(beta=0.1, divergence_scale="continuous")
    inputs = batch_of(paper)
    ratio = continuous.compute_loss(continuous.model, inputs) / paper.compute_loss(paper.model, inputs)
    assert ratio.item() == pytest.approx(1 / (0.1 * 0.9), rel=1e-5)


def test_logits_path_gives_the_loss_of_the_hidden_path(make_trainer):
    trainer = make_trainer()
    inputs = batch_of(trainer)
    loss = trainer.compute_loss(trainer.model, inputs)
    with_outputs, outputs = trainer.compute_loss(trainer.model, inputs, return_outputs=True)
    assert outputs.logits.shape == (*inputs["input_ids"].shape, 368)
    assert loss.item() == pytest.approx(with_outputs.item(), rel=1e-5)


def test_same_model_as_teacher_gives_zero_loss_and_zero_gradient(make_trainer, tiny_model):
    trainer = make_trainer(trainer_args={"model": tiny_model(), "teacher_model": tiny_model()})
    loss = trainer.compute_loss(trainer.model, batch_of(trainer))
    loss.backward()
    assert abs(loss.item()) < 1e-6
    assert max(gradient.abs().max() for gradient in gradients(trainer.model).values()) < 1e-6


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_heads_of_different_padding_are_compared_over_the_tokenizers_vocabulary(
    make_trainer, tiny_model, byte_level, beta
):
    teacher = FrozenTeacher(tiny_model(vocab=400, seed=1), tokenizer=byte_level())
    trainer = make_trainer(trainer_args={"model": tiny_model(vocab=384), "teacher": teacher}, beta=beta)
    inputs = batch_of(trainer)
    vocab_size = len(trainer.processing_class)
    assert vocab_size == 365
    expected = expected_loss(trainer, inputs, vocab_size, beta)
    loss = trainer.compute_loss(trainer.model, inputs)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    padding_rows = trainer.model.lm_head.weight.grad[vocab_size:]
    assert torch.equal(padding_rows, torch.zeros_like(padding_rows))


def accumulated_gradients(make_trainer, tiny_model, batch_size, steps, **options):
    seen = {}

    class Recording(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, *, model, **_):
            seen.update(gradients(model))

    trainer = make_trainer(
        trainer_args={"callbacks": [Recording()]},
        max_grad_norm=0.0,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=steps,
        max_steps=1,
        **options,
    )
    trainer.train()
    return seen, trainer.state.log_history[0]


@pytest.mark.parametrize("lmbda", [0.0, 0.5, 1.0])
def test_gradient_does_not_depend_on_how_a_window_is_split(make_trainer, tiny_model, lmbda):
    whole, whole_log = accumulated_gradients(make_trainer, tiny_model, 8, 1, lmbda=lmbda)
    for batch_size, steps in ((4, 2), (1, 8)):
        split, split_log = accumulated_gradients(make_trainer, tiny_model, batch_size, steps, lmbda=lmbda)
        assert_same_gradients(split, whole, 1e-5)
        assert split_log["loss"] == pytest.approx(whole_log["loss"], rel=1e-5)


class DropsInTheStep(GKDTrainer):
    def training_step(self, model, inputs, *args, **kwargs):
        return super().training_step(model, inputs)


class DropsInTheLoss(GKDTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        return super().compute_loss(model, inputs, return_outputs)


class DropsInTheWindow(GKDTrainer):
    def get_batch_samples(self, *args):
        return super().get_batch_samples(*args)[0], None


@pytest.mark.parametrize("dropping", [DropsInTheStep, DropsInTheLoss, DropsInTheWindow])
def test_a_subclass_that_does_not_pass_the_count_on_trains_alike(make_trainer, tiny_model, dropping):
    kept, kept_log = accumulated_gradients(make_trainer, tiny_model, 2, 4, lmbda=0.5)
    lost, lost_log = accumulated_gradients(make_trainer, tiny_model, 2, 4, lmbda=0.5, trainer_class=dropping)
    assert_same_gradients(lost, kept, 1e-6)
    assert lost_log["loss"] == pytest.approx(kept_log["loss"], rel=1e-6)


class OwnWindow(GKDTrainer):
    def get_batch_samples(self, epoch_iterator, num_batches, device):
        return [next(epoch_iterator) for _ in range(num_batches)], None


class OwnBatch(DropsInTheStep):
    def training_step(self, model, inputs, *args, **kwargs):
        return super().training_step(model, {**inputs, "labels": inputs["labels"].clone()})


@pytest.mark.parametrize("changing", [OwnWindow, OwnBatch])
@pytest.mark.parametrize("is_scaled", [True, False])
def test_batches_of_a_subclass_without_a_count_weigh_the_same_in_a_window(
    make_trainer, tiny_model, changing, is_scaled, monkeypatch
):
    """As in Trainer, which also divides by their number if the subclass says that it must."""
    monkeypatch.setattr(changing, "loss_is_scaled_for_ga", is_scaled)
    means = []

    class Recording(changing):
        def compute_loss(self, model, inputs, *args, **kwargs):
            with torch.no_grad():
                means.append(super().compute_loss(model.eval(), inputs).item())
            return super().compute_loss(model.train(), inputs, *args, **kwargs)

    _, log = accumulated_gradients(make_trainer, tiny_model, 2, 4, trainer_class=Recording)
    assert log["loss"] == pytest.approx(sum(means) / 4, rel=1e-5)


def test_divisor_is_counted_after_the_rollouts(make_trainer):
    counts = []

    class Recording(GKDTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            counts.append((int(num_items_in_batch), int((inputs["labels"][:, 1:] != -100).sum())))
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    trainer = make_trainer(trainer_class=Recording, lmbda=1.0, gradient_accumulation_steps=2, max_new_tokens=3)
    trainer.train()
    for window in (counts[:2], counts[2:]):
        assert {divisor for divisor, _ in window} == {sum(trained for _, trained in window)}


def test_cross_entropy_is_mixed_only_into_dataset_samples(make_trainer):
    trainer = make_trainer(ce_weight=0.25)
    trainer.model.train()
    inputs = batch_of(trainer)
    is_on_policy = torch.tensor([True, False, False, True])
    loss = trainer.compute_loss(trainer.model, {**inputs, "is_on_policy": is_on_policy})

    is_scored = inputs["labels"][:, 1:] != -100
    logits = trainer.model(inputs["input_ids"], inputs["attention_mask"]).logits[:, :-1][is_scored].double()
    teacher = trainer.teacher_model(inputs["input_ids"], inputs["attention_mask"]).logits[:, :-1][is_scored].double()
    divergence = reference_jsd(logits, teacher, beta=0.5)
    cross_entropy = nn.functional.cross_entropy(logits, inputs["labels"][:, 1:][is_scored], reduction="none")
    weight = 0.25 * (~is_on_policy[:, None].expand_as(is_scored)[is_scored])
    expected = (weight * cross_entropy + (1 - weight) * divergence).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_window_without_trained_tokens_gives_a_connected_zero(make_trainer, tiny_model, family):
    trainer = make_trainer(trainer_args={"model": tiny_model(family, tie_word_embeddings=False)})
    inputs = batch_of(trainer)
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    loss = trainer.compute_loss(trainer.model, inputs, num_items_in_batch=torch.tensor(0))
    loss.backward()
    assert loss.item() == 0
    for name, parameter in trainer.model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.equal(parameter.grad, torch.zeros_like(parameter)), name


def test_lora_student_gets_the_gradients_of_its_full_logits(make_trainer, tiny_model):
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    trainer = make_trainer(trainer_args={"peft_config": lora})
    inputs = batch_of(trainer)
    expected_loss(trainer, inputs).backward()
    expected = gradients(trainer.model)
    trainer.model.zero_grad()
    trainer.compute_loss(trainer.model, inputs).backward()
    assert all("lora" in name for name in expected)
    assert_same_gradients(gradients(trainer.model), expected, 1e-4)


def test_lora_on_the_head_goes_through_logits_and_is_logged_once(make_trainer, caplog):
    lora = LoraConfig(r=4, target_modules=["lm_head", "q_proj"], init_lora_weights=False)
    trainer = make_trainer(trainer_args={"peft_config": lora})
    trainer.train()
    messages = [record.message for record in caplog.records if "full logits" in record.message]
    assert len(messages) == 1
    trainer.model.zero_grad()
    inputs = batch_of(trainer)
    trainer.model.eval()
    assert trainer.compute_loss(trainer.model, inputs).item() == pytest.approx(
        expected_loss(trainer, inputs).item(), rel=1e-5
    )


def test_no_logits_are_made_for_positions_that_are_not_trained_on(make_trainer):
    trainer = make_trainer(trainer_args={"processing_class": None})
    inputs = batch_of(trainer)
    trained = int((inputs["labels"][:, 1:] != -100).sum())
    widths = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple | list) else [result]:
                if isinstance(tensor, torch.Tensor) and tensor.dim() >= 2 and tensor.shape[-1] == 368:
                    widths.append(math.prod(tensor.shape[:-1]))
            return result

    with Watch():
        trainer.compute_loss(trainer.model, inputs).backward()
    # The weights [V, H] are transposed to [H, V] too, and H is 32 or 48.
    assert max(width for width in widths if width not in (32, 48)) <= trained < inputs["input_ids"].numel()


def test_bf16_autocast_still_compares_float32_logits(make_trainer):
    plain, mixed = make_trainer(), make_trainer(bf16=True)
    mixed.train()
    logged = mixed.state.log_history[0]["loss"]
    plain.train()
    assert logged == pytest.approx(plain.state.log_history[0]["loss"], rel=0.05)


@pytest.mark.parametrize("is_lora", [False, True])
def test_a_step_makes_no_tensor_of_the_size_of_all_logits(make_trainer, tiny_model, token_rows, is_lora):
    vocab = 2000
    models = {"model": tiny_model(vocab=vocab), "teacher_model": tiny_model(vocab=vocab, hidden=48, seed=1)}
    if is_lora:
        models["peft_config"] = LoraConfig(r=2, target_modules=["q_proj"])
    trainer = make_trainer(trainer_args={**models, "train_dataset": token_rows(longest=40)}, loss_workspace_mb=1)
    inputs = batch_of(trainer, 16)
    trainer.compute_loss(trainer.model, inputs).backward()
    trainer.model.zero_grad()
    with NewStorages() as memory:
        trainer.compute_loss(trainer.model, inputs).backward()
    trained = int((inputs["labels"][:, 1:] != -100).sum())
    assert memory.largest <= 2**20 / 2 < 4 * trained * vocab / 3


def test_products_of_the_gradient_may_round_to_bfloat16(make_trainer, tiny_model):
    losses, of_each = [], []
    for dtype in ("auto", "float32", "bfloat16"):
        trainer = make_trainer(trainer_args={"model": tiny_model()}, loss_product_dtype=dtype)
        loss = trainer.compute_loss(trainer.model, batch_of(trainer))
        loss.backward()
        losses.append(loss.item())
        of_each.append(gradients(trainer.model))
    assert losses[0] == losses[1] == losses[2]
    automatic, exact, rounded = of_each
    assert_same_gradients(automatic, exact, 0)
    assert_same_gradients(rounded, exact, 1e-2)
    assert not torch.equal(rounded["lm_head.weight"], exact["lm_head.weight"])
