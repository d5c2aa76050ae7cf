#!/usr/bin/env python
"""Classify the segments of a dataset from image crops and from pooled dense features; print both accuracies.

    tools/evaluate_regions.py --model shapes-rn shapes-vit shapes-eva --modes all
    tools/evaluate_regions.py --model shapes-rn shapes-vit --image-size 128 192 256 --curve output/sizes.png
    tools/evaluate_regions.py --model EVA02-B-16 --pretrained merged2b_s8b_b131k --image-size 1024
        --dataset coco_2017_val_panoptic_with_sem_seg --templates vild_63 --antialias both

The protocol is CLIPSelf's (`clipdense.evaluation.dense_regions`): boxes ("rois") and masks ("maskpool") on
the dense map of the letterboxed image; image embeddings of crops ("crops") are the upper bound.
"""

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ANTIALIAS = {"off": [False], "on": [True], "both": [False, True]}


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", nargs="+", default=["shapes-rn"], help="model names or weight files, as for load_clip"
    )
    parser.add_argument("--pretrained", help="open_clip tag, hub id or weight file (for a single --model)")
    parser.add_argument("--allow-pickle", action="store_true", help="allow weight files that are pickles")
    parser.add_argument(
        "--dataset",
        default="shapes_ov_panoptic_val",
        help="registered panoptic dataset (default: %(default)s)",
    )
    parser.add_argument(
        "--modes",
        nargs="+",
        help="dense modes, or 'all' (default: clipself, value or plain, the first that the tower has)",
    )
    parser.add_argument(
        "--image-size",
        nargs="+",
        type=int,
        default=[0],
        metavar="SIZE",
        help="sides in pixels of letterboxed images, multiples of the stride (default: the image's own)",
    )
    parser.add_argument(
        "--window",
        type=int,
        default=0,
        metavar="SIZE",
        help="side in pixels of windows for dense maps, e.g. the native size (default: whole images)",
    )
    parser.add_argument(
        "--antialias",
        choices=list(ANTIALIAS),
        default="off",
        help="antialiasing when masks are resized (default: off)",
    )
    parser.add_argument("--templates", default="single", help="prompt template set (default: %(default)s)")
    parser.add_argument(
        "--table", default="", help="file with the class embeddings (tools/make_text_table.py)"
    )
    parser.add_argument("--images", type=int, help="number of images, the first ones (default: all)")
    parser.add_argument("--json", type=Path, help="JSON file to write with all metrics")
    parser.add_argument("--curve", type=Path, help="PNG to write: macc1 of things over the image sizes")
    parser.add_argument("--device", default="cuda", help="cuda (default if there is a GPU), cpu, ...")
    arguments = parser.parse_args(argv)
    if arguments.pretrained and len(arguments.model) > 1:
        parser.error("--pretrained needs a single --model")
    if arguments.curve and 0 in arguments.image_size:
        parser.error("--curve needs --image-size with values above 0")
    return arguments


if __name__ == "__main__":
    parse_arguments()  # --help and wrong options end here, before the imports that take seconds

import torch
from tabulate import tabulate
from tqdm import tqdm

import clipdense  # noqa: F401
from clipdense.clip import ClipModel, load_clip
from clipdense.clip.attention import get_mode
from clipdense.data.checks import check_named_datasets
from clipdense.data.mappers import original_sample
from clipdense.evaluation import CLIPProbe, DenseRegionEvaluator, DenseView
from clipdense.evaluation.probes import best_dense_mode
from clipdense.files import atomic_path, json_text, write_text
from clipdense.run.boundary import tool_errors
from clipdense.run.setup import available_device

from detectron2.data import DatasetCatalog

Row = dict[str, Any]


def dense_views(clip: ClipModel, arguments: argparse.Namespace) -> list[DenseView]:
    modes = arguments.modes or [best_dense_mode(clip.visual)]
    if modes == ["all"]:  # methods share modes: keep one name of each
        unguided = [mode for mode in clip.visual.dense_modes if not get_mode(mode).guidance]
        names = {get_mode(mode): mode for mode in reversed(unguided)}
        modes = list(names.values())[::-1]
    return [
        DenseView(mode, size, antialias)
        for mode in modes
        for size in arguments.image_size
        for antialias in ANTIALIAS[arguments.antialias]
    ]


def evaluate(name: str, records: Iterable[dict[str, Any]], arguments: argparse.Namespace) -> list[Row]:
    """Compute the metrics of one model, one row for each view."""
    clip = load_clip(name, arguments.pretrained, allow_pickle=arguments.allow_pickle)
    clip.to(available_device(arguments.device))
    evaluator = DenseRegionEvaluator(
        arguments.dataset,
        CLIPProbe(clip, window=arguments.window),
        views=dense_views(clip, arguments),
        templates=arguments.templates,
        table=arguments.table,
        distributed=False,
    )
    evaluator.reset()
    with torch.inference_mode():
        for record in tqdm(records, name, unit="image"):
            evaluator.process([original_sample(record)], [{}])
    results = evaluator.evaluate()
    assert results is not None
    return [
        {"model": name, "mode": v.mode, "image_size": v.image_size, "antialias": v.antialias, **metrics}
        for v, metrics in zip(evaluator.views, results.values(), strict=bool(results))
    ]


def region_table(rows: Sequence[Row], kind: str) -> str:
    """Format the accuracies of things or stuff: a line for each model and source; crops once for a model."""
    lines: dict[tuple[str, ...], Row] = {}
    for row in rows:
        size = row["image_size"] or "native"
        view = f"{row['mode']} {size}{' antialias' if row['antialias'] else ''}"
        for source, label in (("crops", ""), ("rois", f"{row['mode']} {size}"), ("maskpool", view)):
            prefix = f"{source}.{kind}."
            figures = {k.removeprefix(prefix): v for k, v in row.items() if k.startswith(prefix)}
            if figures:
                lines[row["model"], source, label] = {
                    "model": row["model"],
                    "from": f"{source} {label}".strip(),
                } | figures
    return str(tabulate(list(lines.values()), headers="keys", tablefmt="github", floatfmt=".1f"))


def pixel_table(rows: Sequence[Row]) -> str:
    """Format the accuracy over pixels, which does not depend on masks or antialiasing."""
    shown = {(r["model"], r["mode"], r["image_size"]): r for r in rows}
    cells = [
        [*view[:2], view[2] or "native", r.get("pixels.thing"), r["pixels.all"]] for view, r in shown.items()
    ]
    return str(tabulate(cells, ["model", "mode", "image_size", "things", "all"], "github", floatfmt=".1f"))


def retrieval_table(rows: Sequence[Row]) -> str:
    """Format the retrieval between boxes and crops, which does not depend on masks or antialiasing."""
    shown = {(r["model"], r["mode"], r["image_size"]): r for r in rows}
    keys = ["model", "mode", "image_size", *(k for k in rows[0] if "_R@" in k)]
    cells = [[r[k] or "native" if k == "image_size" else r[k] for k in keys] for r in shown.values()]
    return str(tabulate(cells, keys, "github", floatfmt=".1f"))


def draw_curve(rows: Sequence[Row], path: Path) -> None:
    """Draw macc1 of things over the image size: boxes as lines; crops, which do not depend on it, dashed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from clipdense.visualization.curves import class_color

    figure = Figure(figsize=(7.5, 4.2), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    ax = figure.subplots()
    models = list(dict.fromkeys(row["model"] for row in rows))
    lines: dict[tuple[str, str], dict[int, float]] = {}
    for row in rows:
        lines.setdefault((row["model"], row["mode"]), {})[row["image_size"]] = row["rois.thing.macc1"]
    for i, ((model, mode), points) in enumerate(lines.items()):
        x, y = zip(*sorted(points.items()), strict=True)
        color, label = class_color(models.index(model)), f"{model}, dense ({mode})"
        ax.plot(x, y, marker="os^Dv"[i % 5], color=color, label=label)
    for row in {row["model"]: row for row in rows}.values():
        color = class_color(models.index(row["model"]))
        ax.axhline(row["crops.thing.macc1"], color=color, ls="--", lw=1.2, label=f"{row['model']}, crops")
    ax.set(xlabel="image size (px)", ylabel="macc1 of things (%)", ylim=(0, None))
    ax.set_xticks(sorted({row["image_size"] for row in rows}))
    ax.grid(color="0.9")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    with atomic_path(path) as part:
        figure.savefig(part, format="png")


def write_json(content: Sequence[Mapping[str, Any]], path: Path) -> None:
    write_text(path, json_text(content, indent=1))


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    rows: list[Row] = []
    check_named_datasets([arguments.dataset])
    records = DatasetCatalog.get(arguments.dataset)[: arguments.images]
    for name in arguments.model:
        rows += evaluate(name, records, arguments)
        if arguments.json:  # after every model: a later one may fail
            write_json(rows, arguments.json)
    if not rows:
        raise ValueError(f"{arguments.dataset}: no segment has a box of 8 x 8 to 1024 x 1024 pixels")
    for kind in ("thing", "stuff"):
        number = int(rows[0][f"{kind}.n"])
        print(f"\n{number} {kind} regions of {arguments.dataset}, accuracy in percent")
        print(region_table(rows, kind))
    print("\npixels that the dense map classifies correctly, in percent")
    print(pixel_table(rows))
    print("\nretrieval between boxes and crops, recall in percent")
    print(retrieval_table(rows))
    if arguments.curve:
        draw_curve(rows, arguments.curve)
    return 0


if __name__ == "__main__":
    with tool_errors("interrupted; models that are done stay in the --json file"):
        sys.exit(main())
