"""Cost of DenseCLIP's segmentation: sliding windows, and language over Semantic FPN on the same trunk."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor

from benchmarks import MIN_PAIRS, Row, flops, wall
from clipdense import add_clipdense_config
from clipdense.backbone import CLIPTrunk
from clipdense.clip import TowerRequest
from clipdense.inference import window_starts

from detectron2.config import CfgNode, get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone, build_model

__all__ = ["REDUCED", "add_arguments", "rows"]

REDUCED: tuple[str, ...] = ("--clip", "shapes-rn", "--size", "64", "96", "--window", "64", "--stride", "32")
"""Options of this suite in a reduced run of all suites."""

WINDOWS = "sliding-window inference | one batched forward pass of the same windows"
LANGUAGE = "DenseCLIP with cached text | CLIP's image encoder and Semantic FPN on its maps"
TRUNK = "DenseCLIP with cached text | Semantic FPN on the trunk, without CLIP's attention pool"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this suite."""
    parser.add_argument("--clip", default="RN50-quickgelu", help="model name (weights are random)")
    parser.add_argument(
        "--size", type=int, nargs=2, default=(512, 683), help="height and width of the image in pixels"
    )
    parser.add_argument("--window", type=int, default=512, help="side of the windows in pixels")
    parser.add_argument("--stride", type=int, default=341, help="distance of windows in pixels")
    parser.add_argument("--pairs", type=int, default=MIN_PAIRS, help="interleaved pairs of timed runs")
    parser.add_argument("--flops-only", action="store_true", help="leave the wall-clock rows out")


def rows(args: argparse.Namespace) -> Iterator[Row]:
    """Measure FLOPs and wall time of windows, and of inference on one window."""
    device = args.device
    cfg = _config(args, device)
    ours, plain = _denseclip(cfg), _semantic_fpn(cfg)
    what = "trained parameters of DenseCLIP | of Semantic FPN on the same trunk"
    yield Row("denseclip_seg/parameters", _millions(ours), _millions(plain), "million", what=what)
    height, width = args.size
    image = torch.randint(
        256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    window = image[:, : args.window, : args.window]
    windows = torch.stack(
        [
            image[:, y : y + args.window, x : x + args.window]
            for y, x in product(*(window_starts(side, args.window, args.stride) for side in (height, width)))
        ]
    )
    normalised = ((windows.to(device) - ours.pixel_mean) / ours.pixel_std).contiguous()
    yield from _pair("windows", _model(ours, image), _predict(ours, normalised), WINDOWS, args)
    yield from _pair("trunk", _model(ours, window), _model(plain, window), TRUNK, args)
    floor = _with_image_embedding(plain, cfg)
    yield from _pair("inference", _model(ours, window), _model(floor, window), LANGUAGE, args)


def _pair(
    name: str, ours: Callable[[], object], other: Callable[[], object], what: str, args: argparse.Namespace
) -> Iterator[Row]:
    ours(), other()  # computes class embeddings, once
    name = f"denseclip_seg/{name}"
    yield Row(f"{name}_flops", flops(ours) / 1e9, flops(other) / 1e9, "GFLOP", what=what)
    if not args.flops_only:
        yield wall(f"{name}_wall", ours, other, pairs=args.pairs, what=what, warm_up=False, images=1)


def _model(model: Any, image: Tensor) -> Callable[[], object]:
    @torch.inference_mode()
    def run() -> object:
        return model([{"image": image}])

    return run


def _predict(model: Any, windows: Tensor) -> Callable[[], object]:
    @torch.inference_mode()
    def run() -> object:
        return model.predict(windows)

    return run


def _denseclip(cfg: CfgNode) -> Any:
    cfg = cfg.clone()
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.TRUNK.NAME = "DenseCLIPSemanticSegmentor", "LanguageTrunk"
    torch.manual_seed(0)
    return build_model(cfg).eval()


def _semantic_fpn(cfg: CfgNode) -> Any:
    cfg = cfg.clone()
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.TRUNK.NAME = "WindowedSemanticSegmentor", "CLIPTrunk"
    torch.manual_seed(0)
    return build_model(cfg).eval()


class ImageEncoder(Backbone):
    """A CLIP trunk that computes CLIP's image embedding, too, and returns only its maps."""

    def __init__(self, trunk: CLIPTrunk) -> None:
        super().__init__()
        self.trunk = trunk

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Return the trunk's shapes."""
        return self.trunk.output_shape()

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Map normalised images (B, 3, H, W) to the trunk's maps."""
        maps: dict[str, Tensor] = self.trunk(images)
        tower: Any = self.trunk.tower
        tower.read(list(maps.values())[-1], TowerRequest(pooled=True))
        return maps


def _with_image_embedding(model: Any, cfg: CfgNode) -> Any:
    trunk = CLIPTrunk(cfg, ShapeSpec(channels=3), joint=True).to(cfg.MODEL.DEVICE).eval()
    model.backbone.bottom_up = ImageEncoder(trunk)
    return model


def _millions(model: Any) -> float:
    """Return the number of trained parameters, so without the frozen text tower, in millions."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6


def _config(args: argparse.Namespace, device: str) -> CfgNode:
    cfg = get_cfg()
    add_clipdense_config(cfg)
    keys = cfg.MODEL
    keys.DEVICE, keys.CLIP.NAME, keys.CLIP.PRETRAINED = device, args.clip, "random"
    keys.CLIP.POSITION_RULE, keys.CLIP.POSITION_GRID = "bilinear", args.window // 32
    keys.PIXEL_MEAN, keys.PIXEL_STD = [122.771, 116.746, 104.094], [68.501, 66.632, 70.323]
    keys.BACKBONE.NAME, keys.BACKBONE.FREEZE_AT, keys.TRUNK.NORM = "build_trunk_fpn_backbone", 0, "BN"
    keys.FPN.IN_FEATURES, keys.FPN.TOP_BLOCK, keys.FPN.PAD = ["res2", "res3", "res4", "res5"], "", False
    head = keys.SEM_SEG_HEAD
    head.NAME, head.IN_FEATURES, head.NORM = "SemanticFPNHead", ["p2", "p3", "p4", "p5"], "BN"
    head.CONVS_DIM, head.NUM_CLASSES = 256, 150
    keys.LANGUAGE.CLASSES_FROM, keys.LANGUAGE.SCORE = "stuff_classes", "cosine"
    keys.PIXEL_TEXT.SOURCE = "sem_seg"
    keys.SEMANTIC_SEGMENTOR.WINDOW = [args.window] * 2
    keys.SEMANTIC_SEGMENTOR.STRIDE = [args.stride] * 2
    cfg.INPUT.FORMAT = "RGB"
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("ade20k_sem_seg_train",), ("ade20k_sem_seg_val",)
    return cfg
