"""The description of a teacher in the model card."""

from gkd_trainer.teachers import (
    CachedTeacher,
    FrozenTeacher,
    HiddenStateServerTeacher,
    OtherTokenizerTeacher,
    RoutedTeachers,
    SelfTeacher,
    Teacher,
    TeacherDescription,
    VLLMServerTeacher,
    WeightedTeachers,
    describe,
)
from tests.teachers.cache.rows import K, make_rows, write


class Unknown(Teacher):
    """A teacher that a user wrote."""

    vocab_size, vocabulary, model, top_k = 368, None, None, 7
    is_local = can_generate = False

    def score(self, batch):
        raise AssertionError

    def prepare(self, device, tokenizer=None, max_length=None):
        raise AssertionError


def test_a_local_teacher_is_described_by_its_source_or_its_models_class(tiny_model, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    loaded = FrozenTeacher.from_pretrained(tmp_path, top_k=5)
    assert describe(loaded) == TeacherDescription(str(tmp_path), (), 5)
    assert describe(FrozenTeacher(tiny_model())) == TeacherDescription("LlamaForCausalLM", (), None)


def test_a_teacher_without_a_model_is_described_by_its_class():
    assert describe(Unknown()) == TeacherDescription("Unknown", (), 7)


def test_a_teacher_behind_servers_is_described_by_the_served_name_and_where_they_listen():
    urls = ["http://127.0.0.1:9", "http://127.0.0.1:8"]
    assert describe(VLLMServerTeacher(urls, model="big")) == TeacherDescription("big", urls, 20)


def test_several_teachers_are_described_by_their_names_and_weights():
    served = VLLMServerTeacher("http://127.0.0.1:9", model="big")
    summed = WeightedTeachers({"math": served, "own": Unknown()}, {"math": 1, "own": 3})
    expected = {"math (weight 0.25)": "big", "own (weight 0.75)": "Unknown"}
    assert describe(summed) == TeacherDescription(expected, ["http://127.0.0.1:9"], 20)
    routed = RoutedTeachers({"both": summed, "chat": Unknown()})
    expected = {"both, math (weight 0.25)": "big", "both, own (weight 0.75)": "Unknown", "chat": "Unknown"}
    assert describe(routed).name == expected


def test_a_cached_teacher_is_described_by_the_name_of_the_one_that_was_cached(tmp_path):
    write(tmp_path, make_rows(3), kind="topk")
    assert describe(CachedTeacher(tmp_path)) == TeacherDescription("oracle", (), K)


def test_a_teacher_of_hidden_states_is_described_by_its_checkpoint(tiny_model, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    url = "http://127.0.0.1:9"
    assert describe(HiddenStateServerTeacher(url, tmp_path)) == TeacherDescription(str(tmp_path), [url], None)
    adapter = describe(HiddenStateServerTeacher(url, tmp_path, model="math-lora"))
    assert adapter == TeacherDescription({"math-lora": str(tmp_path)}, [url], None)
    assert adapter.full_name == f"math-lora: {tmp_path}"
    assert describe(HiddenStateServerTeacher(url, tmp_path, model=str(tmp_path))).name == str(tmp_path)


def test_a_teacher_with_another_tokenizer_is_described_with_how_it_is_compared(tiny_model, byte_level):
    teacher = OtherTokenizerTeacher(FrozenTeacher(tiny_model(), byte_level()), mode="uld")
    assert describe(teacher) == TeacherDescription("LlamaForCausalLM", (), None, "uld")


def test_a_student_that_teaches_itself_is_described_by_its_source():
    assert describe(SelfTeacher("ema")) == TeacherDescription("the student itself (ema)", (), None)
