"""Cost of zero-shot segmentation beyond its forwards of CLIP and of the second model, and memory of 847
classes."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks import MIN_PAIRS, Row, flops, peak_memory, wall
from clipdense import add_clipdense_config
from clipdense.clip import TowerRequest
from clipdense.clip.vocabulary import Vocabulary
from clipdense.inference import map_windows
from clipdense.run.config_file import merge_config_file

from detectron2.config import get_cfg
from detectron2.modeling import build_model

__all__ = ["REDUCED", "add_arguments", "rows"]

META = True
"""Whether device meta counts some rows without computing."""

REDUCED: tuple[str, ...] = ("--config-file", "configs/shapes/zero_shot_sclip_vit.yaml", "--size", "64", "96")
REDUCED += ("--large", "64", "96", "--methods", "sclip", "clearclip", "naclip")
"""Options of this suite in a reduced run of all suites."""

CLASSES, MANY = 150, 847
ROWS = ("flops", "wall", "k847")
WHAT = "{} | its forwards of windows"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this suite."""
    parser.add_argument("--size", type=int, nargs=2, default=(336, 448), help="height and width in pixels")
    parser.add_argument(
        "--large", type=int, nargs=2, default=(640, 853), help="size of the image with 847 classes"
    )
    parser.add_argument("--methods", nargs="+", default=("sclip", "clearclip", "naclip", "proxyclip"))
    parser.add_argument("--pairs", type=int, default=MIN_PAIRS, help="interleaved pairs of timed runs")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS, help="rows to measure")
    parser.add_argument("--flops-only", action="store_true", help="the same as --rows flops")
    parser.add_argument(
        "--config-file",
        default="projects/ZeroShot/configs/ade20k.yaml",
        help="config of a ZeroShotSegmentor (weights are random, no data is read)",
    )


def rows(args: argparse.Namespace) -> Iterator[Row]:
    """Measure each method beside the plain forwards of its windows, and the memory of many classes."""
    wanted = ("flops",) if args.flops_only else args.rows
    for method in args.methods if {"flops", "wall"} & set(wanted) else ():
        model = _model(args, method, CLASSES)
        batch = _batch(args.size, args.device)
        ours, floor = _forward(model, batch), _floor(model, batch)
        what = WHAT.format(method)
        if "flops" in wanted:
            cost = flops(ours) / 1e9, flops(floor) / 1e9
            yield Row(f"zero_shot/{method}_windows_flops", *cost, "GFLOP", what=what)
        if "wall" in wanted:
            name = f"zero_shot/{method}_windows_wall"
            yield wall(name, ours, floor, pairs=args.pairs, what=what, warm_up=False, images=1)
    if "k847" in wanted:
        yield _memory(args)


def _memory(args: argparse.Namespace) -> Row:
    """Peak of a forward with 847 classes, less the peak of the forwards of its windows."""
    model = _model(args, args.methods[0], MANY)
    batch = _batch(args.large, args.device)
    peak, own = (peak_memory(run) / 1e9 for run in (_forward(model, batch), _floor(model, batch)))
    return Row(
        "zero_shot/k847_extra_gb",
        peak - own,
        4 * MANY * args.large[0] * args.large[1] / 1e9,
        "GB",
        what=f"beyond the forwards of windows, {MANY} classes | the maps of all classes alone",
        values={"peak_gb": peak, "windows_gb": own},
    )


def _model(args: argparse.Namespace, method: str, classes: int) -> Any:
    device = args.device
    cfg = get_cfg()
    add_clipdense_config(cfg)
    merge_config_file(cfg, args.config_file)
    cfg.MODEL.DEVICE, cfg.MODEL.CLIP.PRETRAINED, cfg.DATASETS.TEST = device, "random", ()
    keys = cfg.MODEL.ZERO_SHOT
    keys.METHOD, keys.CLASS_NAMES = method, ""
    if method == "proxyclip":
        keys.FEATURES.NAME, keys.FEATURES.PRETRAINED = "vit_base_patch8_224.dino", "random"
        keys.WINDOW = 336
    torch.manual_seed(0)
    with torch.device("meta" if device == "meta" else "cpu"):
        model: Any = build_model(cfg).eval()
    # random text embeddings, so that no text tower has to run
    generator = torch.Generator().manual_seed(0)
    text = F.normalize(torch.randn(classes, model.encoder.clip.embed_dim, generator=generator))
    vocabulary = Vocabulary.from_names([f"class {i}" for i in range(classes)])
    embeddings = {"text": text.to(device), "classes": torch.arange(classes, device=device)}
    model.set_vocabulary(vocabulary, embeddings)
    return model


def _batch(size: tuple[int, int], device: str) -> list[dict[str, Any]]:
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8, device=device)
    return [{"image": image, "height": size[0], "width": size[1]}]


def _forward(model: Any, batch: list[dict[str, Any]]) -> Callable[[], object]:
    def run() -> object:
        with torch.inference_mode():
            return model(batch)

    return run


def _floor(model: Any, batch: list[dict[str, Any]]) -> Callable[[], object]:
    """Run CLIP's plain forward, and that of the second model, on the windows of the method."""
    encoder = model.encoder
    settings = encoder.windows

    def forwards(crops: torch.Tensor) -> torch.Tensor:
        if encoder.features is not None:
            encoder.features(crops, encoder.statistics)
        dense: torch.Tensor = encoder.clip.visual(crops, TowerRequest(dense="plain")).dense
        return dense

    def run() -> object:
        with torch.inference_mode():
            pixels = encoder.clip.normalize(batch[0]["image"][None])
            return map_windows(
                forwards,
                pixels,
                settings.window,
                settings.stride,
                multiple=encoder.multiple,
                batch_size=settings.batch_size,
            )

    return run
