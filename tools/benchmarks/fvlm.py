"""Cost of F-VLM's open vocabulary: text classification, CLIP's scores and their fusion."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import MIN_PAIRS, Row, flops, peak_memory, wall
from benchmarks.denseclip import FixedProposals, random_batch, random_proposals
from clipdense import add_clipdense_config
from clipdense.clip.vocabulary import Vocabulary
from clipdense.run.config_file import merge_config_file

from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

__all__ = ["REDUCED", "add_arguments", "rows"]

REDUCED: tuple[str, ...] = ("--config-file", "configs/shapes/fvlm_vit.yaml", "--size", "128")
"""Options of this suite in a reduced run of all suites."""

WHAT = "F-VLM | its trunk, pyramid, RPN and heads alone"
WHAT_MEMORY = "a training step | the same on maps that are there"
PROPOSALS = 1000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this suite; the defaults are the contract's."""
    parser.add_argument(
        "--config-file",
        default="projects/FVLM/configs/fvit_b16_ovcoco.yaml",
        help="config of an FVLM (weights are random, no data is read)",
    )
    parser.add_argument("--size", type=int, default=640, help="side of the images in pixels")
    parser.add_argument("--batch", type=int, default=1, help="images")
    parser.add_argument("--pairs", type=int, default=MIN_PAIRS, help="interleaved pairs of timed runs")
    parser.add_argument("--flops-only", action="store_true", help="leave the wall-clock rows out")


def rows(args: argparse.Namespace) -> Iterator[Row]:
    """FLOPs and wall time of inference with 80 and 1203 classes; peak memory of a training step."""
    device = args.device
    model = _model(args.config_file, device)
    proposals = random_proposals(args.size, args.batch, PROPOSALS, device)
    model.proposal_generator = FixedProposals(model.proposal_generator, proposals)
    model.eval()
    for classes, limit in ((80, 100), (1203, 300)):
        generator = torch.Generator().manual_seed(classes)
        text = F.normalize(torch.randn(classes, model.trunk.tower.embed_dim, generator=generator))
        base = (torch.rand(classes, generator=generator) > 0.3).tolist()
        vocabulary = replace(Vocabulary.from_names([f"class {i}" for i in range(classes)]), base=tuple(base))
        model.set_vocabulary(vocabulary, {"classes": text.to(device)})
        # the number of detections does not depend on the scores
        model.roi_heads.box_predictor.test_score_thresh = 2.0 / classes
        model.roi_heads.box_predictor.test_topk_per_image = limit
        batch = random_batch(args.size, args.batch, classes)
        ours, floor = _inference(model, batch), _floor(model, batch)
        ours(), floor()  # fill caches: anchors, position tables
        cost = flops(ours) / 1e9, flops(floor) / 1e9
        yield Row(f"fvlm/k{classes}_flops", *cost, "GFLOP", what=WHAT)
        if not args.flops_only:
            name = f"fvlm/k{classes}_wall"
            yield wall(name, ours, floor, pairs=args.pairs, what=WHAT, warm_up=False, images=args.batch)
    yield _train_memory(model, random_batch(args.size, args.batch, model.roi_heads.num_classes))


def _model(config_file: str, device: str) -> Any:
    cfg = get_cfg()
    add_clipdense_config(cfg)
    merge_config_file(cfg, config_file)
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS, cfg.MODEL.CLIP.PRETRAINED = device, "", "random"
    cfg.DATASETS.TRAIN, cfg.MODEL.FVLM.TEXT_SOURCE, cfg.MODEL.ROI_HEADS.NUM_CLASSES = (), "weights", 65
    torch.manual_seed(0)
    return build_model(cfg)


def _inference(model: Any, batch: list[dict[str, Any]]) -> Callable[[], object]:
    def run() -> object:
        model.trunk.eval()
        with torch.inference_mode():
            return model(batch)

    return run


def _floor(model: Any, batch: list[dict[str, Any]]) -> Callable[[], object]:
    """The floor: the same trunk and heads, which predict boxes of regions without classes."""
    heads = model.roi_heads

    def run() -> object:
        model.trunk.train()  # training mode omits the map in the joint space
        with torch.inference_mode():
            images = model.preprocess_image(batch)
            features = model.backbone(images.tensor)
            proposals, _ = model.proposal_generator(images, features, None)
            maps = [features[name] for name in heads.box_in_features]
            x = heads.box_head(heads.box_pooler(maps, [p.proposal_boxes for p in proposals]))
            return heads.box_predictor.bbox_pred(x)

    return run


class _Given(nn.Module):
    """Returns maps that were computed before."""

    def __init__(self, maps: dict[str, Tensor]) -> None:
        super().__init__()
        self.maps = maps

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.maps


def _train_memory(model: Any, batch: list[dict[str, Any]]) -> Row:
    """Peak memory of a training step, over that of pyramid, RPN and heads on the trunk's finished maps."""
    model.train()

    def step() -> None:
        torch.manual_seed(0)  # the same regions are sampled
        model.zero_grad(set_to_none=True)
        with EventStorage():
            sum(model(batch).values()).backward()

    ours = peak_memory(step)
    with torch.no_grad():
        maps = model.trunk(model.preprocess_image(batch).tensor)
    owner, name = next(
        (m, n) for m in model.backbone.modules() for n, child in m.named_children() if child is model.trunk
    )
    trunk = model.trunk
    setattr(owner, name, _Given(maps))
    heads = peak_memory(step) + sum(x.untyped_storage().nbytes() for x in maps.values())
    setattr(owner, name, trunk)
    return Row("fvlm/train_memory", ours / 1e9, heads / 1e9, "GB", what=WHAT_MEMORY)
