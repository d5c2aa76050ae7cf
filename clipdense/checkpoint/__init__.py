"""Safe reading of checkpoints, detection of their layouts, and strict accounting of keys.

Works without detectron2.
"""

from clipdense.checkpoint.accounting import CheckpointMismatch, DropRule, Report, account, load_strict
from clipdense.checkpoint.convert import (
    MODEL_LAYOUT,
    class_differences,
    config_options,
    convert_model,
    model_layout,
)
from clipdense.checkpoint.io import Checkpoint, CheckpointError, read_checkpoint, save_checkpoint
from clipdense.checkpoint.layouts import LAYOUTS, Layout, ModelLayout, detect_layout, register_layout, rename
from clipdense.checkpoint.sizes import config_leaves, count_parts, shown_size

__all__ = [
    "LAYOUTS",
    "MODEL_LAYOUT",
    "Checkpoint",
    "CheckpointError",
    "CheckpointMismatch",
    "DropRule",
    "Layout",
    "ModelLayout",
    "Report",
    "account",
    "class_differences",
    "config_leaves",
    "config_options",
    "convert_model",
    "count_parts",
    "detect_layout",
    "load_strict",
    "model_layout",
    "read_checkpoint",
    "register_layout",
    "rename",
    "save_checkpoint",
    "shown_size",
]
