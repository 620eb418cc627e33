"""The check that a rollout engine computes the student: silent, a warning or an error, by the mean difference."""

import copy
import logging
from dataclasses import replace

import pytest
import torch
from torch import nn

from gkd_trainer.errors import GKDRolloutError
from gkd_trainer.report.metrics import TOKEN_SUMS
from gkd_trainer.rollouts import HFRollouts
from gkd_trainer.trainer.sampling_check import SamplingCheck, is_noisy

CPU = torch.device("cpu")


def sums_of(*samples):
    """Return the `sums_by_sample` of samples of (tokens, mean difference)."""
    sums_BK = torch.rand(len(samples), len(TOKEN_SUMS), dtype=torch.float64)
    names = list(TOKEN_SUMS)
    for row, (tokens, difference) in enumerate(samples):
        sums_BK[row, names.index("sampled_tokens")] = tokens
        sums_BK[row, names.index("sampling_difference")] = tokens * difference
    return sums_BK


def judge(check, *samples, step=1, noisy=False):
    check.add(sums_of(*samples))
    check.judge(check.taken(CPU).tolist(), step, lambda: noisy)


@pytest.mark.parametrize("difference", [0.0, 1e-5, 0.05, 0.0999])
def test_rounding_is_passed_over(difference, caplog):
    judge(SamplingCheck(), (100, difference), (100, difference))
    assert caplog.text == ""


def test_another_model_is_an_error_with_the_numbers_and_what_to_check():
    with pytest.raises(GKDRolloutError) as raised:
        judge(SamplingCheck(), (100, 2.0), (300, 1.0), step=7)
    message = str(raised.value)
    for part in ("400 tokens sampled for step 7", "differ by 1.2 nats", "--model", "--hf-overrides", "vllm_sync_dir"):
        assert part in message


def test_what_quantisation_may_explain_is_one_warning(caplog):
    check = SamplingCheck()
    with caplog.at_level(logging.WARNING):
        for step in (1, 2, 3):
            judge(check, (100, 0.25), step=step)
    [record] = caplog.records
    assert "may not compute the student: over the 100 tokens sampled for step 1" in record.message
    assert "0.25 nats" in record.message


def test_a_student_with_dropout_is_warned_of_and_not_stopped(caplog):
    judge(SamplingCheck(), (100, 3.0), noisy=True)
    assert "may not compute the student" in caplog.text


def test_few_tokens_wait_for_those_of_later_steps():
    check = SamplingCheck()
    judge(check, (60, 0.9))
    with pytest.raises(GKDRolloutError, match=r"over the 120 tokens.*differ by 0.7 nats"):
        judge(check, (60, 0.5))
    judge(check, (99, 0.9))  # which begin again


def test_sums_read_twice_count_once_and_none_at_all_are_no_error():
    check = SamplingCheck()
    check.add(sums_of((60, 0.9)))
    sums = check.taken(CPU).tolist()
    for _ in range(3):
        check.judge(sums, 1, lambda: False)
    check.judge([], 1, lambda: False)
    assert check.taken(CPU).tolist() == [0.0, 0.0]
    check.judge([0.0, 0.0], 1, lambda: False)


def test_a_student_is_noisy_with_any_dropout_or_noise_on_its_embeddings(tiny_model, config):
    model = tiny_model("gpt2")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    assert not is_noisy(model, config())
    assert is_noisy(model, config(neftune_noise_alpha=5.0))
    next(module for module in model.modules() if isinstance(module, nn.Dropout)).p = 0.1
    assert is_noisy(model, config())
    llama = tiny_model("llama")
    assert not is_noisy(llama, config())
    llama.model.layers[1].self_attn.attention_dropout = 0.1
    assert is_noisy(llama, config())


# In a run


class OwnNumerics(HFRollouts):
    """Stands in for an engine with a model of its own, by default a copy of the student at each sync."""

    def __init__(self, own=None):
        super().__init__(stop_ids=[2], vocab_size=360)
        self.own = own

    def sync(self, model):
        self.used = copy.deepcopy(model).eval() if self.own is None else self.own
        super().sync(self.used)

    def generate(self, prompts, sampling, seeds):
        completions = super().generate(prompts, sampling, seeds)
        return [self._told(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]

    def _told(self, prompt, completion):
        ids = list(completion.token_ids)
        with torch.no_grad():
            log_p_LV = self.used(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        return replace(completion, log_probs=log_p_LV[torch.arange(len(ids)), ids].tolist())


def trainer_of(make_trainer, engine, **options):
    sizes = {"lmbda": 1.0, "per_device_train_batch_size": 8, "max_new_tokens": 24, "learning_rate": 1e-2}
    return make_trainer(trainer_args={"rollouts": engine}, **{**sizes, **options})


def differences(trainer):
    return [entry["sampling_logp_difference"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize(
    "options", [{}, {"loss_temperature": 2.0, "temperature": 0.7}, {"ce_weight": 0.2, "lmbda": 0.7}], ids=str
)
def test_an_engine_that_computes_the_student_differs_by_nothing(make_trainer, tiny_model, caplog, options):
    trainer = trainer_of(make_trainer, OwnNumerics(), **options)
    # Its head has rows that the teacher's tokenizer lacks, over which only the engine normalises.
    with torch.no_grad():
        trainer.model.lm_head.weight[360:] = 0
    trainer.train()
    assert max(differences(trainer)) < 0.1
    assert "rollout engine" not in caplog.text


def test_an_engine_that_computes_another_model_ends_the_run_before_the_first_step(make_trainer, tiny_model):
    trainer = trainer_of(make_trainer, OwnNumerics(tiny_model(seed=5)))
    before = copy.deepcopy(trainer.model.state_dict())
    with pytest.raises(GKDRolloutError, match=r"does not compute the student.*sampled for step 1"):
        trainer.train()
    assert trainer.state.global_step == 0
    for name, weight in trainer.model.state_dict().items():
        assert torch.equal(weight, before[name]), name


def test_completions_of_older_weights_are_measured_and_not_judged(make_trainer, caplog):
    trainer = trainer_of(make_trainer, OwnNumerics(), rollout_steps=2, learning_rate=0.1, max_steps=2)
    trainer.train()
    assert differences(trainer)[0] < 0.1
    assert differences(trainer)[1] > 0.5
    assert "rollout engine" not in caplog.text


def test_an_evaluation_has_no_such_metric(make_trainer):
    trainer = trainer_of(make_trainer, OwnNumerics(), eval_on_policy=True)
    metrics = trainer.evaluate([{"prompt": "one two"}, {"prompt": "three"}])
    assert "eval_on_policy_loss" in metrics
    assert not [name for name in metrics if "sampling" in name]
