"""One rank of the test of sharded generation: makes calls that need the other rank, and records them."""

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from gkd_trainer.rollouts import HFRollouts
from gkd_trainer.types import Sampling

PROMPTS = {
    0: [[[5, 6, 7], [8, 9], [10, 11]], [[12], [13, 14, 15, 16]]],
    1: [[[20]], [[21, 22], [23], [24, 25, 26], [27]]],
}


def main(folder: Path) -> None:
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    generate, calls = model.generate, []

    def record(**options):
        calls.append(list(options["input_ids"].shape))
        return generate(**options)

    model.generate = record
    engine = HFRollouts([2], pad_token_id=2, is_sharded=True)
    engine.sync(model)
    prompts, completions, seeds = [], [], []
    for batch in PROMPTS[rank]:
        own_seeds = [100 * rank + len(prompts) + index for index in range(len(batch))]
        completions += [list(each.token_ids) for each in engine.generate(batch, Sampling(4), own_seeds)]
        prompts += batch
        seeds += own_seeds
    result = {"prompts": prompts, "seeds": seeds, "completions": completions, "calls": calls}
    (folder / f"rank{rank}.json").write_text(json.dumps(result))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
