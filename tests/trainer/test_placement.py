"""The batches of a window on the device, and what the host keeps of them."""

import pytest
import torch
from accelerate import Accelerator, skip_first_batches
from transformers import BatchEncoding

from gkd_trainer.batch_keys import ROW_KEY
from gkd_trainer.trainer.placement import Placement, kept_on_host
from gkd_trainer.types import TokenBatch

META = torch.device("meta")


def batch(seed=0):
    ids_BL = torch.randint(4, 50, (3, 7), generator=torch.Generator().manual_seed(seed))
    labels_BL = ids_BL.masked_fill(torch.arange(7) < 3 + seed, -100)
    return {"input_ids": ids_BL, "labels": labels_BL, "pixel_values": torch.rand(3, 2), ROW_KEY: torch.arange(3)}


def test_batches_come_out_on_the_device_in_order_with_all_their_values():
    given = [{**batch(0), "note": "kept"}, batch(1)]
    placed = Placement(META).placed(given)
    for before, after in zip(given, placed, strict=True):
        assert before.keys() == after.keys()
        assert all(value.device == META for value in after.values() if isinstance(value, torch.Tensor))
    assert placed[0]["note"] == "kept"


def test_a_batch_of_the_window_is_recognised_and_read_on_the_host():
    placement = Placement(META)
    given = [batch(0), batch(1)]
    assert placement.scored_tokens == 0
    placed = placement.placed(given)
    expected = [TokenBatch.from_inputs(each) for each in given]
    assert placement.scored_tokens == sum(each.n_scored for each in expected)
    for inputs, same in zip(placed, expected, strict=True):
        found = placement.recognised(inputs, TokenBatch.from_inputs(inputs))
        assert found.n_scored == same.n_scored
        assert found.rows_N.device == META
        assert len(found.rows_N) == len(found.targets_N) == same.n_scored
        assert torch.equal(found.on_host.rows_N, same.rows_N)
        assert torch.equal(found.on_host.columns_N, same.columns_N)
        assert torch.equal(found.on_host.side[ROW_KEY], same.side[ROW_KEY])


def test_pixels_that_were_cast_make_no_other_batch():
    placement = Placement(META)
    [inputs] = placement.placed([batch()])
    cast = {**inputs, "pixel_values": inputs["pixel_values"].to(torch.bfloat16)}
    assert placement.recognised(cast, TokenBatch.from_inputs(cast)).n_scored == 12


@pytest.mark.parametrize("name", ["input_ids", "labels", ROW_KEY])
def test_another_or_overwritten_tensor_is_not_the_window_s(name):
    placement = Placement(torch.device("cpu"))
    [inputs] = placement.placed([batch()])

    def is_known(changed):
        made = TokenBatch.from_inputs(changed)
        return placement.recognised(changed, made) is not made

    assert is_known(inputs)
    assert not is_known({**inputs, name: inputs[name].clone()})
    assert not is_known({**inputs, "more": torch.zeros(3).long()})
    inputs[name][0] = 7
    assert not is_known(inputs)


def test_an_earlier_window_is_forgotten():
    placement = Placement(torch.device("cpu"))
    [inputs] = placement.placed([batch()])
    placement.placed([batch()])
    made = TokenBatch.from_inputs(inputs)
    assert placement.recognised(inputs, made) is made


def test_accelerate_leaves_batches_where_the_collator_made_them_and_only_for_a_window():
    accelerator = Accelerator(cpu=True)
    loader = accelerator.prepare(torch.utils.data.DataLoader([{"x": torch.zeros(2)}] * 3))
    loader.device = META  # as for a run on a GPU
    for batches in (iter(loader), iter(skip_first_batches(loader, 1))):  # the latter for a resumed epoch
        with kept_on_host(batches):
            assert next(batches)["x"].device.type == "cpu"
        assert next(batches)["x"].device == META
    assert loader.device == META
    with kept_on_host(iter([batch()])):  # a loader of the user's own
        pass


def test_a_batch_keeps_its_type_and_what_is_no_tensor():
    given = BatchEncoding({**batch(), "names": ["a", "b"]})
    [placed] = Placement(META).placed([given])
    assert isinstance(placed, BatchEncoding)
    assert placed.input_ids.device == META
    assert placed["names"] == ["a", "b"]
    assert given["input_ids"].device.type == "cpu"  # as it was


def test_a_batch_made_in_inference_mode_is_read_again():
    placement = Placement(torch.device("cpu"))
    with torch.inference_mode():
        inputs = batch()
        made = TokenBatch.from_inputs(inputs)
        assert placement.recognised(inputs, made) is made
        [placed] = placement.placed([inputs])
        made = TokenBatch.from_inputs(placed)
        assert placement.recognised(placed, made) is made


def test_an_evaluation_in_inference_mode_measures_the_same(make_trainer, token_rows):
    trainer = make_trainer(trainer_args={"eval_dataset": token_rows()}, max_steps=1)
    trainer.train()
    expected = trainer.evaluate()["eval_loss"]
    with torch.inference_mode():
        assert trainer.evaluate()["eval_loss"] == expected
