"""Speed and size of exported ONNX files beside eager torch, on the CPU."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import MIN_PAIRS, Row, wall
from clipdense.clip import load_clip
from clipdense.engine.build import build_model
from clipdense.run.export.families import model_graph
from clipdense.run.export.graph import Graph
from clipdense.run.export.names import tower_graph
from clipdense.run.export.write import compare_onnx, run_eager, write_onnx
from clipdense.run.setup import load_config

__all__ = ["REDUCED", "add_arguments", "rows"]

REDUCED: tuple[str, ...] = ("--models", "shapes-rn", "shapes-vit", "--size", "64", "96")
"""Options of this suite in a reduced run of all suites."""

_MODELS: dict[str, tuple[str, list[str]]] = {
    "zero_shot_sclip": ("shapes/zero_shot_sclip_vit.yaml", []),
    "score_map_rn": ("shapes/denseclip_score_map_rn.yaml", []),
    "catseg_vit": ("shapes/catseg_vit.yaml", ["MODEL.CAT_SEG.TEST.WINDOWS.ENABLED", "False"]),
    "fcclip_rn": ("shapes/fcclip_rn.yaml", []),
    "ovseg": ("shapes/ovseg.yaml", []),
    "mask_rcnn_rn": ("shapes/mask_rcnn_clip_rn.yaml", []),
    "fvlm_vit": ("shapes/fvlm_vit.yaml", []),
}
_TOWERS = ("shapes-rn", "shapes-vit", "shapes-eva")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this suite."""
    parser.add_argument("--size", type=int, nargs=2, default=(256, 320), help="height and width in pixels")
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--models", nargs="+", default=[*_TOWERS, *_MODELS], help="nano CLIPs and models")
    parser.add_argument("--pairs", type=int, default=MIN_PAIRS, help="interleaved pairs of timed runs")


def rows(args: argparse.Namespace) -> Iterator[Row]:
    """Export each model, and time onnxruntime beside eager torch with as many threads."""
    with tempfile.TemporaryDirectory() as folder:
        for name in args.models:
            graph, path = _graph(name), Path(folder, "model.onnx")
            write_onnx(graph, path)
            height, width = args.size
            inputs = graph.example(height, width, graph.metadata.num_classes or args.classes)
            values = {
                "megabytes": path.stat().st_size / 2**20,
                "difference": compare_onnx(graph, path, inputs),
            }
            notes = f"file {values['megabytes']:.1f} MB, largest difference {values['difference']:.1e}"
            yield wall(
                f"export/{name}",
                _session(path, {key: value.numpy() for key, value in inputs.items()}),
                partial(run_eager, graph, inputs),
                pairs=args.pairs,
                kind="speedup",
                what="onnxruntime | torch eager",
                notes=notes,
                values=values,
            )


def _graph(name: str) -> Graph:
    if name not in _MODELS:
        return tower_graph(load_clip(name, text=False), "value")
    config, overrides = _MODELS[name]
    torch.manual_seed(0)
    return model_graph(build_model(load_config(config, overrides)).eval())


def _session(path: Path, feeds: dict[str, Any]) -> Callable[[], object]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, feeds)
