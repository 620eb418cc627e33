"""The part of the trainer that turns its data sets into token ids and labels."""

from __future__ import annotations

from collections.abc import Callable
from itertools import repeat
from typing import Any

import datasets
import torch
from trl import pack_dataset

from gkd_trainer.data import KeepPrompts, RowRules, keeping_labels, prepare_dataset
from gkd_trainer.errors import GKDConfigError
from gkd_trainer.models.heads import Context, vocabulary_rows
from gkd_trainer.models.loading import base_model
from gkd_trainer.trainer.rollout_queue import GenerationMixin
from gkd_trainer.types import PROMPT_IDS, prompt_length


class PreparationMixin(GenerationMixin):
    """Prepares the rows of every data set that the trainer is given, at construction or later."""

    _formatting_func: Callable[[Any], Any] | None
    _prepares_rows: bool
    _shortest_context: tuple[str, Context] | None = None
    _data_collator: Any = None

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        # Kept whatever the student's forward is called with: without labels a collator would take all tokens for them.
        columns = self._signature_columns or []
        own = ["input_ids", "labels", *([PROMPT_IDS] if self._keeps_prompts else [])]
        self._signature_columns = [*columns, *(column for column in own if column not in columns)]

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Return the loader of an evaluation set, whose rows are prepared if it is given here."""
        # Trainer passes its own set here too, or its name in a dictionary of them: those are prepared.
        is_given = eval_dataset is not None and eval_dataset is not self.eval_dataset
        if is_given and not isinstance(eval_dataset, str):
            eval_dataset = self._prepared(eval_dataset, "eval")
        return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """Return the loader of a test set, with its rows prepared."""
        return super().get_test_dataloader(self._prepared(test_dataset, "test"))

    @property
    def data_collator(self) -> Any:
        """The collator, which keeps labels and prompts whatever it does itself; also one that is set later."""
        return self._data_collator

    @data_collator.setter
    def data_collator(self, collator: Any) -> None:
        if collator is not None and self._prepares_rows:
            collator = keeping_labels(collator)
            if self._keeps_prompts and not isinstance(collator, KeepPrompts):
                collator = KeepPrompts(collator)
        self._data_collator = collator

    @property
    def _keeps_prompts(self) -> bool:
        return self._prepares_rows and bool(self.args.generates_anywhere)

    def _prepare_datasets(self) -> None:
        if self.train_dataset is not None:
            self.train_dataset = self._prepared(self.train_dataset, "train", is_training=True)
        if isinstance(self.eval_dataset, dict):
            self.eval_dataset = {name: self._prepared(rows, name) for name, rows in self.eval_dataset.items()}
        elif self.eval_dataset is not None:
            self.eval_dataset = self._prepared(self.eval_dataset, "eval")

    def _prepared(self, dataset: Any, name: str, is_training: bool = False) -> Any:
        if isinstance(dataset, torch.utils.data.IterableDataset | datasets.IterableDataset):
            # Each rank reads its own share: Accelerate would concatenate batches of unequal length on one rank.
            self.args.accelerator_config.dispatch_batches = False
            self.accelerator.dataloader_config.dispatch_batches = False
        if not self._prepares_rows:
            return dataset
        args = self.args
        student_rows = vocabulary_rows(base_model(self.model))
        rules = RowRules(
            stop_ids=frozenset(self._stop_ids),
            max_length=args.max_length,
            max_new_tokens=args.max_new_tokens,
            train_on=args.train_on,
            is_generating=args.generates or (args.eval_on_policy and not is_training),
            needs_completion=is_training and not (args.is_always_on_policy or args.seq_kd),
            needs_prompt=is_training and args.is_always_on_policy,
            text_field=getattr(args, "dataset_text_field", "text"),
            # Cross-entropy needs its labels among the tokens that are compared.
            vocab_size=(
                self._vocab_size if args.ce_weight > 0 else min(student_rows, self.teacher.vocab_size or student_rows)
            ),
        )
        dataset = prepare_dataset(
            dataset,
            self._tokenizer_or_none,
            rules,
            formatting_func=self._formatting_func,
            num_proc=getattr(args, "dataset_num_proc", None),
            name=name,
        )
        if args.max_length is None and isinstance(dataset, datasets.Dataset):
            self._refuse_rows_beyond_the_context(dataset, name, rules.is_generating)
        if not is_training and self.accelerator.num_processes > 1 and not hasattr(dataset, "__len__"):
            # Without a length, ranks fill up their last batch with samples that would be counted twice.
            dataset = list(dataset)
        packs = getattr(args, "packing", False)
        if not is_training and getattr(args, "eval_packing", None) is not None:
            packs = args.eval_packing
        if packs:
            dataset = pack_dataset(
                dataset.select_columns(["input_ids", "labels"]), args.max_length, args.packing_strategy
            )
        return dataset

    def _refuse_rows_beyond_the_context(self, dataset: Any, name: str, is_generating: bool) -> None:
        if self._shortest_context is None:
            return
        owner, context = self._shortest_context
        longest = longest_completed = 0
        columns = {"input_ids", "labels", PROMPT_IDS} & {*dataset.column_names}
        for rows in dataset.with_format(None).select_columns(sorted(columns)).iter(batch_size=1000):
            ids, labels = rows["input_ids"], rows.get("labels", rows["input_ids"])
            for n_tokens, row_labels, own in zip(map(len, ids), labels, rows.get(PROMPT_IDS, repeat(())), strict=False):
                longest = max(longest, n_tokens)
                prompt = len(own) or prompt_length(row_labels)
                # An evaluation completes rows that are prompts alone.
                if is_generating or prompt == n_tokens:
                    longest_completed = max(longest_completed, prompt + self.args.max_new_tokens)
        if max(longest, longest_completed) > context.limit:
            completed = " with max_new_tokens" if longest_completed > longest else ""
            raise GKDConfigError(
                f"{name}: max_length=None takes rows as they are, and the longest needs "
                f"{max(longest, longest_completed)} tokens{completed}, more than the {owner}'s context, "
                f"{context.limit} tokens: {context.remedy}"
            )
