"""What is known about the predictions of one run on one dataset."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from clipdense.visualization.report.document import Cell

__all__ = ["Analysis", "ClassScore", "Interval", "Options"]

Id = int | str


@dataclass(frozen=True)
class Options:
    """Settings of a report.

    Attributes:
        images: best images, and as many worst ones.
        bootstrap: samples for the intervals of differences.
        min_score: detections with a lower score, 0..1, are not drawn, and not in the confusion matrix.
    """

    images: int = 6
    bootstrap: int = 200
    min_score: float = 0.5


@dataclass(frozen=True)
class ClassScore:
    """Scores of a class.

    Attributes:
        name: class name.
        count: objects or pixels in the ground truth.
        score: AP or IoU in percent; NaN without ground truth.
        others: further columns, in percent.
    """

    name: str
    count: int
    score: float
    others: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Interval:
    """Difference of a metric between two runs, with its bootstrap interval.

    Attributes:
        first, second: metric of the runs, in percent.
        low, high: ends of the 95 percent interval of second - first, in percentage points; NaN if it is not
            known.
    """

    first: float
    second: float
    low: float
    high: float


@dataclass(frozen=True)
class Analysis:
    """Predictions of one run on one dataset, against the ground truth.

    Attributes:
        dataset: name of the dataset.
        kind: what is matched.
        metrics: metric -> value in percent.
        score_name: "AP" or "IoU", the score of a class.
        classes: scores of each class.
        confusion: counts (N, N), true class by predicted class.
        confusion_names: names of its N rows.
        confusion_caption: what it counts.
        image_scores: image -> score in percent.
        draw: output of the model for an image, as `draw_output` takes it.
        breakdowns: title -> headings and rows of a table: sizes, frequencies.
        precision_recall: name -> precision (101,) at the recalls 0, 0.01 ... 1; empty if it is not defined.
        errors: kind of error, gain of AP50 in points if it were mended, and number; empty if not defined.
        bootstrap: compares two analyses of this kind with a number of samples, see `compare`.
        details: what ``bootstrap`` needs of each run.
    """

    dataset: str
    kind: Literal["boxes", "masks", "pixels"]
    metrics: dict[str, float]
    score_name: str
    classes: list[ClassScore]
    confusion: npt.NDArray[np.int64]
    confusion_names: Sequence[str]
    confusion_caption: str
    image_scores: dict[Id, float]
    draw: Callable[[Id], dict[str, Any]]
    bootstrap: Callable[[Analysis, Analysis, int], dict[str, Interval]]
    breakdowns: Mapping[str, tuple[Sequence[str], list[list[Cell]]]] = field(default_factory=dict)
    precision_recall: dict[str, npt.NDArray[np.float64]] = field(default_factory=dict)
    errors: list[tuple[str, float, int | None]] = field(default_factory=list)
    details: Any = None

    def compare(self, other: Analysis, samples: int) -> dict[str, Interval]:
        """Compare the metrics with those of another run on the same images.

        Args:
            other: the other run.
            samples: number of bootstrap samples of the images; each sample is used for both runs.

        Returns:
            Metric -> its values and the interval of its difference.

        Raises:
            ValueError: If the runs have predictions of different images.
        """
        return self.bootstrap(self, other, samples)
