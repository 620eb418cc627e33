"""Several teachers of which each sample has one: whose samples go where, and what comes back."""

import pytest
import torch

from gkd_trainer.batch_keys import IGNORE_INDEX
from gkd_trainer.divergence import token_divergence
from gkd_trainer.errors import GKDDataError, GKDTeacherError
from gkd_trainer.signals import GroupedSignal, HiddenSignal, TopKSignal, scored_positions
from gkd_trainer.teachers import FrozenTeacher, RoutedTeachers, Teacher, VLLMServerTeacher, WeightedTeachers
from gkd_trainer.teachers.served import _Served
from gkd_trainer.types import TokenBatch

CPU = torch.device("cpu")
LENGTHS = (9, 4, 7, 2, 8, 6, 9)  # of the rows


def batch_of(teachers, **inputs):
    """A batch whose rows have these teachers, and lengths of their own."""
    count = len(teachers)
    ids_BL = torch.randint(3, 368, (count, 9), generator=torch.Generator().manual_seed(0))
    mask_BL = (torch.arange(9) < torch.tensor(LENGTHS[:count])[:, None]).long()
    labels_BL = ids_BL.masked_fill((mask_BL == 0) | (torch.arange(9) < 2), IGNORE_INDEX)
    rows = {"input_ids": ids_BL, "attention_mask": mask_BL, "labels": labels_BL, **inputs}
    return TokenBatch.from_inputs({**rows, "teacher_index": torch.tensor(teachers)})


def frozen(tiny_model, count=3, **options):
    widths = (48, 32, 64)
    return {
        name: FrozenTeacher(tiny_model(hidden=widths[index], seed=index + 1), **options)
        for index, name in enumerate(("math", "code", "chat")[:count])
    }


def routed(teachers):
    teacher = RoutedTeachers(teachers)
    teacher.prepare(CPU)
    return teacher


class Recorder(Teacher):
    """A teacher that notes the batches that it scores."""

    vocab_size, top_k, vocabulary, model = 368, 2, None, None
    is_local = can_generate = False

    def __init__(self):
        self.batches = []

    def prepare(self, device, tokenizer=None, max_length=None):
        pass

    def score(self, batch):
        self.batches.append(batch)
        ids_NK = torch.stack([batch.targets_N, (batch.targets_N + 1) % 368], dim=1)
        return TopKSignal(ids_NK, torch.full(ids_NK.shape, -2.0), 368)


@pytest.mark.parametrize("order", [(2, 0, 1, 1, 0, 2, 2), (1, 1, 1, 1), (0, 2, 0), (2,)])
def test_each_position_gets_the_predictions_of_its_sample_s_teacher(tiny_model, order):
    teachers, batch = frozen(tiny_model), batch_of(order)
    signal = routed(teachers).score(batch)
    student = HiddenSignal(torch.randn(batch.n_scored, 8, generator=torch.Generator().manual_seed(3)), head_of_width(8))
    actual_N = token_divergence(student, signal, beta=0.5).values_N
    for index, teacher in enumerate(teachers.values()):
        own_N = torch.tensor(order)[batch.rows_N] == index
        of_teacher_N = token_divergence(student, teacher.score(batch), beta=0.5).values_N
        torch.testing.assert_close(actual_N[own_N], of_teacher_N[own_N], rtol=1e-4, atol=1e-6)


def head_of_width(width):
    from gkd_trainer.signals import Head

    return Head(torch.randn(368, width, generator=torch.Generator().manual_seed(4)))


def test_a_teacher_scores_only_its_own_samples_with_their_side_tensors_and_padding():
    teachers = {"math": Recorder(), "code": Recorder()}
    batch = batch_of((1, 0, 1, 0), row_key=torch.tensor([5, 6, 7, 8]))
    signal = routed(teachers).score(batch)
    assert isinstance(signal, GroupedSignal)
    assert [scored_positions(group) for group in signal.groups] == [2 + 0, 7 + 5]
    for teacher, rows in zip(teachers.values(), ([1, 3], [0, 2]), strict=True):
        [part] = teacher.batches
        assert torch.equal(part.model_inputs["input_ids"], batch.model_inputs["input_ids"][rows])
        assert torch.equal(part.side["row_key"], batch.side["row_key"][rows])
        assert part.label_offset == batch.label_offset
    targets_N = torch.cat([part.ids_NK[:, 0] for part in signal.groups])
    assert torch.equal(targets_N, batch.targets_N[signal.order_N])


def test_a_teacher_without_samples_scores_an_empty_batch():
    teachers = {"math": Recorder(), "code": Recorder()}
    signal = routed(teachers).score(batch_of((1, 1)))
    assert isinstance(signal, TopKSignal)
    assert [len(each.batches[0].labels_BL) for each in teachers.values()] == [0, 2]


def test_a_batch_with_nothing_to_train_on_is_scored_too(tiny_model):
    batch = batch_of((0, 1))
    masked = torch.full_like(batch.labels_BL, IGNORE_INDEX)
    signal = routed(frozen(tiny_model)).score(
        TokenBatch(batch.model_inputs, masked, batch.is_on_policy_B, 1, batch.side)
    )
    assert scored_positions(signal) == 0


@pytest.mark.parametrize("top_k", [None, 5])
def test_a_frozen_teacher_scores_a_batch_without_rows(tiny_model, top_k):
    teacher = FrozenTeacher(tiny_model(), top_k=top_k)
    teacher.prepare(CPU)
    signal = teacher.score(batch_of((0,)).of_samples([]))
    assert scored_positions(signal) == 0
    assert signal.vocab_size == 368


def test_a_teacher_behind_a_server_scores_a_batch_without_rows_without_asking():
    teacher = VLLMServerTeacher("http://127.0.0.1:9", top_k=3)
    teacher._vocabulary = {"a": 0}
    teacher._servers._served = {server.base_url: _Served("served", 100) for server in teacher._servers}
    assert teacher.score(batch_of((0,)).of_samples([])).ids_NK.shape == (0, 3)


def test_a_batch_with_images_keeps_its_rows_for_every_teacher():
    teachers = {"math": Recorder(), "code": Recorder()}
    batch = batch_of((1, 0, 1), pixel_values=torch.zeros(2, 3, 4, 4))
    signal = routed(teachers).score(batch)
    for teacher in teachers.values():
        assert teacher.batches[0].model_inputs["pixel_values"].shape == (2, 3, 4, 4)
        assert len(teacher.batches[0].labels_BL) == 3
    targets_N = torch.cat([part.ids_NK[:, 0] for part in signal.groups])
    assert torch.equal(targets_N, batch.targets_N[signal.order_N])


@pytest.mark.parametrize("index", [-1, 2])
def test_a_sample_without_one_of_the_teachers_is_refused(index):
    with pytest.raises(GKDDataError, match=rf"sample 1 of a batch has the teacher_index {index}, but there are 2"):
        routed({"math": Recorder(), "code": Recorder()}).score(batch_of((0, index)))


def test_a_batch_that_says_nothing_of_teachers_is_refused():
    batch = batch_of((0, 0))
    batch.side.pop("teacher_index")
    with pytest.raises(GKDTeacherError, match=r"no teacher_index \[B\].*their column 'teacher'"):
        routed({"math": Recorder(), "code": Recorder()}).score(batch)


def test_routes_inside_a_route_are_refused_but_sums_are_scored(tiny_model):
    inner = frozen(tiny_model, 2)
    with pytest.raises(GKDTeacherError, match="'both' contains RoutedTeachers itself"):
        RoutedTeachers({"both": RoutedTeachers(inner)})
    batch = batch_of((0, 1, 0))
    signal = routed({"both": WeightedTeachers(inner), "chat": frozen(tiny_model)["chat"]}).score(batch)
    student = HiddenSignal(torch.randn(batch.n_scored, 8, generator=torch.Generator().manual_seed(3)), head_of_width(8))
    values_N = token_divergence(student, signal, beta=0.5).values_N
    own_N = torch.tensor((0, 1, 0))[batch.rows_N] == 0
    parts = [token_divergence(student, each.score(batch), beta=0.5).values_N for each in inner.values()]
    torch.testing.assert_close(values_N[own_N], (sum(parts) / 2)[own_N], rtol=1e-4, atol=1e-6)
