"""What detectron2 needs and today's stack no longer gives it.

detectron2 0.6 can be installed without its C++ extension and together with NumPy 2 and a current Pillow. It
then misses a few names. This module, which runs before any other part of clipdense, supplies exactly those
that the *installed* detectron2 mentions and the installed libraries lack. On a healthy install (the main
branch, compiled) it finds nothing to do.
"""

from __future__ import annotations

import re
import sys
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

# Python types that NumPy exposed under its own name until 1.24 (bool came back in 2.0).
_NUMPY_ALIASES: dict[str, type] = {"int": int, "float": float, "bool": bool, "str": str, "object": object}

# Ops of the extension; the rotated ones are also reached as torch.ops.detectron2.*.
_OPS = (
    "deform_conv_forward",
    "deform_conv_backward_input",
    "deform_conv_backward_filter",
    "modulated_deform_conv_forward",
    "modulated_deform_conv_backward",
    "box_iou_rotated",
    "nms_rotated",
    "roi_align_rotated_forward",
    "roi_align_rotated_backward",
    "InstanceAnnotation",
    "COCOevalEvaluateImages",
    "COCOevalAccumulate",
)


def apply() -> list[str]:
    """Supply what the installed detectron2 lacks; without detectron2, or the second time, there is nothing.

    Returns:
        The names that were supplied, e.g. ``["numpy.int", "PIL.Image.LINEAR", "detectron2._C"]``.
    """
    root = _package_root("detectron2")
    if root is None:
        return []
    supplied = []
    source = "\n".join(path.read_text("utf-8", "replace") for path in sorted(root.rglob("*.py")))
    supplied += _numpy_aliases(set(re.findall(r"\bnp\.([a-z]+)\b", source)))
    if re.search(r"\bImage\.LINEAR\b", source):
        supplied += _pillow_constants()
    if "detectron2._C" not in sys.modules and PathFinder.find_spec("_C", [str(root)]) is None:
        supplied += _extension_stub()
    if "detectron2.export.api" not in sys.modules:
        supplied += _export_without_caffe2(root)
    return supplied


def has_detectron2() -> bool:
    """Whether detectron2 is installed (it is not imported to find out)."""
    return _package_root("detectron2") is not None


def _package_root(name: str) -> Path | None:
    """Folder of a package, found without importing it; None when it is not installed."""
    try:
        spec = find_spec(name)
    except (ImportError, ValueError):
        return None
    locations = list(spec.submodule_search_locations or []) if spec else []
    return Path(locations[0]) if locations else None


def _numpy_aliases(mentioned: set[str]) -> list[str]:
    import numpy as np

    missing = [name for name in _NUMPY_ALIASES if name in mentioned and name not in vars(np)]
    for name in missing:
        setattr(np, name, _NUMPY_ALIASES[name])
    return [f"numpy.{name}" for name in missing]


def _pillow_constants() -> list[str]:
    from PIL import Image

    if hasattr(Image, "LINEAR"):
        return []
    Image.LINEAR = Image.Resampling.BILINEAR  # type: ignore[attr-defined]
    return ["PIL.Image.LINEAR"]


def _extension_stub() -> list[str]:
    """Stand-in for the C++ extension: detectron2 imports it and its environment report prints it."""
    import torch

    module: Any = ModuleType(
        "detectron2._C", "Stand-in for detectron2's C++ extension, which is not compiled here."
    )
    for op in _OPS:
        setattr(module, op, _missing_op(op))
    module.get_compiler_version = lambda: "none (detectron2._C is not compiled)"
    module.get_cuda_version = lambda: "none (detectron2._C is not compiled)"
    module.has_cuda = lambda: False
    sys.modules["detectron2._C"] = module
    for op in ("nms_rotated", "box_iou_rotated", "roi_align_rotated_forward", "roi_align_rotated_backward"):
        setattr(torch.ops.detectron2, op, getattr(module, op))
    return ["detectron2._C"]


def _export_without_caffe2(root: Path) -> list[str]:
    """Empty stand-in for `detectron2.export.api`, which 0.6 imports beside its `TracingAdapter` (of which its
    FLOP counter is made) and which needs Caffe2; PyTorch has that no more.
    """
    init = root / "export" / "__init__.py"
    unguarded = init.is_file() and re.search(r"^from \.api import \*", init.read_text("utf-8"), re.MULTILINE)
    if not unguarded or _package_root("caffe2") is not None:
        return []
    module: Any = ModuleType("detectron2.export.api", "Stand-in: export to Caffe2 is not possible here.")
    module.__all__ = []
    sys.modules["detectron2.export.api"] = module
    return ["detectron2.export.api"]


def _missing_op(op: str) -> Any:
    def missing(*args: object, **kwargs: object) -> NoReturn:
        raise RuntimeError(
            f"{op} belongs to detectron2's C++ extension, which this installation does not have. Install a "
            "compiled detectron2 (`make demo DETECTRON2=<path or git URL>`, with a C++ compiler), or do "
            "without rotated boxes, deformable convolution and COCOeval_opt."
        )

    missing.__name__ = missing.__qualname__ = op
    return missing
