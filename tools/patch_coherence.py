#!/usr/bin/env python
"""Measure the semantic coherence of patch features, and draw the ROC curves of several models.

    tools/patch_coherence.py curves.png --model shapes-vit shapes-eva shapes-rn
    tools/patch_coherence.py curves.png --model ViT-B-16:openai timm:vit_base_patch16_224.dino \\
        --dataset pascalvoc21_sem_seg_val
    tools/patch_coherence.py curves.png --model shapes-vit --embedder export.safetensors
    tools/patch_coherence.py curves.png --model shapes-vit shapes-eva --attention

The cosine of two labelled patches should tell whether they have one class (PACL, Mukhoti et al., CVPR 2023,
section 3). A table of the areas below the curves, in percent, is printed. With --attention, a second table
has the share of each attention of the last block (q k, q q, ...) that falls on patches of the same class.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

TIMM = "timm:"


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path, help="PNG to write")
    parser.add_argument(
        "--model",
        nargs="+",
        required=True,
        help="CLIPs, as NAME, NAME:PRETRAINED or a weight file; or timm:NAME for a ViT of timm",
    )
    parser.add_argument("--pretrained", default="", help="weights of timm models (default: their own)")
    parser.add_argument(
        "--embedder", type=Path, help="patch embedder of PACL, measured on the first model as well"
    )
    parser.add_argument(
        "--attention",
        action="store_true",
        help="measure the attentions of the CLIPs' last blocks, which training-free methods choose among",
    )
    parser.add_argument("--allow-pickle", action="store_true", help="allow weight files that are pickles")
    parser.add_argument(
        "--dataset",
        default="shapes_closed_sem_seg_mini_val",
        help="registered semantic dataset (default: %(default)s)",
    )
    parser.add_argument("--images", type=int, default=0, help="the first images alone (default: all)")
    parser.add_argument("--patches", type=int, default=3000, help="patches compared (default: %(default)s)")
    parser.add_argument("--mode", default="plain", help="last-block mode of the CLIPs (default: %(default)s)")
    parser.add_argument(
        "--window",
        type=int,
        default=0,
        help="side in pixels of windows that are encoded on their own (default: whole images)",
    )
    parser.add_argument("--device", default="cuda", help="cuda (default if there is a GPU), cpu, ...")
    arguments = parser.parse_args(argv)
    if arguments.attention and (timm := [name for name in arguments.model if name.startswith(TIMM)]):
        parser.error(f"--attention needs CLIPs with a ViT, not {timm[0]}")
    if arguments.images < 0 or arguments.patches < 2 or arguments.window < 0:
        parser.error("--images and --window must be at least 0, --patches at least 2")
    return arguments


if __name__ == "__main__":
    parse_arguments()  # --help and wrong options end here, before the imports that take seconds

import torch
from tabulate import tabulate
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from tqdm import tqdm

import clipdense  # noqa: F401
from clipdense.clip import ClipModel, TowerRequest, load_clip
from clipdense.clip.patch_embedder import load_patch_embedder
from clipdense.clip.pixels import normalize_pixels
from clipdense.data.checks import check_named_datasets
from clipdense.evaluation.attention import AttentionEvaluator
from clipdense.evaluation.patches import CoherenceEvaluator
from clipdense.evaluation.probes import MapProbe, PatchProbe
from clipdense.run.boundary import tool_errors
from clipdense.run.setup import available_device
from clipdense.systems.training_free import FeatureModel
from clipdense.visualization.roc import draw_roc

from detectron2.data import DatasetCatalog


def load_model(name: str, arguments: argparse.Namespace) -> ClipModel:
    """Load the image tower of a CLIP, named as on the command line."""
    model, _, tag = (name, "", "") if Path(name).exists() else name.partition(":")
    clip = load_clip(model, tag or None, allow_pickle=arguments.allow_pickle, text=False)
    return clip.to(available_device(arguments.device))


def clip_probe(clip: ClipModel, mode: str, window: int, embedder: Path | None = None) -> PatchProbe:
    """Return the patches of a CLIP after its final norm, before the projection; or those of an embedder."""
    tower = clip.visual
    network = None if embedder is None else load_patch_embedder(embedder).to(clip.logit_scale.device)
    request = TowerRequest(pre=True, dense=mode if network is None else network.mode)

    def encode(images: Tensor) -> Tensor:
        features: Tensor = tower(images, request).pre
        return features if network is None else network(features)

    return MapProbe(encode, clip.normalize, tower.stride, window=window)


def timm_probe(name: str, arguments: argparse.Namespace) -> PatchProbe:
    """Return the patches of a ViT of timm after its final norm."""
    device = available_device(arguments.device)
    model = FeatureModel.create(name, arguments.pretrained).to(device)
    mean, std = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    return MapProbe(
        lambda images: model(images, (mean, std)),
        lambda images: normalize_pixels(images.to(device), mean, std),
        model.patch_size,
        window=arguments.window,
    )


def build_probes(arguments: argparse.Namespace) -> Iterator[tuple[str, PatchProbe]]:
    """Build the probes one after the other, by the names of their curves."""
    embedder = arguments.embedder
    for name in arguments.model:
        if name.startswith(TIMM):
            yield name, timm_probe(name.removeprefix(TIMM), arguments)
            continue
        clip = load_model(name, arguments)
        yield name, clip_probe(clip, arguments.mode, arguments.window)
        if embedder is not None:
            yield f"{name} with {embedder.name}", clip_probe(clip, "", arguments.window, embedder)
            embedder = None


@torch.inference_mode()
def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    check_named_datasets([arguments.dataset])
    samples = DatasetCatalog.get(arguments.dataset)[: arguments.images or None]
    curves, rows = {}, []
    for name, probe in build_probes(arguments):
        evaluator = CoherenceEvaluator(arguments.dataset, probe, patches=arguments.patches)
        records = [evaluator.process_image(sample, {}) for sample in tqdm(samples, name, unit="image")]
        areas, curve = evaluator.measure(records)
        rows.append([name, areas["AUC"], areas["AUC_image"], int(areas["patches"])])
        curves[f"{name}: {areas['AUC']:.1f}"] = curve
    draw_roc(curves, arguments.output)
    print(tabulate(rows, ["model", "AUC", "AUC, one image", "patches"], "pipe", floatfmt=".1f"))
    print(arguments.output)
    if arguments.attention:
        shares = {name: attention_shares(name, samples, arguments) for name in arguments.model}
        print("\nShare of the attention that falls on patches of the same class, %:")
        print(
            tabulate([{"model": name, **row} for name, row in shares.items()], "keys", "pipe", floatfmt=".1f")
        )
    return 0


def attention_shares(
    name: str, samples: Sequence[dict[str, Any]], arguments: argparse.Namespace
) -> dict[str, float]:
    """Measure a CLIP with `AttentionEvaluator`."""
    evaluator = AttentionEvaluator(arguments.dataset, load_model(name, arguments), window=arguments.window)
    records = [
        evaluator.process_image(sample, {}) for sample in tqdm(samples, f"{name}, attention", unit="image")
    ]
    shares: dict[str, float] = evaluator.score(records)["attention"]
    return shares


if __name__ == "__main__":
    with tool_errors():
        sys.exit(main())
