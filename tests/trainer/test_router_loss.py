"""A mixture of experts also trains on its load-balancing loss, as in its own loss."""

from dataclasses import dataclass

import pytest
import torch
from peft import LoraConfig
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from gkd_trainer import GKDArguments, GKDMixin, GKDTrainer
from gkd_trainer.divergence import reference_jsd
from tests.versions import IN_ORDER

FAMILIES = ["mixtral", "qwen3_moe"]
COEFFICIENT = 0.7


def balancing(router_logits, mask_BL, experts_per_token=2):
    """The loss of Switch Transformer (equations 4 to 6) with the mean over layers and real tokens, in float64."""
    is_real_N = mask_BL.flatten().bool()
    logits_NE = torch.cat([logits_NE[is_real_N] for logits_NE in router_logits]).double()
    probabilities_NE = logits_NE.softmax(dim=1)
    experts = logits_NE.shape[1]
    chosen_NE = torch.zeros_like(logits_NE).scatter(1, probabilities_NE.topk(experts_per_token).indices, 1.0)
    return experts * (chosen_NE.mean(dim=0) * probabilities_NE.mean(dim=0)).sum()


def expected(trainer, inputs):
    """The mean divergence and the balancing loss of a batch in float64, from plain forwards."""
    forward = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    is_scored = inputs["labels"][:, 1:] != -100
    output = trainer.model(**forward, output_router_logits=True)
    with torch.no_grad():
        teacher = trainer.teacher_model(**forward).logits[:, :-1][is_scored]
    divergence_N = reference_jsd(output.logits[:, :-1][is_scored].double(), teacher.double(), beta=0.5)
    return divergence_N, balancing(output.router_logits, inputs["attention_mask"])


def batch_of(trainer, rows=range(4)):
    return trainer.data_collator([trainer.train_dataset[index] for index in rows])


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(actual, wanted, tolerance=1e-5):
    assert actual.keys() == wanted.keys()
    scale = max(gradient.abs().max() for gradient in wanted.values())
    for name, gradient in wanted.items():
        assert (actual[name] - gradient).abs().max() <= tolerance * scale, name


def router_options(**options):
    return {"output_router_logits": True, "router_aux_loss_coef": COEFFICIENT, **options}


@pytest.fixture
def make_moe_trainer(make_trainer, tiny_model):
    def make(family="mixtral", trainer_args=None, trainer_class=GKDTrainer, router=None, **options):
        student = tiny_model(family, **router_options(**(router or {})))
        return make_trainer(
            trainer_class=trainer_class, trainer_args={"model": student, **(trainer_args or {})}, **options
        )

    return make


@pytest.mark.parametrize("with_logits", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_the_divergence_and_the_balancing_loss(make_moe_trainer, family, with_logits):
    trainer = make_moe_trainer(family)
    trainer.model.train()
    inputs = batch_of(trainer)
    assert (inputs["attention_mask"] == 0).any()
    divergence_N, balance = expected(trainer, inputs)
    wanted = divergence_N.mean() + COEFFICIENT * balance
    assert balance > 1.5
    wanted.backward()
    wanted_gradients = gradients(trainer.model)
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, inputs, return_outputs=with_logits)
    loss = loss[0] if with_logits else loss
    loss.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert_same_gradients(gradients(trainer.model), wanted_gradients, 1e-4)


def test_a_window_takes_the_mean_of_its_micro_batches_and_all_of_their_tokens(make_moe_trainer):
    seen = {}

    class Recording(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, *, model, **_):
            seen.update(gradients(model))

    trainer = make_moe_trainer(
        max_grad_norm=0.0,
        max_steps=1,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
        **IN_ORDER,
    )
    trainer.add_callback(Recording())
    trainer.model.train()
    parts = [expected(trainer, batch_of(trainer, rows)) for rows in (range(3), range(3, 6))]
    balance = sum(balance for _, balance in parts) / 2
    wanted = torch.cat([divergence_N for divergence_N, _ in parts]).mean() + COEFFICIENT * balance
    wanted.backward()
    wanted_gradients = gradients(trainer.model)
    trainer.model.zero_grad()
    trainer.train()
    assert_same_gradients(seen, wanted_gradients, 1e-4)
    logged = trainer.state.log_history[0]
    assert logged["loss"] == pytest.approx(wanted.item(), rel=1e-5)
    assert logged["aux_loss"] == pytest.approx(balance.item(), rel=1e-5)


@pytest.mark.parametrize("router", [{"output_router_logits": False}, {"router_aux_loss_coef": 0.0}])
def test_without_router_logits_or_coefficient_the_loss_is_the_divergence(make_moe_trainer, router):
    trainer = make_moe_trainer(router=router)
    trainer.model.train()
    inputs = batch_of(trainer)
    divergence_N, _ = expected(trainer, inputs)
    assert trainer.compute_loss(trainer.model, inputs).item() == pytest.approx(divergence_N.mean().item(), rel=1e-5)
    trainer.train()
    assert "aux_loss" not in trainer.state.log_history[0]


def test_evaluation_measures_only_the_divergence(make_moe_trainer, token_rows):
    trainer = make_moe_trainer(trainer_args={"eval_dataset": token_rows(4)})
    trainer.model.eval()
    divergence_N, _ = expected(trainer, batch_of(trainer))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(divergence_N.mean().item(), rel=1e-4)


def test_a_mixture_generates_and_trains_on_its_own_completions(make_moe_trainer):
    trainer = make_moe_trainer(lmbda=1.0)
    trainer.train()
    assert trainer.state.log_history[0]["aux_loss"] > 1.5
    assert trainer.state.log_history[0]["on_policy_share"] == 1


def test_a_lora_student_trains_on_the_balancing_loss(make_moe_trainer):
    trainer = make_moe_trainer(trainer_args={"peft_config": LoraConfig(r=2, target_modules=["q_proj"])})
    trainer.train()
    assert trainer.state.log_history[0]["aux_loss"] > 1.5


@pytest.mark.parametrize("family", FAMILIES)
def test_the_teachers_router_logits_are_not_computed(make_trainer, tiny_model, family):
    teacher = tiny_model(family, seed=1, **router_options())
    trainer = make_trainer(trainer_args={"teacher_model": teacher}, lmbda=0.0, seq_kd=True)
    outputs = []
    teacher.register_forward_hook(lambda module, args, output: outputs.append(output))
    trainer.train()
    assert outputs
    assert all(output.aux_loss is None and not output.router_logits for output in outputs)
    assert "aux_loss" not in trainer.state.log_history[0]
    assert teacher.config.output_router_logits


def test_an_sft_trainer_gives_the_coefficient_of_its_options(make_moe_trainer, config):
    class MySFT(GKDMixin, SFTTrainer):
        pass

    @dataclass
    class MyConfig(GKDArguments, SFTConfig):
        pass

    args = config(MyConfig, router_aux_loss_coef=0.25, max_steps=1)
    trainer = make_moe_trainer(trainer_class=MySFT, trainer_args={"args": args}, router={"output_router_logits": False})
    trainer.model.train()
    inputs = batch_of(trainer)
    divergence_N, balance = expected(trainer, inputs)
    wanted = (divergence_N.mean() + 0.25 * balance).item()
    assert trainer.compute_loss(trainer.model, inputs).item() == pytest.approx(wanted, rel=1e-5)


def test_mixed_precision_does_not_hide_the_balancing_loss(make_moe_trainer):
    plain, mixed = make_moe_trainer(max_steps=1), make_moe_trainer(max_steps=1, bf16=True)
    for trainer in (plain, mixed):
        trainer.train()
    logged = mixed.state.log_history[0]["aux_loss"]
    assert logged == pytest.approx(plain.state.log_history[0]["aux_loss"], rel=0.02)


def test_two_ranks_balance_like_two_micro_batches(full_run, tiny_model, tmp_path):
    options = {
        "max_steps": 2,
        "save_strategy": "no",
        "learning_rate": 1e-1,
        **IN_ORDER,
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "lmbda": 0.5,
        "per_device_train_batch_size": 2,
    }

    def student():
        return tiny_model("mixtral", **router_options())

    one, wanted, _ = full_run(tmp_path / "one", student=student(), gradient_accumulation_steps=2, **options)
    two, actual, process = full_run(tmp_path / "two", ranks=2, student=student(), **options)
    assert two is not None, process.stderr
    for name, tensor in wanted.items():
        assert torch.allclose(actual[name], tensor, rtol=0, atol=1e-5), name
    for first, second in zip(one["log"][:2], two["log"][:2], strict=True):
        for metric in ("loss", "aux_loss"):
            assert second[metric] == pytest.approx(first[metric], rel=1e-4), metric
