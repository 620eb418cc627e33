"""Rows in any of the usual formats, turned into token ids and labels."""

from gkd_trainer.data.collate import (
    EncoderDecoderCollator,
    KeepSideTensors,
    StackOthers,
    can_pad,
    columns_read_by,
    keeping_token_values,
    only_pads,
    unwrapped,
)
from gkd_trainer.data.images import IMAGE_COLUMNS, ImageProcessing, WithImages
from gkd_trainer.data.prepare import first_row, prepare_dataset
from gkd_trainer.data.routing import TeacherRoute
from gkd_trainer.data.rules import RowRules

__all__ = [
    "IMAGE_COLUMNS",
    "EncoderDecoderCollator",
    "ImageProcessing",
    "KeepSideTensors",
    "RowRules",
    "StackOthers",
    "TeacherRoute",
    "WithImages",
    "can_pad",
    "columns_read_by",
    "first_row",
    "keeping_token_values",
    "only_pads",
    "prepare_dataset",
    "unwrapped",
]
