"""GKDTrainer in place of Trainer and of TRL's GKDTrainer, and in front of other trainers."""

import inspect
from dataclasses import dataclass

import pytest
import torch
from datasets import Dataset
from packaging.version import Version
from peft import LoraConfig, PeftModel
from transformers import DataCollatorForLanguageModeling, default_data_collator
from trl import SFTConfig, SFTTrainer
from trl.experimental.gkd import GKDConfig as TRLGKDConfig
from trl.experimental.gkd import GKDTrainer as TRLGKDTrainer
from trl.experimental.utils import DataCollatorForChatML

from gkd_trainer import GKDArguments, GKDConfigError, GKDMixin, GKDTrainer
from gkd_trainer.batch_keys import ROW_KEY
from tests.versions import TRL

MESSAGES = [
    [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "I am fine"}],
    [
        {"role": "system", "content": "You are helpful."},
        {"role": "user", "content": "one two"},
        {"role": "assistant", "content": "three four five"},
    ],
]


@dataclass
class MyConfig(GKDArguments, SFTConfig):
    pass


class MySFT(GKDMixin, SFTTrainer):
    pass


def test_every_argument_of_trls_trainer_is_taken_by_keyword():
    assert inspect.signature(TRLGKDTrainer.__init__).parameters.keys() <= (
        inspect.signature(GKDTrainer.__init__).parameters.keys()
    )


def test_call_written_for_trl_runs(tiny_model, byte_level, config):
    trainer = GKDTrainer(
        model=tiny_model(),
        teacher_model=tiny_model(hidden=48, seed=1),
        args=config(lmbda=0.5, beta=0.5, temperature=0.9, max_new_tokens=4, seq_kd=False, disable_dropout=True),
        processing_class=byte_level(),
        train_dataset=Dataset.from_list([{"messages": row} for row in MESSAGES * 4]),
        eval_dataset=Dataset.from_list([{"messages": row} for row in MESSAGES]),
    )
    trainer.train()
    assert trainer.state.global_step == 2
    assert trainer.evaluate()["eval_loss"] > 0


def test_trls_collator_reads_its_messages(tiny_model, byte_level, config):
    trainer = GKDTrainer(
        model=tiny_model(),
        teacher_model=tiny_model(hidden=48, seed=1),
        args=config(lmbda=0.5),
        processing_class=byte_level(),
        data_collator=DataCollatorForChatML(tokenizer=byte_level(), max_length=64),
        train_dataset=Dataset.from_list([{"messages": row} for row in MESSAGES * 4]),
    )
    trainer.train()
    assert trainer.state.log_history[0]["loss"] > 0
    assert trainer.state.log_history[0]["on_policy_share"] > 0


def test_static_loss_gives_what_trls_gives():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 5, 11), torch.randn(2, 5, 11)
    labels = torch.tensor([[-100, 1, 2, 3, -100], [4, 5, -100, -100, 6]])
    for beta in (0.0, 0.5, 1.0):
        ours = GKDTrainer.generalized_jsd_loss(student, teacher, labels, beta, 2.0)
        assert ours.item() == pytest.approx(
            TRLGKDTrainer.generalized_jsd_loss(student, teacher, labels, beta, 2.0).item(), rel=1e-5
        )


def test_generation_config_is_that_of_trls_trainer(make_trainer, tiny_model, byte_level, tmp_path):
    rows = Dataset.from_list([{"messages": row} for row in MESSAGES])
    options = {"temperature": 0.7, "max_new_tokens": 5, "max_length": 64, "report_to": [], "use_cpu": True}
    theirs = TRLGKDTrainer(
        model=tiny_model(eos=[2, 7]),
        teacher_model=tiny_model(seed=1),
        args=TRLGKDConfig(output_dir=str(tmp_path), bf16=False, gradient_checkpointing=False, **options),
        train_dataset=rows,
        processing_class=byte_level(),
    ).generation_config
    ours = make_trainer(trainer_args={"model": tiny_model(eos=[2, 7])}, lmbda=0.5, **options).generation_config
    differs = {
        name: (value, getattr(ours, name))
        for name, value in vars(theirs).items()
        if getattr(ours, name) != value and not name.startswith("_")
    }
    # Of which 1 is none; the trainers of older versions leave top_p out too.
    assert differs.items() >= {"repetition_penalty": (None, 1.0)}.items()
    assert differs.keys() <= {"repetition_penalty"} | ({"top_p"} if Version("1.15") > TRL else set())
    sampled = make_trainer(lmbda=0.5, top_k=7, min_p=0.1, generation_kwargs={"min_new_tokens": 2}).generation_config
    assert (sampled.top_k, sampled.min_p, sampled.min_new_tokens) == (7, 0.1, 2)


def test_subclass_generates_by_the_method_and_the_attribute_of_trls_trainer(make_trainer):
    class Mine(GKDTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            prompts = {"prompts": inputs["input_ids"][:, :2], "prompt_attention_mask": inputs["attention_mask"][:, :2]}
            new = self.generate_on_policy_outputs(model, prompts, self.generation_config)
            inputs.update(zip(("input_ids", "attention_mask", "labels"), new, strict=True))
            return super().training_step(model, inputs, num_items_in_batch)

    trainer = make_trainer(trainer_class=Mine, max_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] > 0


def test_student_without_pad_token_gets_the_tokenizers(make_trainer, tiny_model, byte_level):
    tokenizer = byte_level()
    tokenizer.pad_token = "<|endoftext|>"
    pad = tokenizer.pad_token_id
    assert pad != 2
    made = make_trainer(trainer_args={"model": tiny_model(pad_token_id=None), "processing_class": tokenizer}).model
    assert (made.config.pad_token_id, made.generation_config.pad_token_id) == (pad, pad)
    arguments = {"model_init": lambda: tiny_model(pad_token_id=None), "processing_class": tokenizer}
    trainer = make_trainer(trainer_args=arguments, max_steps=1)
    trainer.train()
    assert trainer.model.config.pad_token_id == pad


def test_tokenizer_beside_the_student_that_model_init_makes_is_found(make_trainer, tiny_model, byte_level, tmp_path):
    tokenizer = byte_level()
    tokenizer.pad_token = "<|endoftext|>"
    tiny_model().save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    load = type(tiny_model()).from_pretrained
    arguments = {
        "model_init": lambda: load(tmp_path / "student"),
        "processing_class": None,
        "train_dataset": Dataset.from_list([{"messages": row} for row in MESSAGES * 4]),
    }
    trainer = make_trainer(trainer_args=arguments, max_steps=1)
    assert trainer.processing_class.get_vocab() == tokenizer.get_vocab()
    assert trainer.data_collator.pad_token_id == tokenizer.pad_token_id
    trainer.train()
    assert trainer.state.log_history[0]["loss"] > 0


def test_configuration_of_trl_with_a_short_max_length_is_taken(tiny_model, byte_level, tmp_path):
    args = TRLGKDConfig(output_dir=str(tmp_path), max_length=64, bf16=False, use_cpu=True, report_to=[])
    rows = Dataset.from_list([{"messages": messages} for messages in MESSAGES])
    common = {"processing_class": byte_level(), "train_dataset": rows, "teacher_model": tiny_model(seed=1)}
    trainer = GKDTrainer(model=tiny_model(), args=args, **common)
    assert (trainer.args.max_length, trainer.args.max_new_tokens) == (64, 32)


def sft_trainer(config, tiny_model, byte_level, rows, **options):
    return MySFT(
        model=tiny_model(),
        args=config(MyConfig, bf16=False, **options),
        train_dataset=Dataset.from_list(rows),
        processing_class=byte_level(),
        teacher_model=tiny_model(hidden=48, seed=1),
    )


def test_mixin_in_front_of_sfttrainer_trains_what_gkdtrainer_trains(tiny_model, byte_level, config):
    rows = [{"messages": messages, "topic": "any"} for messages in MESSAGES * 4]
    shared = {"lmbda": 0.5, "gradient_checkpointing": False, "gradient_accumulation_steps": 2, "learning_rate": 1e-3}
    sft = sft_trainer(config, tiny_model, byte_level, rows, **shared)
    plain = GKDTrainer(
        model=tiny_model(),
        args=config(**shared),
        train_dataset=Dataset.from_list(rows),
        processing_class=byte_level(),
        teacher_model=tiny_model(hidden=48, seed=1),
    )
    logs = []
    for trainer in (sft, plain):
        trainer.train()
        logs.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert logs[0] == pytest.approx(logs[1], rel=1e-6)
    labels = sft.train_dataset[0]["labels"]
    assert sft.processing_class.decode([label for label in labels if label != -100]) == "I am fine<|im_end|>"


def test_sfttrainer_wraps_and_loads_by_itself(tiny_model, byte_level, config, tmp_path):
    tiny_model().save_pretrained(tmp_path / "student")
    byte_level().save_pretrained(tmp_path / "student")
    trainer = MySFT(
        model=str(tmp_path / "student"),
        args=config(MyConfig, bf16=False),
        train_dataset=Dataset.from_list([{"messages": messages} for messages in MESSAGES * 4]),
        teacher_model=tiny_model(seed=1),
        peft_config=LoraConfig(r=2, target_modules=["q_proj"]),
    )
    trainer.train()
    assert isinstance(trainer.model, PeftModel)
    assert trainer.state.log_history[0]["loss"] > 0


def test_packed_rows_have_the_loss_of_single_rows(tiny_model, byte_level, config):
    rows = [{"messages": messages} for messages in MESSAGES * 2]
    packed = sft_trainer(config, tiny_model, byte_level, rows, packing=True, max_length=128, lmbda=0.0, max_steps=1)
    single = sft_trainer(config, tiny_model, byte_level, rows, lmbda=0.0, max_steps=1)
    assert len(packed.train_dataset) < len(single.train_dataset)
    for trainer in (packed, single):
        trainer.train()
    assert packed.state.log_history[0]["loss"] == pytest.approx(single.state.log_history[0]["loss"], rel=1e-4)


def test_packing_drops_the_keys_of_rows_with_a_warning(tiny_model, byte_level, config, caplog):
    rows = [{"messages": messages, ROW_KEY: key} for key, messages in enumerate(MESSAGES)]
    trainer = sft_trainer(config, tiny_model, byte_level, rows, packing=True, max_length=128, lmbda=0.0)
    assert ROW_KEY not in trainer.train_dataset.column_names
    assert "train: packing joins rows, so the column row_key is dropped" in caplog.messages


@pytest.mark.parametrize("mask", ["completion_mask", "assistant_masks"])
def test_rows_with_a_mask_in_place_of_labels_are_taken_in_front_of_sfttrainer(tiny_model, byte_level, config, mask):
    rows = [{"input_ids": [5, 6, 7, 8, 2], mask: [0, 0, 0, 1, 1]}] * 4
    trainer = sft_trainer(config, tiny_model, byte_level, rows, lmbda=0.0)
    assert trainer.train_dataset[0]["labels"] == [-100, -100, -100, 8, 2]
    assert trainer.evaluate(Dataset.from_list(rows))["eval_loss"] > 0


def test_assistant_only_loss_needs_no_template_that_trl_can_patch(tiny_model, byte_level, config):
    rows = [{"messages": messages} for messages in MESSAGES]
    trained = [
        list(sft_trainer(config, tiny_model, byte_level, rows, lmbda=0.0, **options).train_dataset["labels"])
        for options in ({}, {"assistant_only_loss": True})
    ]
    assert trained[0] == trained[1]


def test_a_configuration_that_trls_trainer_has_used_can_be_used_here(tiny_model, byte_level, tmp_path):
    args = TRLGKDConfig(output_dir=str(tmp_path), lmbda=0.0, bf16=False, use_cpu=True, report_to=[], max_steps=1)
    args.remove_unused_columns, args.dataset_kwargs = False, {"skip_prepare_dataset": True}  # as that trainer sets them
    trainer = GKDTrainer(
        model=tiny_model(),
        args=args,
        train_dataset=Dataset.from_list([{"messages": messages} for messages in MESSAGES]),
        processing_class=byte_level(),
        teacher_model=tiny_model(seed=1),
    )
    trainer.train()
    assert trainer.state.global_step == 1


@pytest.mark.parametrize("family", ["llama", "t5_untied"])
def test_the_collator_that_can_not_pad_may_be_set_later(make_trainer, tiny_model, tiny_encoder_decoder, family):
    make = tiny_encoder_decoder if family == "t5_untied" else tiny_model
    trainer = make_trainer(trainer_args={"model": make(family), "teacher_model": make(family, seed=1)}, max_steps=1)
    trainer.data_collator = default_data_collator
    trainer.train()


@pytest.mark.parametrize("is_made_late", [False, True])
def test_the_collator_that_can_not_pad_takes_rows_padded_to_different_lengths(make_trainer, tiny_model, is_made_late):
    rows = [
        {
            "input_ids": ids + [2] * (6 - len(ids)),
            "attention_mask": [1] * len(ids) + [0] * (6 - len(ids)),
            "weight": 0.5,
        }
        for ids in ([5, 6, 7], [5, 6, 7, 8, 9])
    ]
    arguments = {"data_collator": default_data_collator, "train_dataset": Dataset.from_list(rows)}
    if is_made_late:
        arguments["model_init"] = lambda: tiny_model()
    trainer = make_trainer(trainer_args=arguments, max_steps=1, remove_unused_columns=False)
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["attention_mask"].sum() == 8
    assert batch["weight"].tolist() == [0.5, 0.5]
    trainer = make_trainer(trainer_args=arguments, max_steps=1)
    trainer.train()


def test_sfttrainer_with_a_configuration_that_has_no_distillation_options_is_refused(
    tiny_model, byte_level, config, tmp_path
):
    with pytest.raises(GKDConfigError, match=r"class MyConfig\(GKDArguments, trl.SFTConfig\)"):
        MySFT(
            model=tiny_model(),
            args=SFTConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True),
            train_dataset=Dataset.from_list([{"text": "hello"}]),
            teacher_model=tiny_model(seed=1),
        )


def test_configuration_of_trl_itself_is_taken_over(tiny_model, byte_level, tmp_path):
    args = TRLGKDConfig(
        output_dir=str(tmp_path), lmbda=0.25, beta=0.1, temperature=0.8, bf16=False, use_cpu=True, report_to=[]
    )
    rows = Dataset.from_list([{"messages": messages} for messages in MESSAGES])
    common = {"processing_class": byte_level(), "train_dataset": rows, "teacher_model": tiny_model(seed=1)}
    trainer = GKDTrainer(model=tiny_model(), args=args, **common)
    assert (trainer.args.lmbda, trainer.args.beta, trainer.args.temperature) == (0.25, 0.1, 0.8)
    args.packing = True
    with pytest.raises(GKDConfigError, match="packing: options of GKDConfig that GKDConfig does not have"):
        GKDTrainer(model=tiny_model(), args=args, **common)


def test_a_trainer_whose_init_passes_arguments_on_is_recognised_by_the_next_class(
    tiny_model, byte_level, config, tmp_path
):
    class CompanySFT(SFTTrainer):
        def __init__(self, *args, my_option=1, **kwargs):
            super().__init__(*args, **kwargs)
            self.my_option = my_option

    class Mine(GKDMixin, CompanySFT):
        pass

    trainer = Mine(
        model=tiny_model(),
        args=config(MyConfig, bf16=False),
        train_dataset=Dataset.from_list([{"messages": messages} for messages in MESSAGES * 4]),
        processing_class=byte_level(),
        teacher_model=tiny_model(seed=1),
        my_option=3,
    )
    assert trainer.my_option == 3
    assert trainer.args.dataset_kwargs["skip_prepare_dataset"] is True


def test_model_card_takes_the_name_that_trl_gives_the_data_set(make_trainer, tmp_path):
    trainer = make_trainer()
    trainer.create_model_card(dataset_name="some/data")
    assert "some/data" in (tmp_path / "run" / "README.md").read_text()


def test_collators_of_transformers_train_on_the_rows_labels(make_trainer, byte_level):
    losses = []
    for side in (None, "left", "right"):
        tokenizer = byte_level()
        arguments = {}
        if side is not None:
            tokenizer.padding_side = side
            arguments["data_collator"] = DataCollatorForLanguageModeling(tokenizer, mlm=False)
        trainer = make_trainer(trainer_args=arguments, max_steps=1, lmbda=0.5)
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[1:] == pytest.approx(losses[:1] * 2, rel=1e-5)


def test_options_are_attributes_as_in_trls_trainer(make_trainer):
    trainer = make_trainer(lmbda=0.25, beta=0.75, temperature=0.5)
    assert (trainer.lmbda, trainer.beta, trainer.temperature, trainer.seq_kd) == (0.25, 0.75, 0.5, False)
    trainer.beta = 0.0  # takes effect
    assert trainer.args.beta == 0.0


def test_part_of_a_packed_set_stays_packed_as_it_is(tiny_model, byte_level, config):
    trainer = MySFT(
        model=tiny_model(),
        teacher_model=tiny_model(hidden=48, seed=1),
        args=config(MyConfig, packing=True, packing_strategy="bfd", bf16=False),
        processing_class=byte_level(),
        train_dataset=Dataset.from_list([{"messages": row} for row in MESSAGES * 4]),
    )
    before = trainer.data_collator([trainer.train_dataset[index] for index in range(2)])
    trainer.train_dataset = trainer.train_dataset.select(range(2))
    trainer.get_train_dataloader()
    after = trainer.data_collator(list(trainer.train_dataset))
    for name in ("input_ids", "labels", "position_ids"):
        assert after[name].tolist() == before[name].tolist(), name
    assert (before["position_ids"] == 0).sum() > 2
