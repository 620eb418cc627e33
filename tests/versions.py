"""Features of the installed versions of transformers and TRL, for tests that run on all of them."""

from dataclasses import fields

import transformers
import trl
from packaging.version import Version
from transformers import TrainingArguments

TRANSFORMERS, TRL = Version(transformers.__version__), Version(trl.__version__)

_OPTIONS = {field.name for field in fields(TrainingArguments)}

HAS_SAMPLING_STRATEGY = "train_sampling_strategy" in _OPTIONS
# Without the option the order is random, and the same on any number of ranks.
IN_ORDER = {"train_sampling_strategy": "sequential"} if HAS_SAMPLING_STRATEGY else {}
# At the end of a pass over a stream, earlier versions of Trainer wait for a batch of that pass to restore them.
RESTORES_RANDOM_STATES_WITHOUT_A_BATCH = Version("5.3") <= TRANSFORMERS
CHECKPOINTING = "activation_checkpointing" if "activation_checkpointing" in _OPTIONS else "gradient_checkpointing"
