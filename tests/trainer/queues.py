"""A queue with an engine whose completions reveal its weights, a student that counts its steps, and batches."""

import threading

import torch
from torch import nn

from gkd_trainer import GKDArguments
from gkd_trainer.rollouts import RolloutEngine
from gkd_trainer.trainer.recovery import Recovery
from gkd_trainer.trainer.rollout_queue import CurrentStudent, RolloutQueue
from gkd_trainer.types import Completion

X, PAD, SEED = -100, 0, 7


class Spy(RolloutEngine):
    """Completes a prompt with 100 + the weight that it was given, and the prompt's first token; notes every call."""

    def __init__(self, weight=-100.0):
        self.weight, self.synced, self.calls = weight, [], []
        self.failure = self.failure_in_background = None

    def sync(self, model):
        if self.failure is not None:
            raise self.failure
        self.weight = model.weight.item()
        self.synced.append(self.weight)

    def generate(self, prompts, sampling, seeds):
        is_in_background = threading.current_thread() is not threading.main_thread()
        failure = self.failure_in_background if is_in_background else self.failure
        if failure is not None:
            raise failure
        self.calls.append(([list(prompt) for prompt in prompts], sampling, list(seeds)))
        return [Completion([100 + int(self.weight), prompt[0]], prompt[0] % 2 == 0) for prompt in prompts]

    def close(self):
        pass


class Student:
    """A student whose weight is the number of steps that it took, in place."""

    def __init__(self):
        self.model = nn.Linear(1, 1, bias=False)
        self.model.weight.data.zero_()

    def at(self, step):
        with torch.no_grad():
            self.model.weight += step - self.model.weight
        return CurrentStudent(self.model, self.model, step)


def micro_batch(first):
    """One sample of three tokens, whose last one is trained on, and one without a token behind its prompt."""
    return {
        "input_ids": torch.tensor([[first, 1, 2], [first + 1, 3, PAD]]),
        "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
        "labels": torch.tensor([[X, X, 2], [X, X, X]]),
    }


def batches_of(windows, first=10):
    return iter([micro_batch(first + 10 * number) for number in range(windows)])


def queue_of(ranks, engine, teacher=None, media_tokens=None, **options):
    """A queue of a run that is on-policy unless the options say otherwise."""
    args = GKDArguments(**{"lmbda": 1.0, "max_new_tokens": 4, "max_length": 64, **options})
    args.seed = SEED  # of TrainingArguments
    return RolloutQueue(
        engine,
        teacher,
        args=args,
        ranks=ranks,
        recovery=Recovery(ranks),
        pad_token_id=PAD,
        media_tokens=media_tokens,
    )
