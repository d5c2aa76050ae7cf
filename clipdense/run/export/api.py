"""Export of a trained model, or of a CLIP's tower, to an ONNX or .pt2 file, for ``clipdense export``."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import clipdense
from clipdense.clip import load_clip
from clipdense.clip.text import TextBank
from clipdense.clip.vocabulary import Vocabulary
from clipdense.run.export.families import model_graph
from clipdense.run.export.graph import ExportError, Graph
from clipdense.run.export.names import tower_graph
from clipdense.run.export.text_output import save_text_input, synonym_table, text_inputs
from clipdense.run.export.write import OPSET, TOLERANCE, compare_onnx, write_onnx, write_pt2
from clipdense.run.predictor import Predictor, VocabularyLike

__all__ = ["ExportReport", "export_model", "export_tower"]


@dataclass(frozen=True)
class ExportReport:
    """What was written.

    Attributes:
        path: the exported file.
        size: its bytes, with the file of weights beside it if there is one.
        graph: what was exported.
        difference: largest relative difference between the file and eager execution, of sizes and numbers of
            classes that it was not traced with; None if it was not compared.
        text_output: file of text inputs, if one was written.
    """

    path: Path
    size: int
    graph: Graph
    difference: float | None
    text_output: Path | None = None

    def lines(self) -> list[str]:
        """Describe the file for people."""
        m = self.graph.metadata
        lines = [f"wrote {self.path}: {m.system}, {self.size / 2**20:.1f} MB, task {m.task}"]
        lines += [f"  input {name} {shape}" for name, shape in self.graph.shapes().items()]
        lines.append(f"  outputs {', '.join(self.graph.outputs)}")
        if self.difference is not None:
            lines.append(f"  largest difference from eager execution {self.difference:.1e}")
        if self.text_output is not None:
            lines.append(f"wrote {self.text_output}: the class names as its text inputs")
        return lines


def export_model(
    config: Any,
    output: str | Path,
    *,
    weights: str | os.PathLike[str] | None = None,
    opts: Iterable[object] = (),
    vocabulary: VocabularyLike | None = None,
    fixed_size: tuple[int, int] | None = None,
    select: bool = True,
    opset: int = OPSET,
    text_output: str | Path | None = None,
    check: bool = True,
) -> ExportReport:
    """Export a trained model.

    Args:
        config: config file or object, see `Predictor`.
        output: file to write: .onnx, or .pt2 for torch.export.
        weights: weight file; default ``MODEL.WEIGHTS``.
        opts: overrides of the config.
        vocabulary: classes of ``text_output``; default: those of the test dataset.
        fixed_size: height and width of the images in pixels; None: any.
        select: detectors: whether the file selects detections.
        opset: ONNX operator set.
        text_output: .safetensors file to write the classes to, as the text inputs of the file.
        check: compare the ONNX file with eager execution.

    Returns:
        What was written.

    Raises:
        ExportError: If the model does not export, or the file differs from eager execution by more than
            `TOLERANCE`. See also `Predictor`.
    """
    _check_output(output)
    predictor = Predictor(config, weights, opts, device="cpu", vocabulary=vocabulary)
    model, cfg = predictor.model, predictor.cfg
    names = tuple(predictor.metadata.get("stuff_classes") or predictor.metadata.get("thing_classes") or ())
    channels = str(cfg.INPUT.FORMAT) if hasattr(cfg, "INPUT") else "RGB"
    graph = model_graph(model, fixed_size=fixed_size, select=select, classes=names, channels=channels)
    graph = _with_sizes(graph, cfg)
    if text_output is not None and graph.metadata.text == "none":
        raise ExportError(
            f"the classes of a {graph.metadata.system} are constants of its weights: leave out --text-output"
        )
    report = _write(graph, output, opset, check)
    if text_output is None:
        return report
    known = getattr(model, "vocabulary", None) or Vocabulary.from_names(
        graph.metadata.classes or names, separator=None
    )
    save_text_input(text_output, text_inputs(model), graph.metadata, known)
    return replace(report, text_output=Path(text_output))


def export_tower(
    name: str,
    output: str | Path,
    *,
    pretrained: str | None = None,
    mode: str = "plain",
    vocabulary: VocabularyLike | None = None,
    templates: str | Sequence[str] = "single",
    fixed_size: tuple[int, int] | None = None,
    opset: int = OPSET,
    text_output: str | Path | None = None,
    check: bool = True,
) -> ExportReport:
    """Export the dense map of a CLIP's image tower.

    Args:
        name: model name or weight file, see `load_clip`.
        output: see `export_model`.
        pretrained: see `load_clip`.
        mode: last-block mode of the dense map.
        vocabulary: classes of ``text_output``.
        templates: prompt templates of ``text_output``.
        fixed_size, opset, check: see `export_model`.
        text_output: see `export_model`; needs a vocabulary.

    Returns:
        What was written.

    Raises:
        ExportError: See `export_model`. See also `load_clip`.
    """
    _check_output(output)
    if (text_output is None) != (vocabulary is None):
        raise ExportError("--vocabulary and --text-output belong together: the classes, and their file")
    clip = load_clip(name, pretrained, text=text_output is not None)
    kind = templates if isinstance(templates, str) else ""
    graph = tower_graph(clip, mode, fixed_size=fixed_size, templates=kind)
    graph = replace(graph, metadata=replace(graph.metadata, clipdense=clipdense.__version__))
    report = _write(graph, output, opset, check)
    if text_output is None or vocabulary is None:
        return report
    words = Vocabulary.parse(vocabulary)
    rows, classes = TextBank(clip, templates).per_synonym(words)
    inputs = {"text": rows.cpu(), "synonyms": synonym_table(classes.cpu())}
    save_text_input(text_output, inputs, graph.metadata, words)
    return replace(report, text_output=Path(text_output))


def _check_output(output: str | Path) -> None:
    if Path(output).suffix not in (".onnx", ".pt2"):
        raise ExportError(f"'{output}': the output is an .onnx file, or a .pt2 file of torch.export")


def _with_sizes(graph: Graph, cfg: Any) -> Graph:
    """Add the version, and the sizes that images are resized to in evaluation."""
    inputs = getattr(cfg, "INPUT", None)
    shortest, longest = getattr(inputs, "MIN_SIZE_TEST", 0), getattr(inputs, "MAX_SIZE_TEST", 0)
    metadata = replace(
        graph.metadata, clipdense=clipdense.__version__, shortest=int(shortest), longest=int(longest)
    )
    return replace(graph, metadata=metadata)


def _write(graph: Graph, output: str | Path, opset: int, check: bool) -> ExportReport:
    path = Path(output)
    if path.suffix == ".pt2":
        write_pt2(graph, path)
        return ExportReport(path, path.stat().st_size, graph, None)
    write_onnx(graph, path, opset)
    size = path.stat().st_size
    beside = path.with_name(path.name + ".data")
    size += beside.stat().st_size if beside.is_file() else 0
    if not check:
        return ExportReport(path, size, graph, None)
    difference = compare_onnx(graph, path, graph.other_inputs())
    if difference > TOLERANCE:
        raise ExportError(
            f"{path} differs from eager execution by {difference:.1e}, more than {TOLERANCE:.0e}: do not use "
            "it, and please report it; --no-check keeps the file"
        )
    return ExportReport(path, size, graph, difference)
