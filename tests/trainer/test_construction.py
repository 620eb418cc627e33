"""The arguments of a trainer: completed, checked, and passed on to the extended trainer."""

import logging
from contextlib import nullcontext
from dataclasses import dataclass
from inspect import signature
from types import SimpleNamespace

import bitsandbytes
import pytest
import torch
from accelerate import dispatch_model
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from torch.utils.data import IterableDataset
from transformers import DefaultDataCollator, Trainer, default_data_collator
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from gkd_trainer import (
    FrozenTeacher,
    GKDArguments,
    GKDConfig,
    GKDConfigError,
    GKDTeacherError,
    GKDTrainer,
    SelfTeacher,
)
from gkd_trainer.data import unwrapped
from gkd_trainer.trainer import construction
from gkd_trainer.trainer.construction import (
    accepted_by,
    construct,
    init_parameters,
    leave_gpus_to,
    refuse_data_parallel,
    refuse_dropped_deepspeed,
    refuse_split_models,
    refuse_split_sequences,
    refuse_student,
    warn_of_unused,
)
from tests.versions import CHECKPOINTING

ADAPTER = LoraConfig(r=2, target_modules=["q_proj"])
NAMES = [name for name in signature(Trainer.__init__).parameters if name != "self"]
PLAIN = [Trainer]


@pytest.fixture
def built(tiny_model, config):
    """Construct with a student and a teacher, unless others are given; options go to GKDConfig."""

    def build(base_classes=PLAIN, teacher=None, peft_config=None, builds_rollouts=True, arguments=None, **options):
        given = dict.fromkeys(NAMES) | {"optimizers": (None, None), "args": config(**options)}
        given |= {"model": tiny_model()} | (arguments or {})
        return construct(
            given,
            base_classes,
            "MyTrainer",
            teacher=teacher or FrozenTeacher(tiny_model(seed=1)),
            teacher_model=None,
            peft_config=peft_config,
            builds_rollouts=builds_rollouts,
        )

    return build


@dataclass
class MyConfig(GKDArguments, SFTConfig):
    pass


@pytest.fixture
def built_for_sft(built, config):
    """The same for SFTTrainer, which loads, wraps and collates by itself."""
    classes = SFTTrainer.__mro__

    def build(arguments=None, peft_config=None, **options):
        given = {"args": config(MyConfig, bf16=False, **options), **(arguments or {})}
        return built(classes, arguments=given, peft_config=peft_config)

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


def test_the_plain_trainers_student_is_wrapped_here_and_others_wrap_their_own(built, built_for_sft):
    made = built(peft_config=ADAPTER)
    assert isinstance(made.base_arguments["model"], PeftModel)
    assert made.adapter is ADAPTER
    left = built_for_sft(peft_config=ADAPTER)
    assert not isinstance(left.base_arguments["model"], PeftModel)
    assert left.base_arguments["peft_config"] is ADAPTER
    assert left.adapter is None


def test_a_trainer_that_loads_and_collates_does_so_but_does_not_prepare_rows(built_for_sft, tmp_path):
    made = built_for_sft(arguments={"model": tmp_path}, dataset_kwargs={"add_special_tokens": False})
    assert made.base_arguments["model"] == str(tmp_path)
    assert made.base_arguments["data_collator"] is None
    assert made.base_arguments["args"].dataset_kwargs == {"add_special_tokens": False, "skip_prepare_dataset": True}
    assert made.prepares_rows


@pytest.mark.parametrize("peft_config", [None, ADAPTER])
def test_an_adapter_on_a_student_that_checkpoints_is_reached_by_gradients(built, peft_config):
    for checkpoints in (False, True):
        made = built(peft_config=peft_config, **{CHECKPOINTING: checkpoints})
        embeddings = made.base_arguments["model"].get_input_embeddings().requires_grad_(False)
        assert embeddings(torch.tensor([1])).requires_grad is (checkpoints and peft_config is not None)


def test_an_adapter_starts_from_the_seed_of_the_run(built):
    def start(seed):
        torch.manual_seed(torch.initial_seed() + 1)
        made = built(peft_config=ADAPTER, seed=seed)
        return next(weight for name, weight in made.base_arguments["model"].named_parameters() if "lora_A" in name)

    assert torch.equal(start(3), start(3))
    assert not torch.equal(start(3), start(4))


def test_a_student_of_model_init_is_left_to_be_made(built):
    made = built(arguments={"model": None, "model_init": print}, peft_config=ADAPTER)
    assert made.base_arguments["model"] is None
    assert made.adapter is ADAPTER  # of each student to come


def test_a_compiled_student_is_taken_as_the_model_inside(built, tiny_model, caplog):
    model = tiny_model()
    made = built(arguments={"model": torch.compile(model, backend="eager")})
    assert made.base_arguments["model"] is model
    assert "The student was compiled" in caplog.text


def test_the_tokenizer_is_the_one_given_or_that_beside_the_student(built, tiny_model, byte_level, tmp_path):
    model, tokenizer = tiny_model(), byte_level()
    model.save_pretrained(tmp_path)
    assert built(arguments={"model": tmp_path}).base_arguments["processing_class"] is None
    tokenizer.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    for student in (tmp_path, loaded):
        made = built(arguments={"model": student}).base_arguments
        assert made["processing_class"].get_vocab() == tokenizer.get_vocab()
        assert made["data_collator"].pad_token_id == tokenizer.pad_token_id
    given = built(arguments={"model": loaded, "processing_class": tokenizer})
    assert given.base_arguments["processing_class"] is tokenizer


def test_the_options_that_load_a_student_are_heeded(built, tiny_model, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    made = built(arguments={"model": tmp_path}, model_init_kwargs={"dtype": "bfloat16"})
    assert made.base_arguments["model"].dtype == torch.bfloat16


def test_a_collator_that_is_given_stays(built):
    assert built(arguments={"data_collator": print}).base_arguments["data_collator"] is print


@pytest.mark.parametrize("builds_rollouts", [True, False])
def test_construction_returns_the_run_that_decides_which_options_have_an_effect(built, tiny_model, builds_rollouts):
    for top_k in (None, 3):
        made = built(teacher=FrozenTeacher(tiny_model(seed=1), top_k=top_k), builds_rollouts=builds_rollouts)
        assert (made.run.builds_rollouts, made.run.has_top_tokens) == (builds_rollouts, top_k is not None)
        assert not made.run.loads_student
        assert made.run.args is made.base_arguments["args"]


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
        (
            {"arguments": {"args": "a teacher"}},
            r"args, the second argument, must be a GKDConfig .*; got str.*MyTrainer",
        ),
    ],
)
def test_what_has_no_meaning_is_refused(built, options, message):
    with pytest.raises(GKDConfigError, match=message):
        built(**options)


def test_a_top_k_teacher_is_compared_at_temperature_1(built, tiny_model):
    with pytest.raises(GKDConfigError, match="can't be applied to a teacher's top tokens"):
        built(teacher=FrozenTeacher(tiny_model(), top_k=3), loss_temperature=2.0)


def test_one_top_token_that_would_be_all_of_the_comparison_is_refused(built, tiny_model):
    with pytest.raises(GKDConfigError, match=r"teacher_tail='renormalize' compares .* top k of 1 "):
        built(teacher=FrozenTeacher(tiny_model(), top_k=1), teacher_tail="renormalize")


def test_a_teacher_that_can_not_generate_gets_no_engine_under_seq_kd(built, tiny_model):
    class Mute(FrozenTeacher):
        can_generate = False

    with pytest.raises(GKDTeacherError, match="seq_kd=True makes the teacher generate, but this teacher can't"):
        built(teacher=Mute(tiny_model()), seq_kd=True)
    built(teacher=Mute(tiny_model()))


def test_a_configuration_stays_as_it_is_for_the_next_trainer(built, built_for_sft, config):
    args = config(MyConfig, bf16=False)
    for _ in range(2):
        made = built_for_sft(arguments={"args": args})
        assert made.prepares_rows
        assert made.run.args is made.base_arguments["args"]
    assert args.dataset_kwargs is None
    args = config()
    collator = SimpleNamespace(messages_key="messages")
    assert not built(arguments={"args": args, "data_collator": collator}).base_arguments["args"].remove_unused_columns
    assert args.remove_unused_columns
    assert built(arguments={"args": args}).base_arguments["args"] is args


def test_the_student_itself_may_be_the_teacher_where_the_teacher_says_that_it_shares_weights(built, tiny_model):
    student = tiny_model()

    class Sharing(FrozenTeacher):
        shares_weights = True

    with pytest.raises(GKDTeacherError, match="teacher and student are the same object"):
        built(teacher=FrozenTeacher(student), arguments={"model": student})
    assert built(teacher=Sharing(student), arguments={"model": student}).base_arguments["model"] is student


def test_rows_are_not_prepared_on_request(built):
    assert not built(dataset_kwargs={"skip_prepare_dataset": True}).prepares_rows
    assert built(dataset_kwargs={"skip_prepare_dataset": False}).prepares_rows


@pytest.mark.parametrize("where", ["train", "eval", "one_of_two"])
def test_rows_without_tokens_are_prepared_anyway_if_no_collator_reads_them(built, caplog, where):
    messages, tokens = [{"messages": []}], [{"input_ids": [5], "labels": [5]}]
    sets = {
        "train": {"train_dataset": messages},
        "eval": {"train_dataset": tokens, "eval_dataset": messages},
        "one_of_two": {"eval_dataset": {"first": tokens, "second": messages}},
    }[where]
    skipping = {"skip_prepare_dataset": True}
    assert built(arguments=sets, dataset_kwargs=skipping).prepares_rows
    assert "has no effect: the rows have no input_ids, and no data_collator was passed" in caplog.text
    assert not built(arguments={**sets, "data_collator": print}, dataset_kwargs=skipping).prepares_rows
    assert not built(arguments={"train_dataset": tokens}, dataset_kwargs=skipping).prepares_rows


def test_a_stream_is_not_read_to_see_whether_its_rows_are_tokens(built):
    class Stream(IterableDataset):
        def __iter__(self):
            raise AssertionError("a row was taken")

    assert not built(arguments={"train_dataset": Stream()}, dataset_kwargs={"skip_prepare_dataset": True}).prepares_rows


@pytest.mark.parametrize("collator", [default_data_collator, DefaultDataCollator()], ids=["function", "class"])
def test_a_collator_that_can_not_pad_gives_way_to_one_that_can(built, collator):
    made = built(arguments={"data_collator": collator}).base_arguments
    assert type(unwrapped(made["data_collator"])) is DataCollatorForLanguageModeling
    left = built(arguments={"data_collator": collator}, dataset_kwargs={"skip_prepare_dataset": True})
    assert left.base_arguments["data_collator"] is collator


def test_the_option_to_train_on_the_assistant_only_is_kept_from_sfttrainer(built_for_sft):
    assert not built_for_sft(assistant_only_loss=True).base_arguments["args"].assistant_only_loss
    collator = SimpleNamespace(messages_key="messages")
    left = built_for_sft(arguments={"data_collator": collator}, assistant_only_loss=True)
    assert left.base_arguments["args"].assistant_only_loss


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


def test_the_first_of_two_parameters_of_a_name_counts_and_classes_without_init_are_skipped():
    class Own(Trainer):
        def __init__(self, model="mine", **kwargs):
            raise AssertionError

    class Silent(Own):
        pass

    parameters = init_parameters([Silent, Own, Trainer])
    assert parameters["model"].default == "mine"
    assert parameters.keys() == {"self", *NAMES}

    class Closed(Trainer):
        def __init__(self, model):
            raise AssertionError

    assert init_parameters([Closed, Trainer]).keys() == {"self", "model"}


def test_arguments_that_a_trainer_does_not_take_are_dropped_if_unset_and_unexpected_if_set():
    parameters = init_parameters([Trainer])
    unused = {"other": None, "others": (None, None)}
    assert accepted_by(parameters, {"model": 1, **unused}, "MyTrainer") == {"model": 1}
    with pytest.raises(TypeError, match=r"MyTrainer.__init__\(\) got an unexpected keyword argument 'other'"):
        accepted_by(parameters, {"other": 2}, "MyTrainer")


@pytest.mark.parametrize("sizes", [(2, 1), (1, 2)])
def test_split_sequences_are_refused(sizes):
    with pytest.raises(GKDConfigError, match="set cp_size and sp_size to 1"):
        refuse_split_sequences(*sizes)
    refuse_split_sequences(1, 1)


@pytest.mark.parametrize(
    "options", [{"lmbda": 0.5}, {"lmbda": 0.0, "seq_kd": True}, {"lmbda": 0.0, "eval_on_policy": True}]
)
def test_models_that_ranks_share_unknown_to_the_rollouts_are_refused_if_any_are_made(options):
    args, off_policy = GKDArguments(**options), GKDArguments(lmbda=0.0)
    sharded = torch.nn.Linear(1, 1)
    sharded.is_distributed_loading_by_transformers = True
    for model, size, message in ((torch.nn.Linear(1, 1), 2, "set tp_size to 1"), (sharded, 1, "distributed_config")):
        with pytest.raises(GKDConfigError, match=message):
            refuse_split_models(model, size, args)
        refuse_split_models(model, size, off_policy)
    refuse_split_models(torch.nn.Linear(1, 1), 1, args)


def test_a_frozen_student_is_refused_only_for_training(tiny_model):
    teacher, student = FrozenTeacher(tiny_model(seed=1)), tiny_model().requires_grad_(False)
    refuse_student(student, teacher, is_trained=False)
    with pytest.raises(GKDConfigError, match="no parameter of the student requires a gradient"):
        refuse_student(student, teacher, is_trained=True)


@pytest.mark.parametrize("repacks", [True, False])
def test_a_4_bit_student_is_not_trained_on_a_cpu_where_forwards_repack_its_weights(tiny_model, repacks):
    teacher, student = FrozenTeacher(tiny_model(seed=1)), tiny_model()
    layer = bitsandbytes.nn.Linear4bit(32, 32, bias=False)
    layer.support_avx512bf16_for_cpu = repacks  # a property of the CPU
    student.model.layers[0].self_attn.q_proj = layer
    refuse_student(student, teacher, is_trained=False)
    with pytest.raises(GKDConfigError, match=r"4 bit on a CPU.* in 8 bit or unquant") if repacks else nullcontext():
        refuse_student(student, teacher, is_trained=True)


def test_weights_in_common_are_refused_unless_the_teacher_says_that_it_shares_them(tiny_model):
    student, other = tiny_model(), tiny_model()
    other.model.embed_tokens.weight = student.model.embed_tokens.weight

    class Sharing(FrozenTeacher):
        shares_weights = True

    with pytest.raises(GKDTeacherError, match="the teacher shares weights with the student"):
        refuse_student(student, FrozenTeacher(other), is_trained=False)
    refuse_student(student, Sharing(other), is_trained=False)


def test_a_student_with_virtual_tokens_is_refused(tiny_model):
    teacher = FrozenTeacher(tiny_model(seed=1))
    prompted = get_peft_model(tiny_model(), PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    with pytest.raises(GKDConfigError, match="learns virtual tokens"):
        refuse_student(prompted, teacher, is_trained=True)


def test_a_student_is_trained_only_if_no_trained_weight_is_offloaded(tiny_model, tmp_path):
    student = dispatch_model(tiny_model(), {"model": "cpu", "lm_head": "disk"}, offload_dir=str(tmp_path))
    teacher = FrozenTeacher(tiny_model(seed=1))
    refuse_student(student, teacher, is_trained=False)
    with pytest.raises(GKDConfigError, match="device map offloads weights that would be trained"):
        refuse_student(student, teacher, is_trained=True)


def test_several_gpus_in_one_process_are_refused():
    refuse_data_parallel(SimpleNamespace(n_gpu=1))
    with pytest.raises(GKDConfigError, match=r"2 GPUs are visible .*accelerate launch"):
        refuse_data_parallel(SimpleNamespace(n_gpu=2))


@pytest.mark.parametrize(("devices", "n_gpu"), [({"cuda:0", "cuda:1"}, 1), ({"cuda:1"}, 1), ({"cuda:0"}, 2), ((), 2)])
def test_gpus_that_a_device_map_gave_to_a_teacher_are_left_to_it(tiny_model, monkeypatch, devices, n_gpu):
    monkeypatch.setattr(construction, "accelerators_of", lambda model: {torch.device(device) for device in devices})
    args = SimpleNamespace(n_gpu=2, _n_gpu=2, device=torch.device("cuda:0"))
    leave_gpus_to(FrozenTeacher(tiny_model()), args)
    assert args._n_gpu == n_gpu
    leave_gpus_to(SelfTeacher(), args)
    assert args._n_gpu == n_gpu


def test_a_run_with_a_teacher_on_other_gpus_is_not_refused_as_data_parallel(tiny_model, config_of, monkeypatch):
    monkeypatch.setattr(construction, "accelerators_of", lambda model: {torch.device("cuda:1")})
    args = config_of(max_steps=1)
    args._n_gpu = 2
    trainer = GKDTrainer(tiny_model(), args, teacher_model=tiny_model(seed=1))
    assert trainer.args.n_gpu == 1


def test_deepspeed_that_was_asked_for_and_does_not_run_is_refused():
    refuse_dropped_deepspeed(SimpleNamespace(deepspeed="zero3.json", use_cpu=True), True)
    refuse_dropped_deepspeed(SimpleNamespace(deepspeed=None, use_cpu=True), False)
    with pytest.raises(GKDConfigError, match="deepspeed is set, but Accelerate does not run it"):
        refuse_dropped_deepspeed(SimpleNamespace(deepspeed="zero3.json", use_cpu=True), False)


def test_options_without_effect_are_logged_with_what_they_need_and_without_secrets(caplog):
    args = GKDArguments(vllm_server_api_token="s3cret", top_k=5)
    warn_of_unused([], args)
    assert not caplog.records
    warn_of_unused([("top_k", "lmbda above 0"), ("vllm_server_api_token", "vllm_mode='server'")], args)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "top_k=5 needs lmbda above 0; vllm_server_api_token=" in record.message
    assert "s3cret" not in record.message
