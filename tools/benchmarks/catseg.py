"""Memory of CAT-Seg with 847 classes, FLOPs that early rejection saves, and both beside the wall clock."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import MIN_PAIRS, Row, flops, peak_memory, wall
from clipdense import add_clipdense_config
from clipdense.clip.vocabulary import Vocabulary
from clipdense.run.config_file import merge_config_file
from clipdense.systems.catseg import cost

from detectron2.config import get_cfg
from detectron2.modeling import build_model

__all__ = ["FULL", "REDUCED", "add_arguments", "rows"]

META = True
"""Whether device meta counts some rows without computing."""

FULL: tuple[str, ...] = ("--config-file", "projects/CATSeg/configs/catseg_vitl_336.yaml")
REDUCED: tuple[str, ...] = (
    "--config-file",
    "configs/shapes/catseg_vit.yaml",
    "--size",
    "128",
    "128",
    "--classes",
    "20",
)
"""Options of this suite in a full and in a reduced run of all suites."""

CLASSES = 847
ROWS = ("k847", "rejection", "floor")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this suite."""
    parser.add_argument("--size", type=int, nargs=2, default=(640, 640), help="height and width in pixels")
    parser.add_argument("--classes", type=int, default=150, help="classes of the rows rejection and floor")
    parser.add_argument("--topk", type=int, default=8, help="classes that each position keeps")
    parser.add_argument("--present", type=int, default=10, help="classes that resemble some position")
    parser.add_argument(
        "--kept",
        type=int,
        default=30,
        help="meta device: classes that every view keeps (default: %(default)s)",
    )
    parser.add_argument("--pairs", type=int, default=MIN_PAIRS, help="interleaved pairs of timed runs")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS, help="rows to measure")
    parser.add_argument("--flops-only", action="store_true", help="skip the wall-clock rows")
    parser.add_argument(
        "--config-file",
        default="projects/CATSeg/configs/catseg_vitb_384.yaml",
        help="config of a CAT-Seg (weights are random, no data is read)",
    )


def rows(args: argparse.Namespace) -> Iterator[Row]:
    """Measure memory with 847 classes, FLOPs with and without early rejection, and cost over CLIP alone."""
    model = _model(args)
    image = torch.randint(0, 256, (3, *args.size), dtype=torch.uint8).to(args.device)
    batch = [{"image": image, "height": args.size[0], "width": args.size[1]}]
    if "k847" in args.rows:
        yield _memory(model, batch)
    _set_classes(model, args.classes)
    if "floor" in args.rows:
        yield from _floor(args, model, batch)
    if "rejection" in args.rows:
        yield from _rejection(args, model, batch)


def _model(args: argparse.Namespace) -> Any:
    cfg = get_cfg()
    add_clipdense_config(cfg)
    merge_config_file(cfg, args.config_file)
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS, cfg.MODEL.CLIP.PRETRAINED = args.device, "", "random"
    cfg.DATASETS.TRAIN = ()
    torch.manual_seed(0)
    with torch.device("meta" if args.device == "meta" else "cpu"):
        model = build_model(cfg)
    return model.eval().requires_grad_(False)  # the counter of FLOPs follows gradients


def _set_classes(model: Any, count: int, present: Tensor | None = None) -> None:
    """Set random text embeddings, so that no text tower has to run.

    Args:
        model: its vocabulary is set.
        count: number of classes.
        present: embeddings (N, D) of the first classes; the others point away from their mean.
    """
    generator = torch.Generator().manual_seed(0)
    text = F.normalize(torch.randn(count, model.clip.embed_dim, generator=generator), dim=-1)
    device = model.clip.logit_scale.device
    text = text.to(device)
    if present is not None:
        text = F.normalize(0.1 * text - F.normalize(present.mean(0), dim=-1), dim=-1)
        text[: len(present)] = F.normalize(present, dim=-1)
    vocabulary = Vocabulary.from_names([f"class {i}" for i in range(count)])
    prompts = text[:, None].expand(-1, len(model.prompts), -1)
    model.set_vocabulary(vocabulary, {"prompts": prompts})


def _forward(model: Any, batch: list[dict[str, Any]]) -> Any:
    with torch.inference_mode():
        return model(batch)[0]


def _views(model: Any, batch: list[dict[str, Any]]) -> Tensor:
    """Return the square views that CLIP takes."""
    kept: list[Tensor] = []
    handle = model.clip.visual.register_forward_pre_hook(lambda module, inputs: kept.append(inputs[0]))
    _forward(model, batch)
    handle.remove()
    return torch.cat(kept)


def _memory(model: Any, batch: list[dict[str, Any]]) -> Row:
    """Peak of a forward with 847 classes, less the peak of CLIP on the same views."""
    _set_classes(model, CLASSES)
    views = _views(model, batch)

    def clip() -> None:
        with torch.inference_mode():
            model.clip.visual(views, model.request)

    peak, own = peak_memory(lambda: _forward(model, batch)), peak_memory(clip)
    height, width = batch[0]["height"], batch[0]["width"]
    whole = 4 * CLASSES * (len(views) * model.windows.size**2 if model.windows.enabled else height * width)
    return Row(
        "catseg/k847_extra_gb",
        (peak - own) / 1e9,
        whole / 1e9,
        "GB",
        what=f"beyond CLIP's own, {CLASSES} classes | the maps of all classes and views alone",
        values={"peak_gb": peak / 1e9, "clip_gb": own / 1e9},
    )


def _rejection(args: argparse.Namespace, model: Any, batch: list[dict[str, Any]]) -> Iterator[Row]:
    views = _views(model, batch)
    with torch.inference_mode():
        dense = model.clip.visual(views, model.request).dense.flatten(2).transpose(1, 2).flatten(0, 1)
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randperm(len(dense), generator=generator)[: args.present]
    _set_classes(model, args.classes, dense[chosen.to(dense.device)].clone())
    plain, rejecting = model.evaluation, replace(model.evaluation, rejection_topk=args.topk)
    kept: list[float] = []

    def ours() -> None:
        model.evaluation = rejecting
        labels = _forward(model, batch)
        model.evaluation = plain
        if args.device != "meta":
            kept.append((labels["sem_seg"].amax((1, 2)) > 1e-6).float().mean().item())

    def other() -> None:
        _forward(model, batch)

    if args.device == "meta":
        what = f"{args.kept} classes kept in every view | all {args.classes}"
        with mock.patch.object(cost, "keep_top_classes", partial(_first_classes, args.kept)):
            counts = flops(ours) / 1e9, flops(other) / 1e9
        yield Row("catseg/early_rejection_flops", *counts, "GFLOP", what=what)
        return
    what = f"the best {args.topk} classes of each position | all {args.classes}"
    counts = flops(ours) / 1e9, flops(other) / 1e9
    notes = (
        f"{args.present} of the classes resemble some position; {kept[0]:.0%} of all are kept in some view, "
        "with random weights."
    )
    yield Row("catseg/early_rejection_flops", *counts, "GFLOP", what=what, notes=notes)
    if not args.flops_only:
        name = "catseg/early_rejection"
        yield wall(name, ours, other, pairs=args.pairs, what=what, warm_up=False, images=1)


def _first_classes(count: int, scores: Tensor, topk: int) -> Tensor:
    """Keep ``count`` classes whatever their scores, which the meta device does not have."""
    return torch.arange(count, device=scores.device)


def _floor(args: argparse.Namespace, model: Any, batch: list[dict[str, Any]]) -> Iterator[Row]:
    views = _views(model, batch)

    def ours() -> None:
        _forward(model, batch)

    def floor() -> None:
        with torch.inference_mode():
            model.clip.visual(views, model.request)

    what = f"CAT-Seg, {args.classes} classes | CLIP on its {len(views)} views"
    yield Row("catseg/inference_flops", flops(ours) / 1e9, flops(floor) / 1e9, "GFLOP", what=what)
    if not args.flops_only:
        yield wall("catseg/inference", ours, floor, pairs=args.pairs, what=what, warm_up=False, images=1)
