"""Shared base of the evaluators."""

from __future__ import annotations

import itertools
import logging
import os
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from clipdense.files import json_text, write_text

from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators
from detectron2.utils import comm

__all__ = [
    "AlternativeEvaluators",
    "Results",
    "TaskEvaluator",
    "distinct_names",
    "sample_image",
    "save_json",
]

Results = OrderedDict[str, dict[str, float]]

logger = logging.getLogger(__name__)


class TaskEvaluator(DatasetEvaluator):
    """Evaluator of one task on one dataset, collected over images and processes.

    A subclass declares the model output that it reads (`outputs`), makes a record of each image
    (`process_image`) and scores the records of all processes in the main process (`score`).

    Args:
        output_dir: folder for predictions and results; None writes nothing.
        distributed: whether to gather the records of all processes; False scores those of this process.
        optional: True: if the model lacks the output, the results lack the task; False: that is an error.

    Attributes:
        outputs: names of model outputs of which one is needed; empty if the evaluator measures a probe (see
            `clipdense.evaluation.probes`) and reads no output.
    """

    outputs: tuple[str, ...] = ()

    def __init__(
        self, output_dir: str | None = None, *, distributed: bool = True, optional: bool = False
    ) -> None:
        self._output_dir = output_dir
        self._distributed = distributed
        self._optional = optional
        self._records: list[Any] = []

    def reset(self) -> None:
        """Drop all images."""
        self._records = []

    def process(self, inputs: Sequence[dict[str, Any]], outputs: Sequence[dict[str, Any]]) -> None:
        """Process the outputs of a batch.

        Raises:
            KeyError: If the model lacks the output that is evaluated, unless it is optional.
        """
        for sample, output in zip(inputs, outputs, strict=True):
            if not self.outputs or any(name in output for name in self.outputs):
                self._records.append(self.process_image(sample, output))
            elif not self._optional:
                needed, found = " or ".join(self.outputs), ", ".join(sorted(output)) or "nothing"
                raise KeyError(
                    f"{type(self).__name__} needs the output {needed}, but the model gives {found}"
                )

    def process_image(self, sample: dict[str, Any], output: dict[str, Any]) -> Any:
        """Make the record of one image from its input and its output."""
        raise NotImplementedError

    def score(self, records: list[Any]) -> Results:
        """Compute metrics in percent from the records of all images: task -> metric -> value."""
        raise NotImplementedError

    def evaluate(self) -> Results | None:
        """Compute metrics in percent: task -> metric -> value, NaN without ground truth.

        Only the main process returns them; the others return None.
        """
        records = self._records
        if self._distributed:
            comm.synchronize()
            records = list(itertools.chain(*comm.gather(records, dst=0)))
            if not comm.is_main_process():
                return None
        if not records and self._optional:
            logger.info("Skip %s: the model gives no %s", type(self).__name__, " or ".join(self.outputs))
            return OrderedDict()
        return self.score(records)

    def save(self, name: str, content: Any) -> None:
        """Write a JSON file into the output folder, if there is one."""
        if self._output_dir:
            save_json(os.path.join(self._output_dir, name), content)


class AlternativeEvaluators(DatasetEvaluators):
    """Optional evaluators, of which at least one must apply to the model.

    Args:
        evaluators: list of `TaskEvaluator`.
    """

    def process(self, inputs: Sequence[dict[str, Any]], outputs: Sequence[dict[str, Any]]) -> None:
        """Process the outputs of a batch.

        Raises:
            KeyError: If no evaluator applies to the model.
        """
        if all(evaluator.outputs for evaluator in self._evaluators):
            needed = [name for evaluator in self._evaluators for name in evaluator.outputs]
            for output in outputs:
                if not output.keys() & set(needed):
                    found = ", ".join(sorted(output)) or "nothing"
                    raise KeyError(
                        f"the dataset needs the output {' or '.join(needed)}, but the model gives {found}"
                    )
        super().process(inputs, outputs)


def sample_image(sample: Mapping[str, Any], size: tuple[int, ...]) -> Tensor:
    """Return the image of a sample, (3, H, W) uint8 RGB at the size of its file.

    Args:
        sample: model input with ``image``, from a mapper that does not resize it.
        size: (H, W) of the ground truth.

    Raises:
        ValueError: If the sample has no image, or one of another size.
    """
    image: Tensor | None = sample.get("image")
    if image is None or tuple(image.shape[1:]) != tuple(size):
        found = "no image" if image is None else "an image of {} x {} pixels".format(*image.shape[1:])
        raise ValueError(
            f"{sample['file_name']}: the sample has {found}, but its ground truth is {size[0]} x {size[1]}; "
            "use a mapper (INPUT.MAPPER) that gives test images at their own size"
        )
    return image


def save_json(path: str, content: Any) -> None:
    """Write a JSON file atomically: a full disk leaves the old file as it was."""
    write_text(path, json_text(content))


def distinct_names(names: Iterable[str], ids: Iterable[int | str]) -> list[str]:
    """Return names for the keys of results by class: a name that several classes share gets the class's id.

    Args:
        names: class names.
        ids: id of each class, e.g. its category id.
    """
    names = list(names)
    counts = Counter(names)
    return [
        name if counts[name] == 1 else f"{name} (id {identity})"
        for name, identity in zip(names, ids, strict=True)
    ]
