"""The splits of the `shapes` world: seeds, sizes, and the class frequencies of the long-tailed ones."""

from dataclasses import dataclass

from clipdense.data.shapes.world import CLASSES

__all__ = ["FREQUENCY", "LVIS_COUNTS", "MINI", "SPLITS", "TINY", "Split", "find_split"]

MINI = {"train": 800, "val": 200}
"""Number of images of the `_mini` datasets: the first ones of the same files."""

TINY = MINI["train"] // 8
"""Number of images of the `_tiny_train` datasets: an eighth of the mini ones, the first of the same files."""

_COMMON_STEPS, _FREQUENT_STEPS, _RARE_STEPS = 31, 32, 17


def _lvis_counts() -> tuple[int, ...]:
    """Expected number of training images of each class: log-uniform within each of LVIS's three groups.

    LVIS v1 calls a class rare (r) in 1 to 10 training images, common (c) in 11 to 100, frequent (f) in more;
    28% of its classes are r, 38% c, 34% f. Gaps between our groups keep the drawn counts on the right side.
    """

    def steps(low: float, high: float, n: int) -> list[float]:
        return [low * (high / low) ** (i / (n - 1)) for i in range(n)]

    counts = steps(2, 5, _RARE_STEPS) + steps(20, 60, _COMMON_STEPS) + steps(160, 900, _FREQUENT_STEPS)
    # 37 has no factor in common with 80: every colour and shape is spread over the whole tail
    order = [(37 * i + 5) % len(CLASSES) for i in range(len(CLASSES))]
    return tuple(round(counts[order.index(k)]) for k in range(len(CLASSES)))


LVIS_COUNTS: tuple[int, ...] = _lvis_counts()
"""Expected number of images with each class among the 3,000 of `lvis_train`."""

FREQUENCY: tuple[str, ...] = tuple("r" if n <= 10 else "c" if n <= 100 else "f" for n in LVIS_COUNTS)
"""LVIS's group of each class: "r", "c" or "f", by LVIS's own thresholds on `LVIS_COUNTS`."""


@dataclass(frozen=True)
class Split:
    """A split.

    Attributes:
        seed: world seed.
        images: full size.
        shift: drawn from the shifted distribution.
        class_weights: relative class frequencies; None: equal.
        training: whether the base-class (`ov`) layouts leave novel classes out.
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
    # a flatter tail (square root), so that rare classes can be measured at all in 500 images
    "lvis_val": Split(107, 500, class_weights=tuple(n**0.5 for n in LVIS_COUNTS)),
}


def find_split(name: str) -> Split:
    """The split of that name.

    Raises:
        ValueError: no such split, with those that are.
    """
    if name not in SPLITS:
        raise ValueError(f"shapes has no split {name!r}; its splits are {', '.join(SPLITS)}")
    return SPLITS[name]
