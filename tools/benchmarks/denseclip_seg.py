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
from clipdense.backbone import CLIPTrunk, LanguageTrunk
from clipdense.backbone.class_text import ClassTable
from clipdense.clip import TowerRequest
from clipdense.inference import window_starts
from clipdense.run.config_file import merge_config_file

from detectron2.config import CfgNode, get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone, build_model

__all__ = ["REDUCED", "add_arguments", "rows"]

REDUCED: tuple[str, ...] = (
    "--config-file",
    "configs/shapes/denseclip_semantic_fpn_rn.yaml",
    "--size",
    "64",
    "96",
    "--window",
    "64",
)
"""Options of this suite in a reduced run of all suites."""

META = True
"""Whether device meta counts some rows without computing."""

WINDOWS = "sliding-window inference | one batched forward pass of the same windows"
LANGUAGE = "DenseCLIP with cached text | CLIP's image encoder and the decoder on its maps"
TRUNK = "DenseCLIP with cached text | the decoder on the trunk, without CLIP's attention pool"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this suite."""
    parser.add_argument(
        "--config-file",
        default="projects/DenseCLIP/configs/semantic_fpn_rn50.yaml",
        help="config of a model on a LanguageTrunk with a CLIP; weights are random (default: %(default)s)",
    )
    parser.add_argument(
        "--size",
        type=int,
        nargs=2,
        help="height and width of the image in pixels (default: the window and 4/3 of it)",
    )
    parser.add_argument("--window", type=int, help="side of the windows in pixels (default: the config's)")
    parser.add_argument("--pairs", type=int, default=MIN_PAIRS, help="interleaved pairs of timed runs")
    parser.add_argument("--flops-only", action="store_true", help="leave the wall-clock rows out")


def rows(args: argparse.Namespace) -> Iterator[Row]:
    """Measure FLOPs and wall time of windows, and of inference on one window."""
    cfg = _config(args)
    ours, plain = _build(cfg), _build(_without_language(cfg))
    what = "trained parameters of DenseCLIP | of the decoder on the same trunk"
    yield Row("denseclip_seg/parameters", _millions(ours), _millions(plain), "million", what=what)
    if args.device == "meta":  # tokens have no length there
        trunk = next(m for m in ours.modules() if isinstance(m, LanguageTrunk))
        trunk.text = ClassTable(trunk.text.classes, trunk.text.embed_dim).to("meta")
    side, stride = cfg.MODEL.SEMANTIC_SEGMENTOR.WINDOW[0], cfg.MODEL.SEMANTIC_SEGMENTOR.STRIDE[0]
    height, width = args.size or (side, side * 4 // 3)
    image = torch.randint(
        256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    ).to(args.device)
    window = image[:, :side, :side]
    starts = product(*(window_starts(length, side, stride) for length in (height, width)))
    windows = torch.stack([image[:, y : y + side, x : x + side] for y, x in starts])
    normalised = ((windows - ours.pixel_mean) / ours.pixel_std).contiguous()
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
    if not args.flops_only and args.device != "meta":
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


def _without_language(cfg: CfgNode) -> CfgNode:
    """Replace the language trunk by the trunk that it scores."""
    cfg = cfg.clone()
    keys = cfg.MODEL
    keys.META_ARCHITECTURE = "WindowedSemanticSegmentor"
    holder = keys.BACKBONE if keys.BACKBONE.NAME == "LanguageTrunk" else keys.TRUNK
    holder.NAME = keys.LANGUAGE.TRUNK
    return cfg


def _build(cfg: CfgNode) -> Any:
    torch.manual_seed(0)
    with torch.device("meta" if cfg.MODEL.DEVICE == "meta" else "cpu"):
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
        if hasattr(tower, "attnpool"):  # a ViT has the embedding with its last block
            tower.read(list(maps.values())[-1], TowerRequest(pooled=True))
        return maps


def _with_image_embedding(model: Any, cfg: CfgNode) -> Any:
    with torch.device("meta" if cfg.MODEL.DEVICE == "meta" else "cpu"):
        trunk: Any = BACKBONE_REGISTRY.get(cfg.MODEL.LANGUAGE.TRUNK)(cfg, ShapeSpec(channels=3), joint=True)
    encoder = ImageEncoder(trunk.to(cfg.MODEL.DEVICE).eval())
    if hasattr(model.backbone, "bottom_up"):
        model.backbone.bottom_up = encoder
    else:
        model.backbone = encoder
    return model


def _millions(model: Any) -> float:
    """Return the number of trained parameters, so without the frozen text tower, in millions."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6


def _config(args: argparse.Namespace) -> CfgNode:
    cfg = get_cfg()
    add_clipdense_config(cfg)
    merge_config_file(cfg, args.config_file)
    keys = cfg.MODEL
    keys.DEVICE, keys.WEIGHTS, keys.CLIP.PRETRAINED = args.device, "", "random"
    if args.window:
        keys.SEMANTIC_SEGMENTOR.WINDOW = [args.window] * 2
        keys.SEMANTIC_SEGMENTOR.STRIDE = [2 * args.window // 3] * 2
    if not keys.SEMANTIC_SEGMENTOR.WINDOW:
        raise ValueError(f"{args.config_file} has no sliding windows: give --window")
    return cfg
