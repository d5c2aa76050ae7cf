"""Cost of DenseCLIP's language over a Mask R-CNN on the same trunk and dense pool."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import MIN_PAIRS, Row, flops, wall
from clipdense import add_clipdense_config, config_path
from clipdense.backbone import CLIPTrunk
from clipdense.run.config_file import merge_config_file

from detectron2.config import CfgNode, get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone, build_model
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage

__all__ = ["REDUCED", "FixedProposals", "add_arguments", "random_batch", "random_proposals", "rows"]

REDUCED: tuple[str, ...] = ("--clip", "shapes-rn", "--size", "128", "--batch", "1", "--flops-only")
"""Options of this suite in a reduced run of all suites."""

WHAT = "DenseCLIP | Mask R-CNN on the same trunk and dense pool"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this suite."""
    parser.add_argument("--clip", default="RN50-quickgelu", help="model name (weights are random)")
    parser.add_argument("--size", type=int, default=640, help="side of the images in pixels")
    parser.add_argument("--batch", type=int, default=2, help="images")
    parser.add_argument("--pairs", type=int, default=MIN_PAIRS, help="interleaved pairs of timed runs")
    parser.add_argument("--flops-only", action="store_true", help="leave the wall-clock rows out")


def rows(args: argparse.Namespace) -> Iterator[Row]:
    """Measure FLOPs and wall time of inference and of a training step."""
    device = args.device
    ours, floor = _denseclip(args.clip, device), _mask_rcnn(args.clip, device)
    batch = random_batch(args.size, args.batch, 80)
    proposals = random_proposals(args.size, args.batch, 1000, device)
    for model in (ours, floor):
        model.proposal_generator = FixedProposals(model.proposal_generator, proposals)

    for name, mode in (("inference", _inference), ("train_step", _train_step)):
        run_ours, run_floor = mode(ours, batch), mode(floor, batch)
        run_ours(), run_floor()  # computes class embeddings and anchors, once
        yield Row(
            f"denseclip/{name}_flops", flops(run_ours) / 1e9, flops(run_floor) / 1e9, "GFLOP", what=WHAT
        )
        if not args.flops_only:
            yield wall(
                f"denseclip/{name}_wall",
                run_ours,
                run_floor,
                pairs=args.pairs,
                what=WHAT,
                warm_up=False,
                images=args.batch,
            )


class DensePooledTrunk(Backbone):
    """A CLIP trunk that computes the dense map and the image embedding, and returns only its maps."""

    def __init__(self, trunk: CLIPTrunk) -> None:
        super().__init__()
        self.trunk = trunk

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Return the trunk's shapes."""
        return self.trunk.output_shape()

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Normalised images (B, 3, H, W) -> maps. A zero from the pool makes its backward pass run too."""
        maps, g, z = self.trunk.forward_joint(images)
        assert g is not None
        last = list(maps)[-1]
        return {**maps, last: maps[last] + 0.0 * (g.mean() + z.mean())}


class FixedProposals(nn.Module):
    """A proposal generator that runs another one and returns fixed proposals.

    With random weights, the number of regions, and so the work of the heads, would depend on the seed.
    """

    def __init__(self, generator: nn.Module, proposals: Sequence[Instances]) -> None:
        super().__init__()
        self.generator, self.proposals = generator, proposals

    def forward(self, *args: Any) -> tuple[Sequence[Instances], dict[str, Tensor]]:
        _, losses = self.generator(*args)
        return [Instances(p.image_size, **p.get_fields()) for p in self.proposals], losses


def _denseclip(clip: str, device: str) -> Any:
    cfg = _config(clip, device)
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.TRUNK.NAME = "DenseCLIPRCNN", "LanguageTrunk"
    return _build(cfg)


def _mask_rcnn(clip: str, device: str) -> Any:
    cfg = _config(clip, device)
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.TRUNK.NAME = "GeneralizedRCNN", "CLIPTrunk"
    model = _build(cfg)
    trunk = CLIPTrunk(cfg, ShapeSpec(channels=3), joint=True).to(device)
    model.backbone.bottom_up = DensePooledTrunk(trunk)
    return model


def _build(cfg: CfgNode) -> Any:
    torch.manual_seed(0)
    return build_model(cfg)


def _config(clip: str, device: str) -> CfgNode:
    cfg = get_cfg()
    add_clipdense_config(cfg)
    merge_config_file(cfg, config_path("Base-RCNN-FPN.yaml"))
    cfg.MODEL.DEVICE = device
    cfg.MODEL.CLIP.NAME, cfg.MODEL.CLIP.PRETRAINED = clip, "random"
    cfg.MODEL.TRUNK.NORM, cfg.MODEL.BACKBONE.FREEZE_AT = "BN", 0
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = [122.771, 116.746, 104.094], [68.501, 66.632, 70.323]
    # 100 detections per image, independent of the scores.
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST, cfg.MODEL.ROI_HEADS.NMS_THRESH_TEST = 0.0, 1.0
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("coco_2017_train",), ("coco_2017_val",)
    return cfg


def random_batch(size: int, count: int, classes: int) -> list[dict[str, Any]]:
    """Return Detectron2's input of ``count`` noise images of (size, size) pixels with 8 instances each."""
    generator = torch.Generator().manual_seed(0)
    batch = []
    for _ in range(count):
        instances = Instances((size, size), gt_boxes=Boxes(_boxes(8, size, generator)))
        instances.gt_classes = torch.randint(classes, (8,), generator=generator)
        instances.gt_masks = BitMasks(torch.ones(8, size, size, dtype=torch.bool))
        image = torch.randint(256, (3, size, size), generator=generator, dtype=torch.uint8)
        batch.append({"image": image, "height": size, "width": size, "instances": instances})
    return batch


def random_proposals(size: int, count: int, number: int, device: str) -> list[Instances]:
    """Return ``number`` random proposals for each of ``count`` images of (size, size) pixels."""
    generator = torch.Generator().manual_seed(1)
    return [
        Instances(
            (size, size),
            proposal_boxes=Boxes(_boxes(number, size, generator).to(device)),
            objectness_logits=torch.zeros(number, device=device),
        )
        for _ in range(count)
    ]


def _boxes(number: int, size: int, generator: torch.Generator) -> Tensor:
    corner = torch.rand(number, 2, generator=generator) * size * 0.5
    return torch.cat([corner, corner + size * (0.1 + 0.4 * torch.rand(number, 2, generator=generator))], 1)


def _inference(model: Any, batch: list[dict[str, Any]]) -> Callable[[], object]:
    def run() -> object:
        model.eval()
        with torch.inference_mode():
            return model(batch)

    return run


def _train_step(model: Any, batch: list[dict[str, Any]]) -> Callable[[], object]:
    def run() -> None:
        model.train()
        torch.manual_seed(0)  # the same regions are sampled
        model.zero_grad(set_to_none=True)
        with EventStorage():
            sum(model(batch).values()).backward()

    return run
