"""FSDP version 1, which Accelerate runs only on GPUs, around a student, in each of two ranks."""

import functools
import itertools

import torch
from torch import distributed
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from gkd_trainer.divergence import token_divergence
from gkd_trainer.models.heads import compare, connection, find_head
from gkd_trainer.rollouts import HFRollouts
from gkd_trainer.signals import Head, HiddenSignal
from gkd_trainer.types import Sampling, TokenBatch

VOCABULARY, WIDTH, LENGTH, ROWS = 368, 32, 9, 2


def student(tied):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    return model


def take_step(model, head, optimizer, batches):
    for ids_BL, labels_BL, teacher in batches:
        batch = TokenBatch.from_inputs({"input_ids": ids_BL, "labels": labels_BL})
        comparison = functools.partial(token_divergence, teacher=teacher, beta=0.5)
        result, output = compare(model, batch, head, comparison)
        loss = result.values_N.sum()
        (loss + connection(output) if head.is_sharded else loss).backward()
    optimizer.step()


def main():
    distributed.init_process_group("gloo")
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    policy = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={LlamaDecoderLayer})
    for tied, use_orig_params, is_last_idle in itertools.product((True, False), repeat=3):
        whole, part = student(tied), student(tied)
        heads = find_head(whole), find_head(part, is_sharded=True)
        sharded = FullyShardedDataParallel(
            part, auto_wrap_policy=policy, use_orig_params=use_orig_params, device_id=torch.device("cpu")
        )
        prompts = [[5, 6, 7], [8], [9, 10]]
        engines = HFRollouts([2]), HFRollouts([2], is_sharded=True)
        for engine, model in zip(engines, (whole, sharded), strict=True):
            engine.sync(model)
        expected, actual = (engine.generate(prompts, Sampling(5), [1, 2, 3]) for engine in engines)
        assert [each.token_ids for each in actual] == [each.token_ids for each in expected]

        torch.manual_seed(1)
        head = Head(torch.randn(VOCABULARY, WIDTH))
        batches = []
        for of_rank in range(ranks):
            ids_BL = torch.randint(VOCABULARY, (ROWS, LENGTH))
            has_nothing_to_train_on = is_last_idle and of_rank == ranks - 1
            labels_BL = torch.full_like(ids_BL, -100) if has_nothing_to_train_on else ids_BL
            trained = 0 if has_nothing_to_train_on else ROWS * (LENGTH - 1)
            batches.append((ids_BL, labels_BL, HiddenSignal(torch.randn(trained, WIDTH), head)))
        # FSDP averages over the ranks.
        take_step(whole, heads[0], torch.optim.SGD(whole.parameters(), lr=0.1), batches)
        take_step(sharded, heads[1], torch.optim.SGD(sharded.parameters(), lr=0.1 * ranks), batches[rank : rank + 1])
        ids_BL = batches[0][0]
        actual_BLV, expected_BLV, before_BLV = (model(ids_BL).logits for model in (sharded, whole, student(tied)))
        moved = (expected_BLV - before_BLV).abs().max()
        assert (actual_BLV - expected_BLV).abs().max() < 1e-3 * moved
    distributed.destroy_process_group()
