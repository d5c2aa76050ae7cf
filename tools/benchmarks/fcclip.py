"""Cost of FC-CLIP's two classifiers, their fusion and the merging of masks."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import MIN_PAIRS, Row, flops, peak_memory, wall
from clipdense import add_clipdense_config
from clipdense.clip.vocabulary import Vocabulary
from clipdense.maskformer import MaskPrediction
from clipdense.run.config_file import merge_config_file

from detectron2.config import get_cfg
from detectron2.modeling import build_model

__all__ = ["REDUCED", "add_arguments", "rows"]

META = True
"""Whether device meta counts some rows without computing."""

REDUCED: tuple[str, ...] = ("--config-file", "configs/shapes/fcclip_rn.yaml", "--size", "128", "160")
"""Options of this suite in a reduced run of all suites."""

WHAT = "FC-CLIP | its CLIP trunk, pixel decoder and decoder alone"
WHAT_MEMORY = "classes and merging of 1,203 classes | of 20"
CLASSES = (150, 1203)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this suite; the defaults are the contract's."""
    parser.add_argument(
        "--config-file",
        default="projects/FCCLIP/configs/fcclip_convnext_large_d_320.yaml",
        help="config of an FCCLIP (weights are random, no data is read)",
    )
    parser.add_argument("--size", type=int, nargs=2, default=(640, 853), help="height and width in pixels")
    parser.add_argument("--pairs", type=int, default=MIN_PAIRS, help="interleaved pairs of timed runs")
    parser.add_argument("--flops-only", action="store_true", help="leave the wall-clock rows out")


def rows(args: argparse.Namespace) -> Iterator[Row]:
    """FLOPs and wall time of panoptic inference with 150 and 1,203 classes; memory of large vocabularies."""
    model = _model(args.config_file, args.device)
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, *args.size), generator=generator, dtype=torch.uint8)
    batch = [{"image": image, "height": args.size[0], "width": args.size[1]}]
    floor = _floor(model, batch)
    if args.device == "meta":
        yield from _counted(model, batch, floor)
        return
    least = flops(floor) / 1e9
    for classes in CLASSES:
        _set_classes(model, classes)
        ours = _inference(model, batch)
        name = _name(classes)
        yield Row(f"{name}_flops", flops(ours) / 1e9, least, "GFLOP", what=WHAT)
        if not args.flops_only:
            yield wall(f"{name}_wall", ours, floor, pairs=args.pairs, what=WHAT, warm_up=False, images=1)
    with torch.inference_mode():
        proposals = model.propose(batch)
    peaks = []
    for classes in (1203, 20):
        _set_classes(model, classes)
        peaks.append(peak_memory(_classify_and_merge(model, proposals, batch)) / 1e9)
    yield Row("fcclip/k1203_memory", peaks[0], peaks[1], "GB", what=WHAT_MEMORY)


def _model(config_file: str, device: str) -> Any:
    cfg = get_cfg()
    add_clipdense_config(cfg)
    merge_config_file(cfg, config_file)
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS, cfg.MODEL.CLIP.PRETRAINED = device, "", "random"
    cfg.MODEL.MASK_FORMER.TEST.SEMANTIC_ON = cfg.MODEL.MASK_FORMER.TEST.INSTANCE_ON = False
    cfg.DATASETS.TRAIN = ()
    torch.manual_seed(0)
    with torch.device("meta" if device == "meta" else "cpu"):
        model: Any = build_model(cfg).eval().requires_grad_(False)  # the counter of FLOPs follows gradients
    return model


def _set_classes(model: Any, classes: int) -> None:
    """Set random text embeddings, so that no text tower has to run."""
    generator = torch.Generator().manual_seed(classes)
    rows = F.normalize(torch.randn(classes, model.clip.embed_dim, generator=generator))
    base = tuple((torch.rand(classes, generator=generator) > 0.5).tolist())
    vocabulary = replace(Vocabulary.from_names([f"class {i}" for i in range(classes)]), base=base)
    text = {"rows": rows.to(model.device), "classes": torch.arange(classes, device=model.device)}
    model.set_vocabulary(vocabulary, text)


def _inference(model: Any, batch: list[dict[str, Any]]) -> Callable[[], object]:
    def run() -> object:
        model.eval()
        with torch.inference_mode():
            return model(batch)

    return run


def _name(classes: int) -> str:
    return "fcclip/inference" if classes == CLASSES[0] else f"fcclip/k{classes}"


def _counted(model: Any, batch: list[dict[str, Any]], floor: Callable[[], object]) -> Iterator[Row]:
    """Count FLOPs on the meta device, without the merging of masks, which multiplies no matrices."""

    def run() -> object:
        model.eval()
        with torch.inference_mode():
            return model.classify(model.propose(batch), batch)

    # there is no autocast on this device
    with mock.patch.object(torch, "autocast", lambda *_, **__: nullcontext()):
        least = flops(floor) / 1e9
        for classes in CLASSES:
            _set_classes(model, classes)
            yield Row(f"{_name(classes)}_flops", flops(run) / 1e9, least, "GFLOP", what=WHAT)


class _NoClasses(nn.Module):
    """Class head that predicts nothing."""

    def forward(self, queries: Tensor, mask_logits: Tensor, mask_features: Tensor) -> MaskPrediction:
        return MaskPrediction(mask_logits=mask_logits)


def _floor(model: Any, batch: list[dict[str, Any]]) -> Callable[[], object]:
    """The floor: the same trunk and mask network, without any classifier and without CLIP's last map."""

    def run() -> object:
        predictor = model.head.predictor
        head, predictor.class_embed = predictor.class_embed, _NoClasses()
        model.backbone.train()  # training mode omits the map in the joint space
        try:
            with torch.inference_mode():
                features = model.backbone(model.preprocess_image(batch).tensor)
                return model.head(features)
        finally:
            predictor.class_embed = head
            model.backbone.eval()

    return run


def _classify_and_merge(model: Any, proposals: Any, batch: list[dict[str, Any]]) -> Callable[[], object]:
    def run() -> object:
        with torch.inference_mode():
            (scores,) = model.classify(proposals, batch)
            return model.merge(scores, proposals.masks(0), batch[0])

    return run
