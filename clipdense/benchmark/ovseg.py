"""What OVSeg adds to its CLIP forwards: the crops, and semantic maps of large vocabularies."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import torch
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from torch import Tensor

from clipdense.benchmark import MIN_PAIRS, Row, peak_memory, wall
from clipdense.regions import crop_masks, semantic_labels

__all__ = ["add_arguments", "random_masks", "rows"]

CLASSES = 847
CROP_SIZE = 224
THRESHOLD = 0.4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this suite; the defaults are the contract's."""
    parser.add_argument("--size", type=int, nargs=2, default=(640, 853), help="height and width in pixels")
    parser.add_argument("--masks", type=int, default=100, help="random masks")
    parser.add_argument("--batch", type=int, default=64, help="crops that are made at a time")
    parser.add_argument("--pairs", type=int, default=MIN_PAIRS, help="interleaved pairs of timed runs")
    parser.add_argument(
        "--reference",
        type=Path,
        default=Path("tests/crop_loop.py"),
        help="file with `crop_loop`, the crops mask by mask that ours are timed against",
    )


def rows(args: argparse.Namespace) -> Iterator[Row]:
    """Wall time of the crops; memory that labels of 847 classes take."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    masks = random_masks(args.masks, *args.size).to(device)
    image = torch.randint(0, 256, (3, *args.size), dtype=torch.uint8, device=device)
    pixels: dict[str, Any] = {"pixel_mean": OPENAI_DATASET_MEAN, "pixel_std": OPENAI_DATASET_STD}
    loop = _reference(args.reference)

    def ours() -> None:
        crops = crop_masks(image, masks, "ovseg", size=CROP_SIZE, **pixels)
        for part in crops.parts(args.batch):
            crops.regions(part), crops.region_masks(part)

    yield wall(
        "ovseg/crop_stage",
        ours,
        lambda: loop(image, masks, threshold=THRESHOLD, size=CROP_SIZE, **pixels),
        pairs=args.pairs,
        kind="speedup",
        what=f"{args.masks} masks at once | one by one",
    )
    scores = torch.rand(args.masks, CLASSES, device=device).softmax(-1)
    size = (args.size[0], args.size[1])
    peak = peak_memory(lambda: semantic_labels(scores, masks, size))
    whole = 4 * CLASSES * masks[0].numel()
    yield Row(
        "ovseg/k847_extra_gb", peak / 1e9, whole / 1e9, "GB", what=f"labels of {CLASSES} classes | their maps"
    )


def random_masks(count: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Soft ellipses (N, H, W) in 0 .. 1 anywhere in an image, from a twentieth of its sides to all of it."""
    generator = torch.Generator().manual_seed(seed)
    side = torch.tensor([height, width])
    centres = torch.rand(count, 2, generator=generator) * side
    radii = torch.empty(count, 2).uniform_(0.025, 0.5, generator=generator) * side
    masks = torch.empty(count, height, width)
    for mask, (y, x), (down, across) in zip(masks, centres.tolist(), radii.tolist(), strict=True):
        rows = ((torch.arange(height) - y) / down).square()
        columns = ((torch.arange(width) - x) / across).square()
        mask.copy_((4 * (1 - rows[:, None] - columns)).sigmoid())
    return masks


def _reference(path: Path) -> Callable[..., object]:
    if not path.is_file():
        raise FileNotFoundError(f"no {path}: run this from a checkout, or name the file with --reference")
    spec = spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    loop: Callable[..., object] = module.crop_loop
    return loop
