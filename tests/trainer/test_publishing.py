"""The card that a trainer writes: Trainer's metadata, PEFT's for an adapter, and its place in SFTTrainer."""

import json
from dataclasses import dataclass

import pytest
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from transformers.modelcard import TrainingSummary
from trl import SFTConfig, SFTTrainer

from gkd_trainer import FrozenTeacher, GKDArguments, GKDConfig, GKDMixin, OtherTokenizerTeacher
from gkd_trainer.report.model_card import CARD_TAGS
from gkd_trainer.trainer import publishing
from tests.vision import make_model, make_processor


@dataclass
class MyConfig(GKDArguments, SFTConfig):
    pass


class MySFT(GKDMixin, SFTTrainer):
    pass


@pytest.fixture
def readme(tmp_path):
    return lambda: ModelCard.load(tmp_path / "run" / "README.md")


def test_the_trainers_card_has_its_metadata_and_evaluations(make_trainer, token_rows, readme, tiny_model):
    student = tiny_model()
    student.config._name_or_path = "org/student"
    trainer = make_trainer(
        trainer_args={"model": student, "eval_dataset": token_rows(4)}, eval_strategy="steps", eval_steps=1
    )
    trainer.train()
    trainer.create_model_card("en", "mit", ["mine"], "my-student", dataset_name="org/data")
    data = readme().data
    assert (data.base_model, data.datasets, data.license, data.language) == ("org/student", ["org/data"], "mit", ["en"])
    assert {"gkd", "knowledge-distillation", "generated_from_trainer", "mine"} <= set(data.tags)
    table = readme().text.partition("### Training results")[2]
    assert "| Training Loss | Epoch | Step | Validation Loss |" in table
    assert "# my-student\n" in readme().text


def test_a_card_names_the_students_task_and_how_another_tokenizer_was_compared(tiny_model, byte_level, tmp_path):
    student = make_model("qwen2.5", make_processor("qwen2.5").tokenizer)
    teacher = OtherTokenizerTeacher(FrozenTeacher(tiny_model(), byte_level()), mode="uld")
    for model, task in ((student, "image-text-to-text"), (tiny_model(), "text-generation")):
        path = tmp_path / "README.md"
        facts = {"args": GKDConfig(output_dir="unused"), "model": model, "teacher": teacher, "dataset": None}
        publishing.write_card(path, TrainingSummary(model_name="my-student"), **facts)
        assert ModelCard.load(path).data.pipeline_tag == task
        assert "| divergence | sum of the differences between sorted probabilities (ULD) |" in path.read_text()


def test_a_second_card_keeps_the_tags_of_the_first(make_trainer, readme):
    trainer = make_trainer()
    trainer.create_model_card(tags="first")
    trainer.create_model_card(tags=["second"])
    assert {"first", "second", "gkd"} <= set(readme().data.tags)
    assert readme().data.tags.count("gkd") == 1


def test_an_adapters_card_keeps_what_peft_wrote(make_trainer, readme, tiny_model, tmp_path):
    tiny_model().save_pretrained(tmp_path / "student")
    adapter = LoraConfig(r=2, target_modules=["q_proj"])
    trainer = make_trainer(trainer_args={"model": str(tmp_path / "student"), "peft_config": adapter})
    trainer.save_model()
    trainer.create_model_card()
    data = readme().data
    assert data.library_name == "peft"
    assert {"lora", "transformers", "gkd", "knowledge-distillation"} <= set(data.tags)
    assert "- PEFT " in readme().text
    assert str(tmp_path) not in str(readme())
    config = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "student")  # which loading the adapter needs


def test_the_card_of_an_sfttrainers_checkpoint_is_ours(config, token_rows, tiny_model, byte_level, readme):
    trainer = MySFT(
        model=tiny_model(),
        args=config(MyConfig, bf16=False, save_strategy="steps", save_steps=1, max_steps=1),
        train_dataset=token_rows(),
        processing_class=byte_level(),
        teacher_model=tiny_model(hidden=48, seed=1),
    )
    trainer.train()  # TRL writes a card with every checkpoint
    assert "generalised knowledge distillation" in readme().text
    assert {"gkd", "trl", "sft"} <= set(readme().data.tags)


def test_a_pushed_student_has_its_card(make_trainer, readme, monkeypatch):
    trainer = make_trainer(max_steps=1)
    pushed = {}
    monkeypatch.setattr(trainer, "init_hf_repo", lambda token=None: setattr(trainer, "hub_model_id", "me/my-student"))
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", lambda _, **options: pushed.update(options))
    trainer.push_to_hub(dataset="org/data")
    assert pushed["repo_id"] == "me/my-student"
    assert "on [org/data](https://huggingface.co/datasets/org/data)" in readme().text


@pytest.mark.parametrize("is_lora", [False, True])
@pytest.mark.parametrize("content", [b"# My own words", b"---\na: [\n---\nbroken", b"---\n- a\n---\n", b"\xff\xfe"])
def test_a_readme_that_is_the_users_or_unreadable_stays(make_trainer, tmp_path, content, is_lora, caplog):
    path = tmp_path / "run" / "README.md"
    path.parent.mkdir()
    path.write_bytes(content)
    trainer = make_trainer(trainer_args={"peft_config": LoraConfig()} if is_lora else {})
    trainer.save_model()  # PEFT writes a card of its own
    trainer.create_model_card()
    assert path.read_bytes() == content
    assert [file.name for file in path.parent.glob("README*")] == ["README.md"]
    assert caplog.text.count("with a model card") == 1


def test_a_card_that_a_trainer_wrote_is_replaced(make_trainer, readme):
    make_trainer().create_model_card(dataset="org/older")
    make_trainer().create_model_card(dataset="org/newer")
    assert readme().data.datasets == ["org/newer"]


OWN = "# My own words\n"
OURS = (
    "---\nlibrary_name: transformers\ntags:\n- generated_from_trainer\n- older\n- base_model:adapter:x\n---\n# A run\n"
)
OF_PEFT = "---\nlibrary_name: peft\ntags:\n- lora\n---\n# An adapter\n"


@pytest.mark.parametrize(
    ("card", "tags", "expected"),
    [
        (None, None, ["trl", *CARD_TAGS]),
        (None, "mine", ["mine", "trl", *CARD_TAGS]),
        (None, ["mine", "gkd"], ["mine", "gkd", "trl", *CARD_TAGS[1:]]),
        (OURS, ["mine"], ["mine", "generated_from_trainer", "older", "trl", *CARD_TAGS[:2]]),
        (OF_PEFT, None, ["lora", "trl", *CARD_TAGS]),
    ],
)
def test_tags_are_those_given_those_of_the_last_card_the_trainers_and_ours_each_once(tmp_path, card, tags, expected):
    path = tmp_path / "README.md"
    if card is not None:
        path.write_text(card)
    assert publishing.card_tags(path, tags, ["trl"]) == expected


def test_a_card_by_the_user_has_no_tags_to_write(tmp_path, caplog):
    path = tmp_path / "README.md"
    path.write_text(OWN)
    assert publishing.card_tags(path, "mine") is None
    assert caplog.text.count(f"Not overwriting {path} with a model card") == 1


def overwrite(path):
    assert not path.exists() or path.read_text() != OWN
    path.write_text("# Of PEFT\n")


@pytest.mark.parametrize(("card", "left"), [(OWN, OWN), (OURS, "# Of PEFT\n"), (None, "# Of PEFT\n")])
def test_a_card_by_the_user_is_moved_aside_while_others_write(tmp_path, card, left):
    path = tmp_path / "README.md"
    if card is not None:
        path.write_text(card)
    with publishing.keeping_own(path):
        overwrite(path)
    assert path.read_text() == left
    assert [file.name for file in tmp_path.iterdir()] == ["README.md"]


def test_a_card_by_the_user_is_restored_after_a_failure(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(OWN)
    with pytest.raises(OSError, match="full"), publishing.keeping_own(path):
        raise OSError("full")
    assert path.read_text() == OWN


def test_data_sets_are_tagged_only_by_names_on_the_hub(tmp_path):
    assert publishing.tags_of_datasets("org/data") == ["org/data"]
    assert publishing.tags_of_datasets(["org/data", "json", str(tmp_path), "a/b/c"]) == ["org/data"]
    assert publishing.tags_of_datasets(None) == []


def test_a_student_from_the_hub_has_a_source_even_in_an_adapter(tiny_model, tmp_path):
    student = tiny_model()
    assert publishing.source_on_hub(student) == ""
    student.config._name_or_path = str(tmp_path)
    assert publishing.source_on_hub(student) == ""
    student.config._name_or_path = "org/student"
    adapted = get_peft_model(student, LoraConfig(target_modules=["q_proj"]))
    assert publishing.source_on_hub(student) == publishing.source_on_hub(adapted) == "org/student"
