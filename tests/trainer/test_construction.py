"""What a trainer is made from: arguments completed, checked, and left for the trainer that is extended."""

from inspect import signature

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig
from transformers import Trainer
from trl import SFTTrainer

from gkd_trainer import FrozenTeacher, GKDConfig, GKDConfigError, GKDTeacherError
from gkd_trainer.trainer.construction import (
    accepted_by,
    construct,
    init_parameters,
    refuse_split_sequences,
    refuse_student,
)

NAMES = [name for name in signature(Trainer.__init__).parameters if name != "self"]
PLAIN = init_parameters([Trainer])


@pytest.fixture
def built(tiny_model, config):
    """Construct with a student and a teacher, unless others are given; options go to GKDConfig."""

    def build(base_parameters=PLAIN, teacher=None, peft_config=None, builds_rollouts=True, arguments=None, **options):
        given = dict.fromkeys(NAMES) | {"optimizers": (None, None), "args": config(**options)}
        given |= {"model": tiny_model()} | (arguments or {})
        return construct(
            given,
            base_parameters,
            "MyTrainer",
            teacher=teacher or FrozenTeacher(tiny_model(seed=1)),
            teacher_model=None,
            peft_config=peft_config,
            builds_rollouts=builds_rollouts,
        )

    return build


def test_the_plain_trainer_gets_a_student_a_configuration_and_a_collator(built, tiny_model):
    model = tiny_model()
    made = built(arguments={"model": model})
    assert made.base_arguments["model"] is model
    assert isinstance(made.base_arguments["args"], GKDConfig)
    assert made.base_arguments["data_collator"].pad_token_id == 0
    assert "compute_loss_func" not in made.base_arguments
    assert made.prepares_rows
    assert made.adapter is None


def test_a_student_is_loaded_by_name_in_float32(built, tiny_model, tmp_path):
    tiny_model().to(torch.bfloat16).save_pretrained(tmp_path)
    made = built(arguments={"model": tmp_path})
    assert made.base_arguments["model"].dtype == torch.float32
    assert made.run.loads_student


def test_the_adapter_is_put_on_here_for_the_plain_trainer_and_left_to_one_that_does_it(built):
    adapter = LoraConfig(r=2, target_modules=["q_proj"])
    made = built(peft_config=adapter)
    assert isinstance(made.base_arguments["model"], PeftModel)
    assert made.adapter is adapter


@pytest.mark.parametrize("arguments", [{"model": None}, {"model_init": lambda: None}], ids=["none", "both"])
def test_there_is_one_student(built, arguments):
    with pytest.raises(GKDConfigError, match="expected one student: pass model"):
        built(arguments=arguments)


def test_teacher_and_student_are_two_objects(built, tiny_model):
    model = tiny_model()
    with pytest.raises(GKDTeacherError, match="teacher and student are the same object"):
        built(teacher=FrozenTeacher(model), arguments={"model": model})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_smoothing_factor": 0.1}, r"label_smoothing_factor=0.1 smooths labels"),
        ({"arguments": {"compute_loss_func": print}}, "compute_loss_func would replace the divergence"),
        ({"peft_config": PromptTuningConfig(num_virtual_tokens=2)}, "PromptTuningConfig learns virtual tokens"),
        ({"arguments": {"data_collator": GKDConfig(output_dir="x")}}, "data_collator, the third argument, must be"),
    ],
)
def test_what_has_no_meaning_is_refused(built, options, message):
    with pytest.raises(GKDConfigError, match=message):
        built(**options)


def test_a_top_k_teacher_is_compared_at_temperature_1(built, tiny_model):
    with pytest.raises(GKDConfigError, match="can't be applied to a teacher's top tokens"):
        built(teacher=FrozenTeacher(tiny_model(), top_k=3), loss_temperature=2.0)


def test_a_collator_that_reads_messages_gets_all_columns(built):
    def collator(rows):
        raise AssertionError

    collator.messages_key = "messages"
    made = built(arguments={"data_collator": collator})
    assert not made.prepares_rows
    assert made.base_arguments["args"].remove_unused_columns is False


def test_the_parameters_of_an_init_that_passes_its_arguments_on_are_those_behind_it_too():
    class Passing(Trainer):
        def __init__(self, own=None, **kwargs):
            raise AssertionError

    assert init_parameters([Passing, Trainer]).keys() == {"self", "own", *NAMES}
    assert init_parameters([Trainer, Passing]).keys() == {"self", *NAMES}
    assert "peft_config" in init_parameters(SFTTrainer.__mro__)


def test_what_a_trainer_does_not_take_is_left_out_where_unused_and_unexpected_where_given():
    parameters = init_parameters([Trainer])
    assert accepted_by(parameters, {"model": 1, "other": None}, "MyTrainer") == {"model": 1}
    with pytest.raises(TypeError, match=r"MyTrainer.__init__\(\) got an unexpected keyword argument 'other'"):
        accepted_by(parameters, {"other": 2}, "MyTrainer")


@pytest.mark.parametrize("sizes", [(2, 1), (1, 2)])
def test_split_sequences_are_refused(sizes):
    with pytest.raises(GKDConfigError, match="set cp_size and sp_size to 1"):
        refuse_split_sequences(*sizes)
    refuse_split_sequences(1, 1)


def test_a_frozen_student_is_refused_only_where_it_is_to_be_trained(tiny_model):
    teacher, student = FrozenTeacher(tiny_model(seed=1)), tiny_model().requires_grad_(False)
    refuse_student(student, teacher, is_trained=False)
    with pytest.raises(GKDConfigError, match="no parameter of the student requires a gradient"):
        refuse_student(student, teacher, is_trained=True)


def test_weights_in_common_are_refused_unless_the_teacher_says_that_it_shares_them(tiny_model):
    student, other = tiny_model(), tiny_model()
    other.model.embed_tokens.weight = student.model.embed_tokens.weight

    class Sharing(FrozenTeacher):
        shares_weights = True

    with pytest.raises(GKDTeacherError, match="the teacher shares weights with the student"):
        refuse_student(student, FrozenTeacher(other), is_trained=False)
    refuse_student(student, Sharing(other), is_trained=False)
