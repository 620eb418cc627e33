"""The student as its own teacher: other adapters on the same weights, and nothing of the student changes."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from gkd_trainer.batch_keys import IGNORE_INDEX
from gkd_trainer.errors import GKDTeacherError
from gkd_trainer.models.heads import SeparableHead, find_head
from gkd_trainer.models.loading import base_model
from gkd_trainer.signals import HiddenSignal, LogitsSignal
from gkd_trainer.teachers import FrozenTeacher, SelfTeacher
from gkd_trainer.types import TokenBatch

LORA = {
    "r": 2,
    "lora_alpha": 6,
    "target_modules": ["q_proj", "down_proj"],
    "init_lora_weights": False,
    "lora_dropout": 0.5,
}
SOURCES = ["base", "reference", "ema"]


@pytest.fixture
def batch():
    ids_BL = torch.randint(0, 368, (3, 9), generator=torch.Generator().manual_seed(0))
    labels_BL = ids_BL.clone()
    labels_BL[:, :3] = IGNORE_INDEX
    labels_BL[1, 6:] = IGNORE_INDEX
    labels_BL[2] = IGNORE_INDEX
    mask_BL = torch.ones_like(ids_BL)
    mask_BL[1, 6:] = 0
    return TokenBatch.from_inputs({"input_ids": ids_BL, "attention_mask": mask_BL, "labels": labels_BL})


@pytest.fixture
def student(tiny_model):
    """A student in training mode with dropout everywhere, an adapter to train, and a frozen one; neither is zero."""
    model = get_peft_model(tiny_model(attention_dropout=0.5), LoraConfig(**LORA))
    model.add_adapter("reference", LoraConfig(**LORA))
    return model.train()


def attached(source, student, **options):
    teacher = SelfTeacher(source, **options)
    teacher.attach(student)
    teacher.prepare(torch.device("cpu"))
    teacher.attach(student, find_head(base_model(student)))
    return teacher


def logits_NV(signal):
    return signal.logits_NV if isinstance(signal, LogitsSignal) else signal.head.logits(signal.hidden_NH)


def logits_of_frozen(model, batch):
    teacher = FrozenTeacher(model)
    teacher.prepare(torch.device("cpu"))
    return logits_NV(teacher.score(batch))


def move(student, seed):
    """Take a step of the adapter that is trained."""
    numbers = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in student.named_parameters():
            if ".default." in name:
                weight.add_(0.1 * torch.randn(weight.shape, generator=numbers))


def test_base_scores_what_the_model_scored_before_it_had_an_adapter(tiny_model, student, batch):
    expected_NV = logits_of_frozen(tiny_model(attention_dropout=0.5), batch)
    actual_NV = logits_NV(attached("base", student).score(batch))
    assert (actual_NV - expected_NV).abs().max() == 0.0
    assert (actual_NV - logits_of_frozen(copy.deepcopy(student), batch)).abs().max() > 0.1


def test_a_named_adapter_scores_what_the_model_scores_with_it(student, batch):
    other = copy.deepcopy(student)
    other.set_adapter("reference")
    expected_NV = logits_of_frozen(other, batch)
    assert (logits_NV(attached("reference", student).score(batch)) - expected_NV).abs().max() == 0.0


def test_ema_scores_what_the_model_scores_with_the_average_of_b_a_in_its_weights(student, batch):
    student.double()
    teacher = attached("ema", student, ema_decay=0.7)
    layers = {name: layer for name, layer in student.named_modules() if hasattr(layer, "get_delta_weight")}
    averages = {name: layer.get_delta_weight("default").detach() for name, layer in layers.items()}
    teacher.score(batch)
    for step in range(5):
        move(student, step)
        teacher.update()
        for name, layer in layers.items():
            averages[name] = 0.7 * averages[name] + 0.3 * layer.get_delta_weight("default").detach()
    merged = copy.deepcopy(student).unload()
    with torch.no_grad():
        for name, average_OI in averages.items():
            merged.get_submodule(name.removeprefix("base_model.model.")).weight.add_(average_OI)
    torch.testing.assert_close(logits_NV(teacher.score(batch)), logits_of_frozen(merged, batch), atol=1e-10, rtol=1e-10)


def test_ema_begins_at_the_adapter_and_follows_it_at_decay_zero(student, batch):
    teacher = attached("ema", student, ema_decay=0.0)
    for step in range(2):
        expected_NV = logits_of_frozen(copy.deepcopy(student), batch)
        torch.testing.assert_close(logits_NV(teacher.score(batch)), expected_NV, atol=1e-4, rtol=1e-4)
        move(student, step)
        teacher.update()


def test_a_batch_without_samples_is_scored_by_a_forward(student, batch):
    teacher = attached("base", student)
    forwards = []
    student.register_forward_hook(lambda *_: forwards.append(1))
    signal = teacher.score(batch.of_samples([]))
    assert signal.hidden_NH.shape == (0, student.config.hidden_size)
    assert len(forwards) == 1


@pytest.mark.parametrize("source", SOURCES)
def test_dropout_does_not_reach_it(student, batch, source):
    teacher = attached(source, student)
    first_NV, second_NV = (logits_NV(teacher.score(batch)) for _ in range(2))
    student.eval()
    assert (first_NV - second_NV).abs().max() == 0.0
    assert (first_NV - logits_NV(teacher.score(batch))).abs().max() == 0.0


@pytest.mark.parametrize("source", SOURCES)
def test_scoring_leaves_the_student_and_the_random_state_as_they_were(student, batch, source):
    student.base_model.model.model.layers[1].eval()
    frozen = next(weight for name, weight in student.named_parameters() if "lora_A.default" in name)
    frozen.requires_grad_(False)
    teacher = attached(source, student)

    def state():
        return (
            {name: module.training for name, module in student.named_modules()},
            {name: (weight.requires_grad, weight.clone()) for name, weight in student.named_parameters()},
            (student.active_adapter, student.active_adapters),
            {name: len(module._forward_hooks) for name, module in student.named_modules()},
            {name: getattr(module, "disable_adapters", None) for name, module in student.named_modules()},
        )

    before, numbers = state(), torch.get_rng_state()
    signal = teacher.score(batch)
    after = state()
    assert torch.equal(torch.get_rng_state(), numbers)
    assert [after[0], *after[2:]] == [before[0], *before[2:]]
    for name, (requires_grad, weight) in before[1].items():
        assert after[1][name][0] == requires_grad
        assert torch.equal(after[1][name][1], weight)
    assert not logits_NV(signal).requires_grad


@pytest.mark.parametrize("source", SOURCES)
def test_the_student_is_restored_after_a_forward_that_fails(student, batch, source):
    teacher = attached(source, student)

    def flags():
        return [module.training for module in student.modules()], [w.requires_grad for w in student.parameters()]

    before = flags()
    handle = student.get_output_embeddings().register_forward_pre_hook(lambda module, inputs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        teacher.score(batch)
    handle.remove()
    assert before == (
        [module.training for module in student.modules()],
        [w.requires_grad for w in student.parameters()],
    )
    assert student.active_adapters == ["default"]
    assert not any(len(layer._forward_hooks) for layer in student.modules())


@pytest.mark.parametrize("source", SOURCES)
def test_weights_require_gradients_in_its_forward_as_outside(student, batch, source):
    """FSDP takes that over for good from the first forward that it sees."""
    expected = [weight.requires_grad for weight in student.parameters()]
    seen = []
    teacher = attached(source, student)
    student.get_input_embeddings().register_forward_hook(
        lambda *_: seen.append([weight.requires_grad for weight in student.parameters()])
    )
    teacher.score(batch)
    assert seen == [expected]
    assert any(expected)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("source", SOURCES)
def test_scoring_between_a_checkpointed_forward_and_its_backward_changes_no_gradient(
    student, batch, source, use_reentrant
):
    student.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    student.enable_input_require_grads()
    teacher = attached(source, student)

    def gradients(scores):
        torch.manual_seed(0)
        loss = student(**batch.model_inputs, labels=batch.labels_BL).loss
        if scores:
            teacher.score(batch)
        loss.backward()
        found = {name: weight.grad for name, weight in student.named_parameters() if weight.grad is not None}
        student.zero_grad()
        return found

    expected, actual = gradients(False), gradients(True)
    assert expected.keys() == actual.keys()
    assert len(expected) == 8
    assert all(torch.equal(actual[name], gradient) for name, gradient in expected.items())


def test_a_head_with_an_adapter_is_switched_off_with_it(tiny_model, batch):
    config = LoraConfig(**{**LORA, "target_modules": ["lm_head"]})
    student = get_peft_model(tiny_model(tie_word_embeddings=False), config)
    signal = attached("base", student).score(batch)
    assert isinstance(signal, LogitsSignal)
    expected_NV = logits_of_frozen(tiny_model(tie_word_embeddings=False), batch)
    torch.testing.assert_close(signal.logits_NV, expected_NV, atol=1e-4, rtol=1e-4)


def test_a_whole_module_that_the_adapter_trains_is_that_of_the_base(tiny_model, batch):
    config = LoraConfig(**LORA, modules_to_save=["lm_head"])
    student = get_peft_model(tiny_model(tie_word_embeddings=False), config)
    with torch.no_grad():
        student.lm_head.modules_to_save["default"].weight.mul_(2)
    expected_NV = logits_of_frozen(tiny_model(tie_word_embeddings=False), batch)
    torch.testing.assert_close(logits_NV(attached("base", student).score(batch)), expected_NV, atol=1e-4, rtol=1e-4)


def test_only_a_head_that_fsdp_gathers_in_the_forward_is_copied(student, batch):
    teacher = attached("base", student)
    signal = teacher.score(batch)
    assert isinstance(signal, HiddenSignal)
    weight_VH = student.get_output_embeddings().weight
    assert signal.head.weight_VH is weight_VH
    teacher.attach(student, SeparableHead(student.get_output_embeddings(), 1.0, None, is_sharded=True))
    copied_VH = teacher.score(batch).head.weight_VH
    assert copied_VH.data_ptr() != weight_VH.data_ptr()
    assert torch.equal(copied_VH, weight_VH)


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("style", "the student has no adapter 'style', only 'default', 'reference': load it with"),
        ("default", "the adapter 'default' is the one that the student trains"),
    ],
)
def test_an_adapter_that_can_not_teach_is_refused(student, source, problem):
    with pytest.raises(GKDTeacherError, match=problem):
        SelfTeacher(source).attach(student)


def test_a_student_without_an_adapter_is_refused(tiny_model):
    with pytest.raises(GKDTeacherError, match=r"\(LlamaForCausalLM\) is not a PEFT model: pass peft_config"):
        SelfTeacher().attach(tiny_model())


@pytest.mark.parametrize("source", SOURCES)
def test_a_student_whose_own_weights_are_trained_too_is_refused(tiny_model, source):
    model = get_peft_model(tiny_model("phi"), LoraConfig(**{**LORA, "target_modules": ["fc1"], "bias": "lora_only"}))
    model.add_adapter("reference", LoraConfig(**{**LORA, "target_modules": ["fc1"]}))
    flags = [weight.requires_grad for weight in model.parameters()]
    with pytest.raises(GKDTeacherError, match=r"trains weights of its own besides its adapter \(.*bias"):
        SelfTeacher(source).attach(model)
    assert flags == [weight.requires_grad for weight in model.parameters()]


@pytest.mark.parametrize("source", ["base", "reference"])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_adapter_that_changed_the_students_weights_is_refused_where_it_is_turned_off(
    tiny_model, batch, source, init
):
    original_NV = logits_of_frozen(tiny_model(), batch)
    model = get_peft_model(tiny_model(), LoraConfig(**{**LORA, "init_lora_weights": init}))
    model.add_adapter("reference", LoraConfig(**LORA))
    with model.disable_adapter():
        assert (logits_of_frozen(copy.deepcopy(model), batch) - original_NV).abs().max() > 0.1
    with pytest.raises(GKDTeacherError, match="own weights to add the adapter 'default'"):
        SelfTeacher(source).attach(model)


def test_the_average_of_an_adapter_that_changed_the_students_weights_begins_at_the_original_model(tiny_model, batch):
    original_NV = logits_of_frozen(tiny_model(), batch)
    model = get_peft_model(tiny_model(), LoraConfig(**{**LORA, "init_lora_weights": "pissa"}))
    torch.testing.assert_close(logits_NV(attached("ema", model).score(batch)), original_NV, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_a_decay_out_of_range_is_refused(decay):
    with pytest.raises(GKDTeacherError, match=r"ema_decay must be in \[0, 1\)"):
        SelfTeacher("ema", ema_decay=decay)


def test_scoring_before_there_is_a_student_is_refused(student, batch):
    teacher = SelfTeacher()
    assert teacher.vocab_size is None
    teacher.attach(student)
    with pytest.raises(RuntimeError, match="called before attach"):
        teacher.score(batch)


def test_a_state_goes_on_to_the_bit(student, batch):
    teacher = attached("ema", student)
    for step in range(3):
        move(student, step)
        teacher.update()
    state = {name: tensor.clone() for name, tensor in teacher.state().items()}
    again = attached("ema", student)
    again.load_state(state)
    for step in range(3, 5):
        assert torch.equal(logits_NV(again.score(batch)), logits_NV(teacher.score(batch)))
        move(student, step)
        teacher.update()
        again.update()


def test_a_checkpoint_without_an_average_begins_it_again_with_a_warning(student, batch, caplog):
    teacher = attached("ema", student)
    teacher.score(batch)
    move(student, 0)
    teacher.load_state({})
    assert "starts again from the adapter itself" in caplog.text
    expected_NV = logits_of_frozen(copy.deepcopy(student), batch)
    torch.testing.assert_close(logits_NV(teacher.score(batch)), expected_NV, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("source", ["base", "reference"])
def test_other_sources_have_nothing_to_save(student, source, caplog):
    teacher = attached(source, student)
    teacher.update()
    assert teacher.state() == {}
    teacher.load_state({})
    assert not caplog.text


def test_another_student_begins_another_average(student, tiny_model, batch):
    teacher = attached("ema", student, ema_decay=0.9)
    teacher.score(batch)
    other = get_peft_model(tiny_model(seed=1), LoraConfig(**LORA))
    teacher.attach(other, find_head(base_model(other)))
    expected_NV = logits_of_frozen(copy.deepcopy(other), batch)
    torch.testing.assert_close(logits_NV(teacher.score(batch)), expected_NV, atol=1e-4, rtol=1e-4)


def test_an_average_that_is_cut_too_much_warns_once(student, batch, caplog, monkeypatch):
    teacher = attached("ema", student)
    teacher.score(batch)
    monkeypatch.setattr(type(teacher.average), "error_bound", 0.02)
    teacher.update()
    teacher.update()
    assert caplog.text.count("The average of the adapter was truncated by up to 2.0 % of its norm") == 1
