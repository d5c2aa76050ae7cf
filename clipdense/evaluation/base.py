"""What all evaluators share."""

from __future__ import annotations

import itertools
import json
import logging
import os
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any

from tabulate import tabulate

from clipdense.files import write_text

from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators
from detectron2.utils import comm

__all__ = ["AlternativeEvaluators", "Results", "TaskEvaluator", "class_table", "save_json"]

Results = OrderedDict[str, dict[str, float]]

logger = logging.getLogger(__name__)


class TaskEvaluator(DatasetEvaluator):
    """One kind of model output of one data set, collected over images and processes.

    A subclass says which output it reads (`outputs`), what it keeps of an image (`process_image`) and how
    that is scored (`score`, in the main process, over the records of all).

    Args:
        output_dir: folder for predictions and results; None keeps nothing.
        distributed: gather the records of all processes; False scores those of this one.
        optional: a model may lack this output, and the results then lack the task; False makes that an error.
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
        """Forget all images."""
        self._records = []

    def process(self, inputs: Sequence[dict[str, Any]], outputs: Sequence[dict[str, Any]]) -> None:
        """Take the outputs of a batch.

        Raises:
            KeyError: the model does not give what is to be evaluated.
        """
        for sample, output in zip(inputs, outputs, strict=True):
            if any(name in output for name in self.outputs):
                self._records.append(self.process_image(sample, output))
            elif not self._optional:
                needed, given = " or ".join(self.outputs), ", ".join(sorted(output)) or "nothing"
                raise KeyError(
                    f"{type(self).__name__} needs the output {needed}, but the model gives {given}"
                )

    def process_image(self, sample: dict[str, Any], output: dict[str, Any]) -> Any:
        """What to keep of one image."""
        raise TypeError(f"{type(self).__name__} does not say what it keeps of an image")

    def score(self, records: list[Any]) -> Results:
        """Metrics in percent of all images, by task."""
        raise TypeError(f"{type(self).__name__} does not say how it scores")

    def evaluate(self) -> Results | None:
        """Metrics in percent by task, NaN without ground truth; None in all processes but the first."""
        records = self._records
        if self._distributed:
            comm.synchronize()
            records = list(itertools.chain(*comm.gather(records, dst=0)))
            if not comm.is_main_process():
                return None
        if not records and self._optional:
            logger.info("The model gives no %s: not evaluated.", " or ".join(self.outputs))
            return OrderedDict()
        return self.score(records)

    def save(self, name: str, content: Any) -> None:
        """Write JSON into the output folder, if there is one."""
        if self._output_dir:
            save_json(os.path.join(self._output_dir, name), content)


class AlternativeEvaluators(DatasetEvaluators):
    """Optional evaluators of which a model must serve one at least.

    Args:
        evaluators: each a `TaskEvaluator`.
    """

    def process(self, inputs: Sequence[dict[str, Any]], outputs: Sequence[dict[str, Any]]) -> None:
        """Take the outputs of a batch.

        Raises:
            KeyError: the model gives nothing that is to be evaluated.
        """
        needed = [name for evaluator in self._evaluators for name in evaluator.outputs]
        for output in outputs:
            if not output.keys() & set(needed):
                given = ", ".join(sorted(output)) or "nothing"
                raise KeyError(
                    f"the data set needs the output {' or '.join(needed)}, but the model gives {given}"
                )
        super().process(inputs, outputs)


def save_json(path: str, content: Any) -> None:
    """Write a JSON file whole or not at all: a full disk leaves the old one."""
    write_text(path, json.dumps(content))


def class_table(header: str, values: Iterable[tuple[str, float]], columns: int = 3) -> str:
    """Names and values as a table of several columns, for the log."""
    cells = [cell for pair in values for cell in pair]
    rows = [cells[i : i + 2 * columns] for i in range(0, len(cells), 2 * columns)]
    return str(tabulate(rows, headers=["class", header] * columns, tablefmt="pipe", floatfmt=".2f"))
