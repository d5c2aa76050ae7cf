"""Names that detectron2 needs and current libraries no longer have.

detectron2 0.6 can be installed without its C++ extension and together with NumPy 2 and a current Pillow. It
then misses a few names. This module, which runs before any other part of clipdense, supplies exactly those
that the installed detectron2 uses and the installed libraries lack. On a healthy install (the main branch,
compiled) it does nothing.
"""

from __future__ import annotations

import re
import sys
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

# Files of detectron2 0.6 that use removed names of NumPy; other versions use fewer names in the same files.
NUMPY_USERS = (
    "data/build.py",
    "data/datasets/pascal_voc.py",
    "evaluation/pascal_voc_evaluation.py",
    "evaluation/sem_seg_evaluation.py",
    "structures/masks.py",
    "utils/video_visualizer.py",
    "utils/visualizer.py",
)
PILLOW_USERS = ("data/transforms/transform.py",)

# Python types that NumPy exposed under its own name until 1.24 (bool came back in 2.0).
_NUMPY_ALIASES: dict[str, type] = {"int": int, "float": float, "bool": bool, "str": str, "object": object}

# Ops of the extension. The rotated ones are also called as torch.ops.detectron2.*.
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
    """Supply the names that the installed detectron2 lacks.

    Returns:
        The supplied names, e.g. ``["numpy.int", "PIL.Image.LINEAR", "detectron2._C"]``; empty without
        detectron2, on a healthy install, and at the second call.
    """
    root = _package_root("detectron2")
    if root is None:
        return []
    supplied = _numpy_aliases(set(re.findall(r"\bnp\.([a-z]+)\b", _source(root, NUMPY_USERS))))
    if re.search(r"\bImage\.LINEAR\b", _source(root, PILLOW_USERS)):
        supplied += _pillow_constants()
    if "detectron2._C" not in sys.modules and PathFinder.find_spec("_C", [str(root)]) is None:
        supplied += _extension_stub()
    if "detectron2.export.api" not in sys.modules:
        supplied += _export_without_caffe2(root)
    return supplied


def _package_root(name: str) -> Path | None:
    """Return the folder of a package without importing it; None if it is not installed."""
    try:
        spec = find_spec(name)
    except (ImportError, ValueError):
        return None
    locations = list(spec.submodule_search_locations or []) if spec else []
    return Path(locations[0]) if locations else None


def _source(root: Path, files: tuple[str, ...]) -> str:
    """Return the source of the files that exist below a folder."""
    paths = [root / file for file in files]
    return "\n".join(path.read_text("utf-8", "replace") for path in paths if path.is_file())


def _numpy_aliases(used: set[str]) -> list[str]:
    import numpy as np

    missing = [name for name in _NUMPY_ALIASES if name in used and name not in vars(np)]
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
    """Register a stand-in for the C++ extension, which detectron2 and its environment report import."""
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
    sys.modules["detectron2.evaluation.fast_eval_api"] = _python_coco_metric()
    return ["detectron2._C"]


def _python_coco_metric() -> ModuleType:
    """Return a stand-in for the module of the C++ metric: pycocotools' COCOeval, which gives the same AP.

    `COCOEvaluator` asks for the C++ metric by default; without this, it would fail after the training.
    """
    module: Any = ModuleType(
        "detectron2.evaluation.fast_eval_api", "Stand-in: pycocotools' COCOeval in place of the C++ metric."
    )

    def __getattr__(name: str) -> Any:  # pycocotools imports matplotlib, which takes a second
        if name != "COCOeval_opt":
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")
        from pycocotools.cocoeval import COCOeval

        return COCOeval

    module.__getattr__ = __getattr__
    return module


def _export_without_caffe2(root: Path) -> list[str]:
    """Register an empty stand-in for `detectron2.export.api`, which needs Caffe2.

    detectron2 0.6 imports it together with the `TracingAdapter` of its FLOP counter; PyTorch no longer has
    Caffe2.
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
            "without rotated boxes and deformable convolution."
        )

    missing.__name__ = missing.__qualname__ = op
    return missing
