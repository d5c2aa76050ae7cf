"""Reading checkpoints safely, telling their layouts apart, and accounting for every key. Imports no
detectron2.
"""

from .accounting import CheckpointMismatch, DropRule, Report, account, load_strict
from .convert import MODEL_LAYOUT, class_differences, config_options, convert_model, model_layout
from .io import Checkpoint, CheckpointError, atomic_path, read_checkpoint, save_checkpoint
from .layouts import LAYOUTS, Layout, ModelLayout, detect_layout, register_layout, rename
from .sizes import config_leaves, count_parts, shown_size

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
    "atomic_path",
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
