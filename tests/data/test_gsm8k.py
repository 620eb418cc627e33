"""GSM8K: rows become conversations, and a completion's final number is found."""

import json
import os
from decimal import Decimal
from pathlib import Path

import pytest

from gkd_trainer.batch_keys import IGNORE_INDEX
from gkd_trainer.data import gsm8k, prepare_dataset
from gkd_trainer.errors import GKDDataError

GSM8K_DIR = Path(os.environ.get("GSM8K_DIR", Path(__file__).parents[3] / "shared" / "data" / "gsm8k"))

ROW = {"question": "How many are 2 and 40?", "answer": "2 + 40 = <<2+40=42>>42\n#### 42"}


def test_the_prompt_is_the_question_unmodified():
    assert gsm8k.to_prompt(ROW) == {
        "prompt": [{"role": "user", "content": ROW["question"]}],
        "ground_truth": "42",
    }


def test_the_conversation_ends_with_the_answer():
    assert gsm8k.to_conversation(ROW) == {
        "messages": [
            {"role": "user", "content": ROW["question"]},
            {"role": "assistant", "content": ROW["answer"]},
        ],
        "ground_truth": "42",
    }


@pytest.mark.parametrize("answer", ["no mark 42", "#### none", None, {"value": "#### 42"}], ids=str)
def test_a_row_is_a_problem_only_with_a_marked_number(answer):
    assert gsm8k.is_problem(ROW)
    assert not gsm8k.is_problem({**ROW, "answer": answer})


def test_an_instruction_follows_the_question():
    for convert, column in ((gsm8k.to_prompt, "prompt"), (gsm8k.to_conversation, "messages")):
        content = convert(ROW, gsm8k.INSTRUCTION)[column][0]["content"]
        assert content == f"{ROW['question']}\n\n{gsm8k.INSTRUCTION}"


@pytest.mark.parametrize(
    ("written", "plain"),
    [
        ("42", "42"),
        ("1,234", "1234"),
        ("$1,234,567.50", "1234567.5"),
        ("-3", "-3"),
        ("-$3", "-3"),
        ("$-3", "-3"),
        ("\u22123", "-3"),
        ("+5", "5"),
        ("0.25", "0.25"),
        (".5", "0.5"),
        ("1000", "1000"),
        ("5.0", "5"),
        ("-0", "0"),
    ],
)
def test_the_ground_truth_is_plain_digits(written, plain):
    assert gsm8k.ground_truth(f"7 and 8 give it.\n#### {written}") == plain


def test_an_answer_without_a_number_after_the_mark_is_refused():
    for answer in ("42", "42 ####", "42 #### none"):
        with pytest.raises(GKDDataError, match="#### <number>"):
            gsm8k.ground_truth(answer)


@pytest.mark.parametrize(
    ("completion", "number"),
    [
        ("2 + 3 = 5\n#### 5\nThat took 2 steps.", "5"),
        ("#### 1,234", "1234"),
        ("#### $18.00", "18.00"),
        ("####-7", "-7"),
        ("#### x = 12 apples", "12"),
        ("#### 3\n#### 4", "4"),
        ("#### 3\n####", "3"),
        ("The answer is 42, after 3 steps.", "42"),
        ("the ANSWER is: $1,000.", "1000"),
        ("The answer is 5. So #### 6", "6"),
        ("There are 3 boxes of 4, so 12.", "12"),
        ("16-3=13", "13"),
        ("She has 16-3", "3"),
        ("(2)-5", "5"),
        ("It is -5", "-5"),
        ("It costs -$5.25.", "-5.25"),
        ("He pays 12.50 dollars.", "12.50"),
        ("half is .5", "0.5"),
        ("choose 2,3", "3"),
        ("10,000 people", "10000"),
        ("15%", "15"),
    ],
)
def test_the_final_number_of_a_completion(completion, number):
    assert gsm8k.final_number(completion) == Decimal(number)


def test_a_completion_without_digits_has_no_final_number():
    assert gsm8k.final_number("I do not know.") is None
    assert not gsm8k.is_correct("I do not know.", "0")


def test_numbers_are_compared_by_value():
    assert gsm8k.is_correct("It costs $1,234.50.", "1234.5")
    assert gsm8k.is_correct("#### 42.0", "42")
    assert not gsm8k.is_correct("#### 42", "-42")
    assert not gsm8k.is_correct("#### 4.2", "42")


@pytest.fixture
def folder(tmp_path):
    for split, n_rows in (("train", 3), ("test", 2)):
        lines = [json.dumps({"question": f"{split} {i}?", "answer": f"#### {i}"}) for i in range(n_rows)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    return tmp_path


def test_a_folder_is_loaded_by_split(folder):
    train = gsm8k.load(folder)
    assert train.column_names == ["messages", "ground_truth"]
    assert train["ground_truth"][:] == ["0", "1", "2"]
    assert train[0]["messages"][0]["content"] == "train 0?"
    assert gsm8k.load(folder, "test", limit=1)["ground_truth"][:] == ["0"]
    assert len(gsm8k.load(folder, limit=99)) == 3


def test_a_file_is_loaded_as_prompts(folder):
    prompts = gsm8k.load(str(folder / "test.jsonl"), form="prompt", instruction="Think.")
    assert sorted(prompts.column_names) == ["ground_truth", "prompt"]
    assert prompts[1]["prompt"] == [{"role": "user", "content": "test 1?\n\nThink."}]


def test_the_hub_is_asked_for_its_main_configuration(monkeypatch, folder):
    asked = []

    def load_dataset(*names, split):
        asked.append((*names, split))
        return gsm8k.Dataset.from_list([ROW])

    monkeypatch.setattr(gsm8k, "load_dataset", load_dataset)
    assert gsm8k.load(split="test")["ground_truth"][:] == ["42"]
    assert asked == [("openai/gsm8k", "main", "test")]


def test_a_missing_split_or_an_unknown_form_is_refused(folder):
    with pytest.raises(GKDDataError, match=r"expected validation\.jsonl"):
        gsm8k.load(folder, "validation")
    with pytest.raises(GKDDataError, match="form must be"):
        gsm8k.load(folder, form="chat")


@pytest.mark.skipif(not GSM8K_DIR.is_dir(), reason=f"GSM8K is not in {GSM8K_DIR} (set GSM8K_DIR)")
def test_real_rows_are_trained_on_exactly_their_answers(byte_level, rules):
    tokenizer = byte_level()
    rows = gsm8k.load(GSM8K_DIR, "test", limit=50)
    prepared = prepare_dataset(rows, tokenizer, rules())
    assert len(prepared) == 50
    for row in prepared:
        answer = row["messages"][1]["content"]
        trained = [label for label in row["labels"] if label != IGNORE_INDEX]
        assert tokenizer.decode(trained) == f"{answer}<|im_end|>"
        assert gsm8k.is_correct(answer, row["ground_truth"])


@pytest.mark.skipif(not GSM8K_DIR.is_dir(), reason=f"GSM8K is not in {GSM8K_DIR} (set GSM8K_DIR)")
@pytest.mark.parametrize("split", ["train", "test"])
def test_every_real_answer_has_a_number(split):
    for line in (GSM8K_DIR / f"{split}.jsonl").read_text().splitlines():
        answer = json.loads(line)["answer"]
        written = answer.rpartition("####")[2].strip().replace(",", "").replace("$", "")
        assert Decimal(gsm8k.ground_truth(answer)) == gsm8k.final_number(answer) == Decimal(written)
