"""Writing a graph as an ONNX or .pt2 file, and comparing the file with eager execution."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clipdense.files import atomic_path
from clipdense.run.export.file_metadata import METADATA_KEY
from clipdense.run.export.graph import ExportError, Graph, Inputs

__all__ = ["OPSET", "TOLERANCE", "compare_onnx", "run_eager", "trace", "write_onnx", "write_pt2"]

OPSET = 18
"""Default ONNX operator set: the one that the exporter writes natively."""
TOLERANCE = 1e-4
"""Largest difference between a file and eager execution, relative to the largest value above 1."""

_PROTOBUF_LIMIT = 1_900_000_000  # bytes; an ONNX file cannot exceed 2 GiB, weights then lie beside it
_INSTALL = "install the extra: pip install 'clipdense[export]'"


def trace(graph: Graph) -> torch.export.ExportedProgram:
    """Trace a graph by torch.export.

    Raises:
        ExportError: If torch.export cannot trace it; the message has its first line.
    """
    inputs = graph.inputs()
    dynamic = tuple(dict.fromkeys(graph.dynamic.get(name, ()), torch.export.Dim.DYNAMIC) for name in inputs)
    try:
        with torch.no_grad(), _quiet():
            return torch.export.export(
                graph.module, tuple(inputs.values()), dynamic_shapes=(*dynamic,), strict=False
            )
    except Exception as error:  # torch.export raises what the traced code meets
        reason = str(error).strip().partition("\n")[0][:300]
        raise ExportError(
            f"{graph.metadata.system} cannot be traced by torch.export ({type(error).__name__}: {reason}). "
            f"A fixed image size (--size HEIGHT WIDTH) removes conditions on the size."
        ) from error


def write_pt2(graph: Graph, path: str | Path) -> None:
    """Write a graph as a .pt2 file of torch.export, with its metadata.

    Raises:
        ExportError: See `trace`.
        WriteError: If the file cannot be written.
    """
    program = trace(graph)
    with atomic_path(path) as temporary:
        # torch.export.save warns about other suffixes
        target = temporary.with_name(temporary.name + ".pt2")
        torch.export.save(program, target, extra_files={"clipdense.json": graph.metadata.to_json()})
        target.replace(temporary)


def write_onnx(graph: Graph, path: str | Path, opset: int = OPSET) -> None:
    """Write a graph as an ONNX file, with its metadata.

    Args:
        graph: the graph.
        path: file to write; weights of more than 1.9 GB go to ``<path>.data`` beside it.
        opset: ONNX operator set, at least 18.

    Raises:
        ExportError: If the packages are missing, the opset is too old, or a part of the model has no ONNX
            operator.
        WriteError: If the file cannot be written.
    """
    if opset < 18:
        raise ExportError(
            f"opset {opset}: antialiased resizing needs operator set 18 or later; use --opset 18"
        )
    program = trace(graph)
    names = list(graph.inputs())
    try:
        with _quiet():
            exported = torch.onnx.export(
                program,
                input_names=names,
                output_names=list(graph.outputs),
                dynamo=True,
                opset_version=opset,
                verbose=False,
            )
    except ImportError as error:
        raise ExportError(f"ONNX files need the package {error.name}: {_INSTALL}") from error
    except torch.onnx.OnnxExporterError as error:
        reason = str(error.__cause__ or error).strip().partition("\n")[0][:300]
        raise ExportError(
            f"{graph.metadata.system}: a part of the model has no ONNX operator ({reason}). A .pt2 file has "
            f"no such limit: give an output that ends in .pt2"
        ) from error
    assert exported is not None
    metadata = replace(graph.metadata, opset=opset)
    exported.model.metadata_props[METADATA_KEY] = metadata.to_json()
    size = sum(p.numel() * p.element_size() for p in graph.module.state_dict().values())
    if size > _PROTOBUF_LIMIT:  # the name of the data file stands in the ONNX file
        exported.save(str(path), external_data=True)
        return
    with atomic_path(path) as temporary:
        exported.save(str(temporary), external_data=False)


def run_eager(graph: Graph, inputs: Inputs) -> list[Tensor]:
    """Run the module of a graph without export."""
    with torch.no_grad():
        results = graph.module(*inputs.values())
    return [results] if isinstance(results, Tensor) else list(results)


def compare_onnx(graph: Graph, path: str | Path, inputs: Inputs) -> float:
    """Run an ONNX file and the module of its graph on the same inputs.

    Returns:
        The largest difference, relative to the largest value of the same output where that is above 1.

    Raises:
        ExportError: If a result has another shape.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    feeds = {name: tensor.numpy() for name, tensor in inputs.items()}
    results = session.run(list(graph.outputs), feeds)
    references = [tensor.numpy() for tensor in run_eager(graph, inputs)]
    if graph.metadata.task == "boxes" and results[0].shape == references[0].shape:
        rows = _same_rows(results, references)
        results = [result[rows] for result in results]
    largest = 0.0
    for name, own, reference in zip(graph.outputs, results, references, strict=True):
        if own.shape != reference.shape:
            raise ExportError(
                f"{path}: '{name}' has shape {own.shape}, and eager execution {reference.shape}"
            )
        if reference.size:
            difference = np.abs(own.astype(np.float64) - reference.astype(np.float64)).max()
            largest = max(largest, float(difference) / max(1.0, float(np.abs(reference).max())))
    return largest


def _same_rows(results: list[Any], references: list[Any]) -> Any:
    """Return for each row of the reference the most similar detection, as equal scores have no order.

    Args:
        results: boxes (N, ...) and scores (N, ...) first.
        references: the same of eager execution.
    """
    scale = max(1.0, float(np.abs(references[0]).max()))
    own, expected = (
        np.concatenate([boxes.reshape(len(boxes), -1) / scale, scores.reshape(len(scores), -1)], axis=1)
        for boxes, scores, *_ in (results, references)
    )
    return np.stack([np.abs(own - row).max(1).argmin() for row in expected])


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the notes of the exporters, which describe their inner steps."""
    names = ("torch.fx.experimental.symbolic_shapes", "torch.export", "onnxscript", "onnx_ir", "torch.onnx")
    loggers: list[Any] = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
