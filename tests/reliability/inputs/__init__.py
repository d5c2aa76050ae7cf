"""Damaged inputs of every kind; each module yields `Case` objects for ever, hand-made ones first."""

from collections.abc import Callable, Iterator

from tests.reliability.inputs import annotations, coco, configs, images, state, tables, weights
from tests.reliability.outcomes import Case
from tests.reliability.world import World

__all__ = ["KINDS"]

# Kind of input -> (cases, share of the inputs of a full run, number of them that share a process). Inputs
# that set nothing up, but are only read, share one.
KINDS: dict[str, tuple[Callable[[World, int], Iterator[Case]], float, int]] = {
    "images": (images.cases, 0.21, 10),
    "COCO": (coco.cases, 0.2, 1),
    "LVIS, panoptic, captions, pairs, shards": (annotations.cases, 0.24, 10),
    "configs": (configs.cases, 0.1, 1),
    "weights": (weights.cases, 0.12, 1),
    "tables and vocabularies": (tables.cases, 0.09, 10),
    "state files": (state.cases, 0.04, 1),
}
