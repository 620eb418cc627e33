"""Windows are taken from an epoch on all ranks, or on none."""

import pytest
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader

from gkd_trainer import GKDConfigError, GKDDataError
from gkd_trainer.trainer import trainer as trainer_module
from gkd_trainer.trainer.windows import Epoch, WindowLoader, require_equal_epochs


def batches(count):
    return iter([{"number": number} for number in range(count)])


def numbers(window):
    return [batch["number"] for batch in window]


@pytest.mark.parametrize("has_length", [True, False])
def test_full_windows_come_in_the_order_of_the_epoch(ranks, has_length):
    loader, epoch = WindowLoader(ranks), batches(4)
    windows = [numbers(loader.take(epoch, 2, has_length=has_length)) for _ in range(3)]
    assert windows == [[0, 1], [2, 3], []]


def test_an_epoch_of_known_length_ends_with_a_smaller_window_and_asks_no_rank(two_ranks):
    loader, epoch = WindowLoader(two_ranks()), batches(3)
    assert [numbers(loader.take(epoch, 2, has_length=True)) for _ in range(3)] == [[0, 1], [2], []]


def test_a_stream_ends_before_a_window_that_it_can_not_fill(ranks, caplog):
    loader, epoch = WindowLoader(ranks), batches(3)
    assert numbers(loader.take(epoch, 2, has_length=False)) == [0, 1]
    assert not loader.has_ended(epoch)
    assert loader.take(epoch, 2, has_length=False) == []
    assert loader.has_ended(epoch)
    assert not loader.has_ended(batches(3))
    assert not caplog.records


def test_a_stream_ends_with_the_shortest_shard_and_says_so_once(two_ranks, caplog):
    loader = WindowLoader(two_ranks(0, 1, 0, 1))
    for _ in range(2):
        epoch = batches(8)
        assert numbers(loader.take(epoch, 2, has_length=False)) == [0, 1]
        assert loader.take(epoch, 2, has_length=False) == []
        assert loader.has_ended(epoch)
    assert [record.message for record in caplog.records if "differ in length" in record.message] == [
        "The ranks' shards of the training stream differ in length: an epoch ends with the shortest, and the "
        "rest of the others is not trained on."
    ]


def test_shards_that_end_together_are_nothing_to_warn_of(two_ranks, caplog):
    loader, epoch = WindowLoader(two_ranks(1)), batches(1)
    assert loader.take(epoch, 2, has_length=False) == []
    assert loader.has_ended(epoch)
    assert not caplog.records


def test_an_ended_epoch_gives_nothing_more_and_asks_no_rank(two_ranks):
    ranks = two_ranks(1)
    loader, epoch = WindowLoader(ranks), batches(8)
    for _ in range(3):
        assert loader.take(epoch, 2, has_length=False) == []
    assert ranks.said == [0]
    assert numbers(epoch) == [2, 3, 4, 5, 6, 7]  # what is left of the longer shard


def test_a_stream_without_a_first_window_is_an_error_that_counts_the_ranks(two_ranks):
    for own, other, lacking in ((8, 1, 1), (1, 1, 2), (0, 0, 1)):
        with pytest.raises(GKDDataError, match=rf"{lacking} of 2 ranks had fewer than 2 batches .*fewer ranks"):
            WindowLoader(two_ranks(other)).take(batches(own), 2, has_length=False, is_first=True)


def test_a_set_of_known_length_without_any_batch_is_an_error(ranks):
    loader = WindowLoader(ranks)
    with pytest.raises(GKDDataError, match="the training set gave no batch, since none of its rows can be used"):
        loader.take(batches(0), 2, has_length=True, is_first=True)
    assert numbers(loader.take(batches(1), 2, has_length=True, is_first=True)) == [0]


def epoch_of(loader, count, **changes):
    fields = {
        "has_length": True,
        "num_batches": 1,
        "accumulation": 3,
        "batch_size": 4,
        "max_steps": 10,
        "is_first": True,
    }
    return Epoch(loader, batches(count), **{**fields, **changes})


def test_an_epoch_before_its_second_window_is_the_same_but_for_the_windows_size(ranks):
    epoch = epoch_of(WindowLoader(ranks), 8)
    later = epoch.later()
    assert (later.num_batches, later.is_first) == (3, False)
    unchanged = ("loader", "batches", "has_length", "accumulation", "batch_size", "max_steps")
    assert all(getattr(later, name) is getattr(epoch, name) for name in unchanged)
    assert (epoch.num_batches, epoch.is_first) == (1, True)


@pytest.mark.parametrize("has_length", [True, False])
def test_an_epoch_takes_from_its_loader_as_its_length_is_known_or_not(ranks, has_length):
    loader = WindowLoader(ranks)
    epoch = epoch_of(loader, 3, has_length=has_length)
    assert numbers(epoch.take(2, is_first=True)) == [0, 1]
    assert numbers(epoch.take(2, is_first=False)) == ([2] if has_length else [])
    assert loader.has_ended(epoch.batches) is not has_length
    with pytest.raises(GKDDataError):
        epoch_of(loader, 0, has_length=has_length).take(2, is_first=True)


def test_an_epoch_completes_each_batch_of_a_window(ranks):
    epoch = Epoch(
        WindowLoader(ranks),
        batches(3),
        has_length=True,
        num_batches=2,
        accumulation=2,
        batch_size=1,
        max_steps=2,
        is_first=True,
        completed=lambda batch: {"number": 10 * batch["number"]},
    )
    assert numbers(epoch.take(2, is_first=True)) == [0, 10]
    assert numbers(epoch.later().take(2, is_first=False)) == [20]


@pytest.mark.parametrize(
    ("samples", "drop_last", "counts"), [(10, False, [3, 2]), (8, False, None), (10, True, None), (7, False, None)]
)
def test_ranks_whose_epochs_would_differ_in_length_are_refused(two_ranks, samples, drop_last, counts):
    loaders = [
        prepare_data_loader(
            DataLoader(range(samples), 2, drop_last=drop_last),
            num_processes=2,
            process_index=rank,
            even_batches=False,
        )
        for rank in range(2)
    ]
    ranks = two_ranks(len(loaders[1]))
    require_equal_epochs(loaders[0], ranks)  # with even_batches they don't ask
    assert ranks.said == []
    ranks.accelerator.even_batches = False
    if counts is None:
        require_equal_epochs(loaders[0], ranks)
        return
    with pytest.raises(GKDConfigError, match=r"they have 3, 2, and would wait .*or dataloader_drop_last=True"):
        require_equal_epochs(loaders[0], ranks)


def test_a_run_begins_only_if_the_epochs_of_all_ranks_are_equal(make_trainer, monkeypatch):
    asked = []
    monkeypatch.setattr(
        trainer_module, "require_equal_epochs", lambda loader, ranks: asked.append((len(loader), ranks))
    )
    trainer = make_trainer(max_steps=1)
    trainer.train()
    assert asked == [(4, trainer._ranks)]
