"""The card of a model folder: a README with task, data, metrics, licence and commands."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from clipdense.engine.options import ConfigError

from detectron2.config import CfgNode

__all__ = ["Card", "card_of_run", "check_licence"]

_LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_TASKS = {
    "instances": ("object-detection", "detection of objects"),
    "masks": ("image-segmentation", "instance segmentation"),
    "semantic": ("image-segmentation", "semantic segmentation"),
    "panoptic": ("image-segmentation", "panoptic segmentation"),
}
_SEMANTIC = ("SemanticSegmentor", "CATSeg", "SemanticFPN", "SegCLIP", "PACL", "CLIPpy", "ZeroShotSegmentor")
_MAX_CLASSES = 30
_ABSOLUTE = re.compile(r"(?<![\w.])(~|/)[^\s'\",:]*/([^\s'\",:/]+)")


@dataclass(frozen=True)
class Card:
    """What the card of a model says.

    Attributes:
        name: title, e.g. the hub id.
        licence: identifier of the licence of the weights, in lower case as the hub writes it
            ("apache-2.0", "cc-by-nc-4.0", "other").
        task: key of a task: "instances", "masks", "semantic" or "panoptic".
        architecture: value of MODEL.META_ARCHITECTURE.
        data: names of the datasets of the training.
        evaluated_on: names of the test datasets.
        metrics: metric -> value in percent, or as measured.
        classes: class names that were trained.
        command: command that trained the model; "" if it is not known.
        source: layout of the published weights that it was converted from; "" if there is none.
        source_licence: licence of these weights; "" if there is none.
    """

    name: str
    licence: str
    task: str
    architecture: str
    data: Sequence[str] = ()
    evaluated_on: Sequence[str] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    classes: Sequence[str] = ()
    command: str = ""
    source: str = ""
    source_licence: str = ""

    def text(self) -> str:
        """Return the README in Markdown, with the header that the hub reads."""
        tag, task = _TASKS[self.task]
        header: dict[str, Any] = {"license": self.licence, "library_name": "clipdense", "pipeline_tag": tag}
        header["tags"] = ["clipdense", "detectron2", self.architecture]
        parts = [
            f"---\n{yaml.safe_dump(header, sort_keys=False)}---\n",
            f"# {self.name}\n",
            f"{self.architecture} for {task}, made with clipdense (`pip install clipdense`).\n",
            "## Use\n",
            f"```python\nimport clipdense\n\npredict = clipdense.Predictor.from_pretrained({self.name!r})\n"
            'output = predict("photo.jpg")\n```\n',
            *self._data(),
            *self._metrics(),
            "## Licence\n",
            f"Weights: {self.licence}." + self._origin() + "\n",
        ]
        if self.command:
            parts += ["## Training\n", f"```\n{self.command}\n```\n"]
        return "\n".join(parts)

    def _data(self) -> list[str]:
        lines = [f"- Trained on: {', '.join(self.data) or 'not recorded'}"]
        if self.classes:
            shown = ", ".join(self.classes[:_MAX_CLASSES])
            more = len(self.classes) - _MAX_CLASSES
            lines.append(
                f"- Classes: {len(self.classes)} ({shown}{f', and {more} more' if more > 0 else ''})"
            )
        return ["## Data\n", "\n".join(lines) + "\n"]

    def _metrics(self) -> list[str]:
        if not self.metrics:
            return ["## Metrics\n", "No evaluation is recorded.\n"]
        overall = {n: v for n, v in self.metrics.items() if "-" not in n.rpartition("/")[2]}
        rows = "\n".join(f"| {name} | {value:.2f} |" for name, value in overall.items())
        where = f"On {', '.join(self.evaluated_on)}.\n" if self.evaluated_on else ""
        return ["## Metrics\n", f"{where}\n| metric | value |\n| --- | --- |\n{rows}\n"]

    def _origin(self) -> str:
        if not self.source:
            return ""
        licence = f", whose licence is: {self.source_licence}" if self.source_licence else ""
        return f" Converted from published weights of layout `{self.source}`{licence}."


def check_licence(licence: str) -> None:
    """Check that a licence has the form that the hub knows.

    Raises:
        ConfigError: If it has not.
    """
    if not _LICENCE.fullmatch(licence):
        raise ConfigError(
            f"licence {licence!r} is not an identifier in lower case, such as apache-2.0, mit, cc-by-4.0, "
            "cc-by-nc-4.0 or other; give one with --licence"
        )


def card_of_run(
    cfg: CfgNode, folder: Path, name: str, licence: str, classes: Sequence[str], command: str
) -> Card:
    """Make the card of a training run from its config and its output folder.

    Args:
        cfg: config of the run.
        folder: its output folder; ``results.json`` (or ``inference/results.json``) and ``log.txt`` are read
            if they are there.
        name: title of the card.
        licence: licence of the weights.
        classes: class names that were trained.
        command: command of the training; "" takes it from the log. Folders of the machine are left out.
    """
    return Card(
        name=name,
        licence=licence,
        task=_task(cfg),
        architecture=cfg.MODEL.META_ARCHITECTURE,
        data=list(cfg.DATASETS.TRAIN),
        evaluated_on=list(cfg.DATASETS.TEST),
        metrics=_metrics(folder),
        classes=classes,
        command=_ABSOLUTE.sub(r"\2", command or _logged_command(folder)),
    )


def _task(cfg: CfgNode) -> str:
    test = cfg.MODEL.MASK_FORMER.TEST
    if cfg.MODEL.META_ARCHITECTURE in ("MaskFormer", "OVSeg", "FCCLIP"):
        return "panoptic" if test.PANOPTIC_ON else "masks" if test.INSTANCE_ON else "semantic"
    if any(name in cfg.MODEL.META_ARCHITECTURE for name in _SEMANTIC):
        return "semantic"
    if "Panoptic" in cfg.MODEL.META_ARCHITECTURE:
        return "panoptic"
    return "masks" if cfg.MODEL.MASK_ON else "instances"


def _metrics(folder: Path) -> dict[str, float]:
    for path in (folder / "results.json", folder / "inference" / "results.json"):
        with suppress(OSError, ValueError):
            content: Any = json.loads(path.read_text("utf-8"))
            if isinstance(content, dict):
                return {k: float(v) for k, v in content.items() if isinstance(v, int | float)}
    return {}


def _logged_command(folder: Path) -> str:
    """Return the command line of the first training that the log records; "" if there is no log."""
    with suppress(OSError, UnicodeDecodeError):
        for line in (folder / "log.txt").read_text("utf-8").splitlines():
            found = re.search(r"Command line: (.*)", re.sub(r"\x1b\[[\d;]*m", "", line))
            if found and "--eval-only" not in found[1]:
                words = found[1]
                return words if words.startswith(("python", "clipdense")) else f"python {words}"
    return ""
