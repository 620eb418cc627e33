"""A trainer whose teacher has another tokenizer, off- and on-policy."""

import copy

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from gkd_trainer import FrozenTeacher, OtherTokenizerTeacher
from gkd_trainer.batch_keys import IGNORE_INDEX, TEACHER_IDS
from gkd_trainer.errors import GKDConfigError, GKDTeacherError
from gkd_trainer.signals import MODES
from gkd_trainer.teachers import comparable
from gkd_trainer.trainer.pairing import require_same_kind
from gkd_trainer.trainer.parts import teacher_prompts
from gkd_trainer.types import TokenBatch
from tests.vocabularies import sentencepiece_backend, sentencepiece_like

ROWS = [
    {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
    for question, answer in (
        ("What is the capital of France?", "The capital of France is Paris."),
        ("How are you?", "I am fine, thank you. 👍 And you?"),
        ("Count.", "one two three four five six"),
        ("Add 48 and 24.", "48 + 24 = 72."),
    )
]


@pytest.fixture(scope="module")
def other():
    """A SentencePiece-like tokenizer."""
    return sentencepiece_like(sentencepiece_backend())


@pytest.fixture
def make_other_trainer(make_trainer, tiny_model, other):
    """Make a trainer whose teacher has that tokenizer; `teacher_options` go to OtherTokenizerTeacher."""

    def make(teacher_options=None, rows=ROWS, trainer_args=None, top_k=None, **options):
        inner = FrozenTeacher(tiny_model(hidden=48, vocab=len(other), seed=1), other, top_k=top_k)
        teacher = OtherTokenizerTeacher(inner, **(teacher_options or {}))
        arguments = {"teacher": teacher, "train_dataset": Dataset.from_list(rows), **(trainer_args or {})}
        return make_trainer(trainer_args=arguments, **options)

    return make


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.mark.parametrize("mode", MODES)
def test_training_lowers_the_loss_in_every_mode(make_other_trainer, mode):
    trainer = make_other_trainer({"mode": mode}, max_steps=5, learning_rate=3e-3, max_length=256)
    trainer.train()
    losses = logged(trainer, "loss")
    assert losses[-1] < losses[0]
    assert 0 < logged(trainer, "compared_share")[0] < 1
    assert 0 < logged(trainer, "teacher_matched_mass")[0] <= 1
    assert (logged(trainer, "next_byte_share")[0] == 1) == (mode == "next_byte")


def test_students_own_completions_are_compared_too(make_other_trainer):
    trainer = make_other_trainer(lmbda=1.0, beta=1.0, max_steps=3, learning_rate=3e-3, max_length=256)
    trainer.train()
    assert all(loss > 0 for loss in logged(trainer, "loss"))
    assert logged(trainer, "on_policy_share") == [1.0, 1.0, 1.0]


def test_the_divisor_is_the_number_of_tokens_compared(make_other_trainer):
    """So that a step is the same however its rows are split over micro-batches."""
    weights, losses = [], []
    for batch_size in (4, 2, 1):
        trainer = make_other_trainer(
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=4 // batch_size,
            max_steps=2,
            max_length=256,
            optim="sgd",
            ce_weight=0.3,
        )
        trainer.train()
        weights.append(trainer.model.get_output_embeddings().weight.detach())
        losses.append(logged(trainer, "loss"))
    for index in (1, 2):
        torch.testing.assert_close(weights[index], weights[0], rtol=1e-5, atol=1e-6)
        assert losses[index] == pytest.approx(losses[0], rel=1e-4)


def test_the_loss_is_the_mean_over_compared_tokens_with_cross_entropy_on_the_datas(make_other_trainer):
    trainer = make_other_trainer(ce_weight=0.3, max_length=256)
    inputs = next(iter(trainer.get_train_dataloader()))
    found = comparable(trainer.teacher, inputs)
    is_scored = found["labels"][:, 1:] != IGNORE_INDEX
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, inputs)
    logits = trainer.model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1]
    ids_N = inputs["input_ids"][:, 1:][is_scored]
    size = trainer.teacher.vocab_size
    cross_entropy = torch.nn.functional.cross_entropy(logits[is_scored][:, :size], ids_N)
    trainer.args.ce_weight = 0.0
    divergence = trainer.compute_loss(trainer.model, inputs)
    torch.testing.assert_close(loss, 0.7 * divergence + 0.3 * cross_entropy, rtol=1e-4, atol=1e-5)


def test_rows_of_messages_get_the_teachers_prompt_by_its_own_template(make_other_trainer, other):
    trainer = make_other_trainer(max_length=256)
    batch = comparable(trainer.teacher, next(iter(trainer.get_train_dataloader())))
    for ids in batch[TEACHER_IDS]:
        text = other.decode(ids[ids != IGNORE_INDEX])
        assert text.startswith("<bos><start_of_turn>user\n")
        assert "<end_of_turn>\n<start_of_turn>model\n" in text
        assert text.rstrip("\n").endswith("<end_of_turn>")  # the template ends turns with a new line
        assert "<|im" not in text


def test_a_rows_own_prompt_for_the_teacher_is_rendered_by_its_template_or_taken_as_text(make_other_trainer, other):
    prompts = [[{"role": "user", "content": "Say it."}], None, [{"role": "user", "content": "Hi"}], None]
    rows = [{**row, "teacher_prompt": prompt} for row, prompt in zip(ROWS, prompts, strict=True)]
    trainer = make_other_trainer(rows=rows, max_length=256, lmbda=0.5, max_steps=1)
    read = [other.decode(row["teacher_prompt_ids"]) for row in trainer.train_dataset]
    turn = "<bos><start_of_turn>user\n{}<end_of_turn>\n<start_of_turn>model\n"
    assert read == [turn.format(text) for text in ("Say it.", "How are you?", "Hi", "Add 48 and 24.")]
    trainer.train()
    texts = [{"prompt": "one", "completion": " two three", "teacher_prompt": "four"}] * 4
    trainer = make_other_trainer(rows=texts)
    batch = comparable(trainer.teacher, next(iter(trainer.get_train_dataloader())))
    ids = batch[TEACHER_IDS][0]
    assert other.decode(ids[ids != IGNORE_INDEX]).startswith("<bos>four two three")


def test_rows_of_text_are_read_after_the_teachers_bos(make_other_trainer, other):
    rows = [{"prompt": "one two", "completion": " three four five"}] * 4
    trainer = make_other_trainer(rows=rows)
    batch = comparable(trainer.teacher, next(iter(trainer.get_train_dataloader())))
    ids = batch[TEACHER_IDS][0]
    assert other.decode(ids[ids != IGNORE_INDEX]) == "<bos>one two three four five<end_of_turn>"


def test_evaluation_measures_the_same_divergence(make_other_trainer):
    trainer = make_other_trainer(
        trainer_args={"eval_dataset": Dataset.from_list(ROWS)}, max_length=256, eval_on_policy=True
    )
    metrics = trainer.evaluate()
    trainer.model.eval()
    inputs = next(iter(trainer.get_eval_dataloader()))
    assert metrics["eval_loss"] == pytest.approx(trainer.compute_loss(trainer.model, inputs).item(), rel=1e-5)
    assert metrics["eval_on_policy_loss"] > 0
    assert 0 < metrics["eval_teacher_matched_mass"] <= 1
    assert trainer.predict(Dataset.from_list(ROWS)).predictions.shape[0] == 4


def test_a_teacher_of_top_tokens_is_compared_over_those_that_the_student_has(make_other_trainer):
    trainer = make_other_trainer(top_k=8, max_steps=3, learning_rate=3e-3, max_length=256)
    trainer.train()
    assert logged(trainer, "loss")[-1] < logged(trainer, "loss")[0]
    assert 0 < logged(trainer, "teacher_top_k_mass")[0] < 1


@pytest.fixture
def other_dir(tiny_model, other, tmp_path):
    """The folder of a teacher with its tokenizer."""
    tiny_model(hidden=48, vocab=len(other), seed=1).save_pretrained(tmp_path / "teacher")
    other.save_pretrained(tmp_path / "teacher")
    return str(tmp_path / "teacher")


def test_options_make_the_same_teacher(make_trainer, make_other_trainer, other_dir):
    rows = {"train_dataset": Dataset.from_list(ROWS)}
    options = {"max_steps": 2, "max_length": 256}
    by_name = make_trainer(
        trainer_args={**rows, "teacher_model": None},
        teacher_model_name_or_path=other_dir,
        teacher_vocabulary_mode="matched",
        teacher_min_matched_mass=0.5,
        **options,
    )
    by_object = make_other_trainer({"min_matched_mass": 0.5}, **options)
    for trainer in (by_name, by_object):
        trainer.train()
    assert logged(by_name, "loss") == pytest.approx(logged(by_object, "loss"), rel=1e-5)


def test_another_tokenizer_is_refused_without_a_mode_and_the_remedy_is_named(make_trainer, other_dir):
    with pytest.raises(GKDTeacherError, match=r"set teacher_vocabulary_mode='matched'.*OtherTokenizerTeacher"):
        make_trainer(trainer_args={"teacher_model": other_dir})


def test_a_tokenizer_by_name_is_taken_or_refused(make_trainer, other_dir, tiny_model, other, tmp_path):
    options = {"teacher_vocabulary_mode": "matched", "max_length": 256}
    given = {"teacher_model": tiny_model(hidden=48, vocab=len(other)), "train_dataset": Dataset.from_list(ROWS)}
    trainer = make_trainer(trainer_args=given, teacher_tokenizer_name_or_path=other_dir, **options)
    assert trainer.teacher.tokenizer.get_vocab() == other.get_vocab()
    (tmp_path / "empty").mkdir()
    with pytest.raises(GKDTeacherError, match=r"teacher_tokenizer_name_or_path='.*empty' has no tokenizer"):
        make_trainer(trainer_args=given, teacher_tokenizer_name_or_path=str(tmp_path / "empty"), **options)
    with pytest.raises(GKDTeacherError, match="set teacher_tokenizer_name_or_path"):
        make_trainer(trainer_args=given, **options)


def test_a_mode_for_a_teacher_that_has_its_own_is_refused(make_other_trainer):
    with pytest.raises(GKDTeacherError, match="has no effect on a teacher that maps vocabularies itself"):
        make_other_trainer(teacher_vocabulary_mode="matched")


def test_a_teacher_whose_tokens_bytes_are_unknown_is_refused_at_construction(make_trainer, tiny_model):
    backend = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, name_or_path="bert-like")
    teacher = FrozenTeacher(tiny_model(hidden=48), tokenizer)
    with pytest.raises(GKDTeacherError, match=r"bert-like\) can't be known, since its decoder is WordPiece"):
        make_trainer(trainer_args={"teacher": teacher}, teacher_vocabulary_mode="matched")


@pytest.mark.parametrize("name", ["packing", "padding_free", "eval_packing"])
def test_options_that_join_samples_are_refused(make_other_trainer, name):
    trainer = make_other_trainer(max_length=256)
    args = copy.copy(trainer.args)
    setattr(args, name, True)
    with pytest.raises(GKDConfigError, match=f"{name}=True joins samples .* in tokens of its own: set {name}=False"):
        teacher_prompts(trainer.teacher, None, args, trainer.model)


def test_a_student_that_is_an_encoder_decoder_is_refused(tiny_encoder_decoder, other):
    teacher = OtherTokenizerTeacher(FrozenTeacher(tiny_encoder_decoder(seed=1), other))
    with pytest.raises(GKDTeacherError, match=r"is an encoder-decoder, but a teacher with another tokenizer reads"):
        require_same_kind(tiny_encoder_decoder(), teacher)


def test_a_first_token_which_nothing_predicts_is_not_counted_as_one_that_can_not_be_compared(make_other_trainer):
    trainer = make_other_trainer(rows=[{"text": "one two three four"}] * 4, max_steps=1)
    inputs = next(iter(trainer.get_train_dataloader()))
    found = comparable(trainer.teacher, inputs)
    assert (inputs["labels"] != found["labels"]).sum() == 4
    assert TokenBatch.from_inputs(inputs).n_scored == TokenBatch.from_inputs(found).n_scored
    trainer.train()
    assert logged(trainer, "compared_share") == []


def test_a_run_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(make_other_trainer):
    options = {"lmbda": 0.5, "max_steps": 4, "save_steps": 2, "save_strategy": "steps", "max_length": 256}
    whole = make_other_trainer(**options)
    whole.train()
    resumed = make_other_trainer(**options)
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-2")
    assert logged(resumed, "loss") == pytest.approx(logged(whole, "loss"), rel=1e-6)
