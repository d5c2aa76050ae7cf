"""Splits of the `shapes` world: seeds, sizes, and the class frequencies of the long-tailed ones."""

from dataclasses import dataclass

from clipdense.data.shapes.world import CLASSES

__all__ = ["FREQUENCY", "LVIS_COUNTS", "MINI", "SPLITS", "TINY", "Split", "find_split"]

MINI = {"train": 800, "val": 200}
"""Number of images of the `_mini` datasets: the first images of the full splits."""

TINY = MINI["train"] // 8
"""Number of images of the `_tiny_train` datasets: the first eighth of the `_mini_train` datasets."""

_COMMON_STEPS, _FREQUENT_STEPS, _RARE_STEPS = 31, 32, 17


def _lvis_counts() -> tuple[int, ...]:
    """Compute the expected number of training images of each class, log-uniform in each of LVIS's groups.

    In LVIS v1, a rare class (r) has 1 to 10 training images, a common class (c) 11 to 100, and a frequent
    class (f) more. 28% of its classes are r, 38% c, 34% f. Gaps between our groups keep the drawn counts in
    their group.
    """

    def steps(low: float, high: float, n: int) -> list[float]:
        return [low * (high / low) ** (i / (n - 1)) for i in range(n)]

    counts = steps(2, 5, _RARE_STEPS) + steps(20, 60, _COMMON_STEPS) + steps(160, 900, _FREQUENT_STEPS)
    # 37 and 80 have no common factor, so every colour and shape is spread over the whole tail.
    order = [(37 * i + 5) % len(CLASSES) for i in range(len(CLASSES))]
    return tuple(round(counts[order.index(k)]) for k in range(len(CLASSES)))


LVIS_COUNTS: tuple[int, ...] = _lvis_counts()
"""Expected number of images with each class among the 3,000 of `lvis_train`."""

FREQUENCY: tuple[str, ...] = tuple("r" if n <= 10 else "c" if n <= 100 else "f" for n in LVIS_COUNTS)
"""LVIS frequency group of each class ("r", "c" or "f"): LVIS's thresholds applied to `LVIS_COUNTS`."""


@dataclass(frozen=True)
class Split:
    """Settings of a split.

    Attributes:
        seed: seed of the world.
        images: number of images of the full split.
        shift: draw from the shifted distribution.
        class_weights: relative class frequencies (None: equal).
        training: also write base-class (`ov`) annotations, without novel classes.
    """

    seed: int
    images: int
    shift: bool = False
    class_weights: tuple[float, ...] | None = None
    training: bool = False


SPLITS: dict[str, Split] = {
    "train": Split(101, 3000, training=True),
    "val": Split(102, 500),
    "shift_val": Split(103, 500, shift=True),
    "clip_train": Split(11, 9000, training=True),
    "clip_val": Split(12, 500),
    "lvis_train": Split(106, 3000, class_weights=tuple(map(float, LVIS_COUNTS)), training=True),
    # The square root flattens the tail, so that 500 images contain enough instances of rare classes.
    "lvis_val": Split(107, 500, class_weights=tuple(n**0.5 for n in LVIS_COUNTS)),
}


def find_split(name: str) -> Split:
    """Return the settings of a split.

    Args:
        name: name of a split, a key of `SPLITS`.

    Returns:
        The settings.

    Raises:
        ValueError: If there is no split of that name. The message lists the splits.
    """
    if name not in SPLITS:
        raise ValueError(f"shapes has no split {name!r}; use one of {', '.join(SPLITS)}")
    return SPLITS[name]
