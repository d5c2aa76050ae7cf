"""Reading checkpoints safely, telling their layouts apart, and accounting for every key. Imports no
detectron2.
"""

from .accounting import CheckpointMismatch, DropRule, Report, account, load_strict
from .io import Checkpoint, CheckpointError, atomic_path, read_checkpoint, save_checkpoint
from .layouts import LAYOUTS, Layout, detect_layout, register_layout

__all__ = [
    "LAYOUTS",
    "Checkpoint",
    "CheckpointError",
    "CheckpointMismatch",
    "DropRule",
    "Layout",
    "Report",
    "account",
    "atomic_path",
    "detect_layout",
    "load_strict",
    "read_checkpoint",
    "register_layout",
    "save_checkpoint",
]
