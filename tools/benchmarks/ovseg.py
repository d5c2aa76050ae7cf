"""Cost of OVSeg beyond its proposals and CLIP forwards, savings of its options, memory of large
vocabularies."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from torch import Tensor, nn

from benchmarks import MIN_PAIRS, Row, flops, peak_memory, wall
from clipdense import add_clipdense_config
from clipdense.clip.vocabulary import Vocabulary
from clipdense.inference import semantic_labels
from clipdense.maskformer.prediction import MaskPrediction
from clipdense.regions import cosine_logits, crop_masks
from clipdense.run.config_file import merge_config_file

from detectron2.config import get_cfg
from detectron2.modeling import build_model

__all__ = ["FULL", "REDUCED", "add_arguments", "crop_loop", "random_masks", "rows"]

FULL: tuple[str, ...] = (
    "--config-file",
    "projects/OVSeg/configs/ovseg_swinb_vitl14.yaml",
    "--rows",
    "crop_stage",
    "k847",
)
FULL += ("end_to_end", "bf16", "fp16", "compiled")
REDUCED: tuple[str, ...] = (
    "--config-file",
    "configs/shapes/ovseg.yaml",
    "--size",
    "128",
    "160",
    "--masks",
    "8",
)
REDUCED += ("--rows", "crop_stage", "k847", "end_to_end", "bf16", "pruned")
"""Options of this suite in a full and in a reduced run of all suites."""

CLASSES = 847
CROP_SIZE = 224
THRESHOLD = 0.4
FORWARD_CLASSES = 150
PIXELS: dict[str, Any] = {"pixel_mean": OPENAI_DATASET_MEAN, "pixel_std": OPENAI_DATASET_STD}

OPTIONS = ("bf16", "fp16", "pruned", "compiled")
ROWS = ("crop_stage", "k847", "end_to_end", *OPTIONS)
WHAT = "OVSeg | its proposals, and CLIP on finished crops"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this suite."""
    parser.add_argument("--size", type=int, nargs=2, default=(640, 853), help="height and width in pixels")
    parser.add_argument("--masks", type=int, default=100, help="random masks")
    parser.add_argument("--batch", type=int, default=64, help="crops per batch")
    parser.add_argument("--pairs", type=int, default=MIN_PAIRS, help="interleaved pairs of timed runs")
    parser.add_argument(
        "--rows",
        nargs="+",
        choices=ROWS,
        default=("crop_stage", "k847", "end_to_end", "bf16", "pruned"),
        help=f"rows to measure; {', '.join(OPTIONS)} compare OVSeg with and without an option",
    )
    parser.add_argument("--flops-only", action="store_true", help="skip the wall-clock row of end_to_end")
    parser.add_argument(
        "--config-file",
        default="projects/OVSeg/configs/ovseg_r101c_vitb16.yaml",
        help="config of an OVSeg for end_to_end and the options (weights are random, no data is read)",
    )


def rows(args: argparse.Namespace) -> Iterator[Row]:
    """Measure wall time of crops, memory of labels of 847 classes, cost of a whole forward, and options."""
    device = args.device
    height, width = args.size
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8, device=device)
    masks = random_masks(args.masks, height, width).to(device)
    if "crop_stage" in args.rows:
        yield _crop_stage(args, image, masks)
    if "k847" in args.rows:
        scores = torch.rand(args.masks, CLASSES, device=device).softmax(-1)
        peak = peak_memory(lambda: semantic_labels(scores, masks, (height, width)))
        whole = 4 * CLASSES * masks[0].numel()
        what = f"labels of {CLASSES} classes | their maps"
        yield Row("ovseg/k847_extra_gb", peak / 1e9, whole / 1e9, "GB", what=what)
    options = [option for option in OPTIONS if option in args.rows]
    if "end_to_end" in args.rows or options:
        model = _model(args, device)
        batch = [{"image": image, "height": height, "width": width}]
        if "end_to_end" in args.rows:
            yield from _end_to_end(args, model, batch)
        for option in options:
            yield _option(option, args, model, batch)


def random_masks(count: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Draw soft ellipses (N, H, W) in 0 .. 1, at random places, from a twentieth of the image's sides to
    all."""
    return _ellipses(count, height, width, seed).sigmoid()


def _ellipses(count: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Draw the logits of `random_masks`."""
    generator = torch.Generator().manual_seed(seed)
    side = torch.tensor([height, width])
    centres = torch.rand(count, 2, generator=generator) * side
    radii = torch.empty(count, 2).uniform_(0.025, 0.5, generator=generator) * side
    logits = torch.empty(count, height, width)
    for logit, (y, x), (down, across) in zip(logits, centres.tolist(), radii.tolist(), strict=True):
        rows = ((torch.arange(height) - y) / down).square()
        columns = ((torch.arange(width) - x) / across).square()
        logit.copy_(4 * (1 - rows[:, None] - columns))
    return logits


def crop_loop(
    image: Tensor, masks: Tensor, *, threshold: float, size: int, **pixels: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Crop mask by mask, as the published code of OVSeg does: the baseline of `crop_stage`, and the reference
    that tests compare `crop_masks` with.

    Args:
        image: (3, h, w) in 0 .. 255.
        masks: (Q, h, w) probabilities.
        threshold: A pixel is inside if its probability is greater.
        size: Side of the crops.
        pixels: ``pixel_mean`` and ``pixel_std`` of images in 0 .. 1.

    Returns:
        Valid (Q,) bool, crops (N, 3, size, size), and their masks (N, 1, size, size).
    """
    mean, std = (255 * torch.tensor(pixels[k], device=image.device).view(3, 1, 1) for k in PIXELS)
    valid, regions, region_masks = [], [], []
    for probability in masks:
        inside = (probability > threshold).float()
        valid.append(bool(inside.any()))
        if not valid[-1]:
            continue
        ys, xs = torch.where(inside.any(1))[0], torch.where(inside.any(0))[0]
        rows, columns = slice(int(ys.min()), int(ys.max()) + 1), slice(int(xs.min()), int(xs.max()) + 1)
        crop, mask = image[:, rows, columns].float(), inside[rows, columns]
        region = (crop * mask + (1 - mask) * mean - mean) / std
        regions.append(F.interpolate(region[None], (size, size), mode="bicubic", align_corners=False)[0])
        region_masks.append(F.interpolate(mask[None, None], (size, size), mode="nearest")[0])
    empty = image.new_zeros(0, 3, size, size, dtype=torch.float32)
    if not regions:
        return torch.tensor(valid), empty, empty[:, :1]
    return torch.tensor(valid), torch.stack(regions), torch.stack(region_masks)


def _crop_stage(args: argparse.Namespace, image: Tensor, masks: Tensor) -> Row:
    def ours() -> None:
        crops = crop_masks(image, masks, "ovseg", size=CROP_SIZE, **PIXELS)
        for part in crops.parts(args.batch):
            crops.regions(part), crops.region_masks(part)

    return wall(
        "ovseg/crop_stage",
        ours,
        lambda: crop_loop(image, masks, threshold=THRESHOLD, size=CROP_SIZE, **PIXELS),
        pairs=args.pairs,
        kind="speedup",
        what=f"{args.masks} masks at once | one by one",
    )


class FixedMasks(nn.Module):
    """Head that runs another head and replaces its masks by fixed ones.

    With random weights the number of crops, and so CLIP's work, would be random.
    """

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head
        self.masks: Tensor | None = None

    def forward(self, features: dict[str, Tensor]) -> MaskPrediction:
        prediction: MaskPrediction = self.head(features)
        if self.masks is None:
            self.masks = _ellipses(*prediction.mask_logits.shape[1:]).to(prediction.mask_logits)[None]
        return replace(prediction, mask_logits=self.masks)


def _model(args: argparse.Namespace, device: str) -> Any:
    cfg = get_cfg()
    add_clipdense_config(cfg)
    merge_config_file(cfg, args.config_file)
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = device, ""
    cfg.MODEL.CLIP.PRETRAINED = cfg.MODEL.TIMM.PRETRAINED = "random"
    cfg.MODEL.TWO_STAGE.CROP_CLIP.PRETRAINED = "random"
    cfg.MODEL.MASK_FORMER.NUM_OBJECT_QUERIES = args.masks
    cfg.MODEL.MASK_FORMER.TEST.PANOPTIC_ON = cfg.MODEL.MASK_FORMER.TEST.INSTANCE_ON = False
    cfg.DATASETS.TRAIN = ()
    torch.manual_seed(0)
    model: Any = build_model(cfg).eval().requires_grad_(False)  # the counter of FLOPs follows gradients
    model.head = FixedMasks(model.head)
    # random text embeddings, so that no text tower has to run
    generator = torch.Generator().manual_seed(0)
    text = F.normalize(torch.randn(FORWARD_CLASSES, model.encoder.clip.embed_dim, generator=generator))
    vocabulary = Vocabulary.from_names([f"class {i}" for i in range(FORWARD_CLASSES)])
    model.set_vocabulary(vocabulary, {"queries": text.to(device), "crops": text.to(device)})
    return model


def _forward(model: Any, batch: list[dict[str, Any]]) -> Any:
    with torch.inference_mode():
        return model(batch)[0]


def _end_to_end(args: argparse.Namespace, model: Any, batch: list[dict[str, Any]]) -> Iterator[Row]:
    def ours() -> object:
        return _forward(model, batch)

    ours()  # draws the masks
    encoder, size = model.encoder, (args.size[0], args.size[1])
    with torch.inference_mode():
        images = model.preprocess_image(batch)
        masks = F.interpolate(model.head.masks, images.tensor.shape[-2:], mode="bilinear")[0]
        masks = masks[:, : size[0], : size[1]].sigmoid()
        crops = crop_masks(batch[0]["image"], masks, encoder.rule, size=encoder.clip.image_size[0], **PIXELS)
        assert len(crops) == args.masks, f"{len(crops)} different masks, not {args.masks}"
        regions = [crops.regions(part) for part in crops.parts(encoder.batch_size)]

    def floor() -> None:
        with torch.inference_mode():
            model.head(model.backbone(model.preprocess_image(batch).tensor))
            for part in regions:
                encoder.clip.encode_image(part)

    yield Row("ovseg/end_to_end_flops", flops(ours) / 1e9, flops(floor) / 1e9, "GFLOP", what=WHAT)
    if not args.flops_only:
        yield wall("ovseg/end_to_end", ours, floor, pairs=args.pairs, what=WHAT, warm_up=False, images=1)


def _option(option: str, args: argparse.Namespace, model: Any, batch: list[dict[str, Any]]) -> Row:
    """Time a forward with and without an option, and measure its change of CLIP's logits and of labels."""
    text = model.text_embeddings()["crops"]
    results: dict[str, Tensor] = {}

    embed = model.encoder.embed_images

    def record(*inputs: Any) -> list[tuple[Tensor, Tensor]]:
        output: list[tuple[Tensor, Tensor]] = embed(*inputs)
        embeddings, valid = output[0]
        logits = text.new_full((len(valid), len(text)), torch.nan)
        results["logits"] = logits.index_put((valid,), cosine_logits(embeddings, text))
        return output

    def run() -> dict[str, Tensor]:
        results["labels"] = _forward(model, batch)["sem_seg"].argmax(0)
        return dict(results)

    owner, attribute, value = _setting(option, model, batch)

    def ours() -> None:
        before = getattr(owner, attribute)
        setattr(owner, attribute, value)
        found.update(run())
        setattr(owner, attribute, before)

    def other() -> None:
        exact.update(run())

    found: dict[str, Tensor] = {}
    exact: dict[str, Tensor] = {}
    model.encoder.embed_images = record
    ours()  # compiles and draws the masks
    name, what = f"ovseg/{option}", f"OVSeg, {option} | without"
    row = wall(name, ours, other, pairs=args.pairs, kind="speedup", what=what, warm_up=False, images=1)
    model.encoder.embed_images = embed
    change = (found["logits"] - exact["logits"]).abs()
    seen = ~change.isnan().any(1)
    row.values = {
        "logits_max_change": change[seen].max().item(),
        "logits_mean_change": change[seen].mean().item(),
        "labels_changed": (found["labels"] != exact["labels"]).float().mean().item(),
        "crops": int(seen.sum()),
    }
    row.notes = (
        f"CLIP embeds {row.values['crops']} of {len(seen)} masks; its logits change by "
        f"{row.values['logits_max_change']:.3g} at most, {row.values['logits_mean_change']:.3g} on average; "
        f"{row.values['labels_changed']:.2%} of pixels change their label. {row.notes}"
    ).strip()
    return row


def _setting(option: str, model: Any, batch: list[dict[str, Any]]) -> tuple[object, str, Any]:
    """Return the object, the attribute and the value that turn an option on."""
    encoder = model.encoder
    if option == "compiled":
        return encoder, "_encode", torch.compile(encoder.encode, dynamic=True)
    if option != "pruned":
        return encoder, "precision", option
    with torch.inference_mode():  # half of the queries
        queries = model.head(model.backbone(model.preprocess_image(batch).tensor)).require_query_embeddings()
        scores = model.classifier(queries[0], model.text_embeddings()["queries"]).softmax(-1)
    min_query_score = scores[:, :-1].amax(-1).quantile(0.5).item()
    return model, "scoring", replace(model.scoring, min_query_score=min_query_score)
