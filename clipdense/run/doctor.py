"""What clipdense finds on this machine: versions, devices, caches, and optional packages."""

from __future__ import annotations

import os
import platform
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import torch

import clipdense
from clipdense.clip.sources import weights_folder
from clipdense.files import cache_dir
from clipdense.paths import datasets_root

__all__ = ["EXTRAS", "Finding", "examine"]

_REQUIRED = ("torch", "torchvision", "open_clip_torch", "timm", "numpy", "pillow", "opencv-python-headless")

EXTRAS: dict[str, tuple[tuple[str, ...], str]] = {
    "web": (("gradio",), "clipdense serve"),
    "export": (("onnx", "onnxscript", "onnxruntime"), "clipdense export"),
    "supervision": (("supervision",), "results.to_supervision()"),
    "mining": (("spacy",), "nouns of captions by a tagger"),
    "sam": (("transformers",), "masks of SAM (Trident, CorrCLIP, OVSeg)"),
    "scale": (("ray", "fsspec", "aiohttp"), "many machines, remote shards"),
    "track": (("wandb", "trackio"), "experiment trackers"),
}
"""Extra of ``pip install clipdense[EXTRA]`` -> its modules, and what needs them."""


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        topic: what was examined.
        value: what was found.
        remedy: what to do about it; "" if nothing is wrong or missing.
        optional: whether clipdense works without it.
    """

    topic: str
    value: str
    remedy: str = ""
    optional: bool = True


def examine() -> list[Finding]:
    """Examine the installation.

    Returns:
        Findings: versions, detectron2, devices, folders, and the optional packages.
    """
    python = platform.python_version()
    findings = [
        Finding("clipdense", f"{clipdense.__version__} in {Path(clipdense.__file__).parent}"),
        Finding("python", f"{python} ({sys.executable}), {platform.platform(terse=True)}"),
    ]
    findings += [_package(name) for name in _REQUIRED]
    return [*findings, _detectron2(), *_devices(), *_folders(), *map(_extra, EXTRAS)]


def _package(name: str) -> Finding:
    try:
        return Finding(name, version(name))
    except PackageNotFoundError:
        if name.startswith("opencv") and find_spec("cv2"):  # another build of OpenCV serves as well
            return Finding(name, "another build of OpenCV")
        return Finding(name, "not installed", f"pip install {name}", optional=False)


def _detectron2() -> Finding:
    spec = find_spec("detectron2")
    if spec is None or not spec.submodule_search_locations:
        remedy = (
            "pip install --no-build-isolation pb1-detectron2 (the Python part of 0.6), or "
            "git+https://github.com/facebookresearch/detectron2; clipdense.clip and clipdense.regions work "
            "without it"
        )
        return Finding("detectron2", "not installed", remedy, optional=False)
    folder = Path(next(iter(spec.submodule_search_locations)))
    compiled = any(folder.glob("_C*.so")) or any(folder.glob("_C*.pyd"))
    kind = "with its C++ extension" if compiled else "Python part only; clipdense supplies what it lacks"
    for name in ("detectron2", "pb1-detectron2"):
        try:
            return Finding("detectron2", f"{version(name)} ({name}), {kind}")
        except PackageNotFoundError:
            continue
    return Finding("detectron2", f"{folder}, {kind}")


def _devices() -> list[Finding]:
    cpu = Finding("cpu", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads of torch")
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return [cpu, Finding("cuda", f"{torch.version.cuda}: {', '.join(names)}")]
    if torch.backends.mps.is_available():
        return [cpu, Finding("mps", "available")]
    return [cpu, Finding("cuda", "no GPU is visible to torch; models run on the CPU")]


def _folders() -> list[Finding]:
    datasets, hub = datasets_root(), os.environ.get("HF_HOME", "~/.cache/huggingface")
    return [
        Finding("cache", f"{cache_dir()} (CLIPDENSE_CACHE)"),
        Finding("weights of open_clip", f"{Path(hub).expanduser()} (HF_HOME), {weights_folder()}"),
        Finding("datasets", f"{datasets.resolve()} (DETECTRON2_DATASETS)" + _absent(datasets)),
    ]


def _absent(folder: Path) -> str:
    return "" if folder.is_dir() else ", which does not exist"


def _extra(name: str) -> Finding:
    modules, purpose = EXTRAS[name]
    missing = [module for module in modules if not _is_installed(module)]
    if not missing:
        return Finding(f"extra {name}", f"installed: {purpose}")
    return Finding(
        f"extra {name}", f"missing {', '.join(missing)}: {purpose}", f"pip install 'clipdense[{name}]'"
    )


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):
        return False
