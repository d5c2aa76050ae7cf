"""Benchmarks: what clipdense costs beside the floor, or beside the library that it stands in for.

A suite is a module of this package. It has ``rows(args)``, which yields a `Row` for each figure, and may have
``add_arguments(parser)`` for options of its own; ``tools/benchmark.py SUITE`` runs it. ``FULL`` and
``REDUCED`` list the options of ``tools/benchmark.py all``. It computes on ``args.device``: "cpu", "cuda" or,
if it has ``META = True``, "meta".
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType
from typing import Any, Literal
from weakref import WeakKeyDictionary, finalize

import torch
from tabulate import tabulate
from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

__all__ = [
    "MIN_PAIRS",
    "Row",
    "Scale",
    "device_peak",
    "flops",
    "interleaved",
    "load_suite",
    "peak_memory",
    "suite_options",
    "suites",
    "table",
    "wall",
]

MIN_PAIRS = 7
"""Pairs of runs that a wall-clock ratio rests on. A pair of more than half a minute may do with fewer, and
says so."""

Kind = Literal["cost", "speedup"]
Scale = Literal["full", "reduced"]


@dataclass
class Row:
    """One figure of a suite.

    Attributes:
        name: ``suite/what``.
        ours, other: the two quantities, in `unit`; for wall time the minimum of the raw times.
        unit: ``"s"``, ``"GFLOP"`` ...
        kind: ``"cost"`` (ratio = ours / other; 1 is the floor) or ``"speedup"`` (ratio = other / ours).
        what: what the two are, in a few words.
        raw: single times in seconds, ``{"ours": [...], "other": [...]}``; empty for exact quantities.
        notes: what else a reader must know; printed below the table.
        values: further numbers, such as metrics that both computed.
        images: images of one run, for images per second; 0: a run is not about images.
        peak_gb: GB that each side held at most beyond its weights and inputs,
            ``{"ours": ..., "other": ...}``; of wall-clock rows with images.
    """

    name: str
    ours: float
    other: float
    unit: str
    kind: Kind = "cost"
    what: str = ""
    raw: dict[str, list[float]] = field(default_factory=dict)
    notes: str = ""
    values: dict[str, Any] = field(default_factory=dict)
    images: int = 0
    peak_gb: dict[str, float] = field(default_factory=dict)

    @property
    def images_per_second(self) -> float | None:
        """Images per second of ours, of a row of seconds; None of any other row."""
        return self.images / self.ours if self.images and self.unit == "s" and self.ours else None

    @property
    def ratio(self) -> float:
        """Ours over other for a cost, other over ours for a speed-up."""
        first, second = (self.ours, self.other) if self.kind == "cost" else (self.other, self.ours)
        return first / second if second else float("nan")

    def to_json(self) -> dict[str, Any]:
        """All fields, the ratio and how it is formed, and images per second."""
        formed = "ours / other" if self.kind == "cost" else "other / ours"
        rate = self.images_per_second
        return {**asdict(self), "ratio": self.ratio, "ratio_is": formed, "images_per_second": rate}


def suites() -> list[str]:
    """Names of all suites."""
    return sorted(module.name for module in iter_modules(__path__))


def suite_options(name: str, scale: Scale) -> tuple[str, ...]:
    """Options with which a suite runs among all: its defaults, or its ``FULL`` or ``REDUCED``."""
    return tuple(getattr(load_suite(name), scale.upper(), ()))


def load_suite(name: str) -> ModuleType:
    """The module of a suite.

    Raises:
        ValueError: there is no such suite.
    """
    if name not in suites():
        raise ValueError(f"no benchmark suite {name!r}; there are {', '.join(suites())}")
    return import_module(f"{__name__}.{name}")


def flops(run: Callable[[], object]) -> int:
    """Floating-point operations of one call, exact (multiplications and additions counted apart)."""
    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


def peak_memory(run: Callable[[], object]) -> int:
    """The most bytes that tensors made by one call held at a time, exact on every device.

    Counted are the storages that operators return, from then until nothing refers to them; scratch memory
    inside an operator is not seen.
    """
    with _Storages() as storages:
        run()
    return storages.peak


def device_peak(run: Callable[[], object]) -> int:
    """The most bytes that one call held at a time beyond what was there before.

    On a GPU in use, the allocator's own count, with scratch memory; elsewhere `peak_memory`.
    """
    if not (torch.cuda.is_available() and torch.cuda.is_initialized()):
        return peak_memory(run)
    _synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    _synchronize()
    return torch.cuda.max_memory_allocated() - before


class _Storages(TorchDispatchMode):
    """Adds up the live storages of operators' results."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.seen: WeakKeyDictionary[UntypedStorage, None] = WeakKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {x.untyped_storage() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and (storage := x.untyped_storage()) not in self.seen:
                self.seen[storage] = None
                if storage not in given:  # else a view of, or a change in, what the call did not make
                    self.live += storage.nbytes()
                    self.peak = max(self.peak, self.live)
                    finalize(storage, self._freed, storage.nbytes())
        return result

    def _freed(self, size: int) -> None:
        self.live -= size


def interleaved(
    ours: Callable[[], object], other: Callable[[], object], pairs: int = MIN_PAIRS, *, warm_up: bool = True
) -> Iterator[tuple[float, float]]:
    """Wall-clock seconds of both, run in turns so that both see the same load of the machine.

    Args:
        ours, other: what is timed; on an accelerator the queue is emptied before each reading of the clock.
        pairs: how often.
        warm_up: run both once without timing.
    """
    for pair in range(-1 if warm_up else 0, pairs):
        times = []
        for run in (ours, other):
            _synchronize()
            start = time.perf_counter()
            run()
            _synchronize()
            times.append(time.perf_counter() - start)
        if pair >= 0:
            yield times[0], times[1]


def wall(
    name: str,
    ours: Callable[[], object],
    other: Callable[[], object],
    *,
    pairs: int = MIN_PAIRS,
    kind: Kind = "cost",
    what: str = "",
    warm_up: bool = True,
    images: int = 0,
    **fields: Any,
) -> Row:
    """A `Row` of wall-clock time: the minimum of each over interleaved pairs.

    With ``images``, the number of images of one run, each side runs once more, for its peak memory.
    """
    runs = interleaved(ours, other, pairs, warm_up=warm_up)
    times = list(tqdm(runs, name, total=pairs, unit="pair", leave=False, disable=None))
    raw = {"ours": [a for a, _ in times], "other": [b for _, b in times]}
    if pairs < MIN_PAIRS:
        fields["notes"] = f"{fields.get('notes', '')} {pairs} pairs instead of {MIN_PAIRS}.".strip()
    peaks = {"ours": device_peak(ours) / 1e9, "other": device_peak(other) / 1e9} if images else {}
    best = min(raw["ours"]), min(raw["other"])
    return Row(name, *best, "s", kind, what, raw, images=images, peak_gb=peaks, **fields)


def table(rows: list[Row]) -> str:
    """The rows for the screen, notes below. "Floor" is what ours is compared with, faster or slower."""
    cells = [
        [
            row.name,
            _number(row.ours),
            _number(row.other),
            row.unit,
            _number(row.ratio),
            _RATIO[row.kind],
            "" if row.images_per_second is None else _number(row.images_per_second),
            " | ".join(_number(row.peak_gb[side]) for side in ("ours", "other") if row.peak_gb),
            row.what,
        ]
        for row in rows
    ]
    headers = ["row", "ours", "floor", "unit", "ratio", "", "images/s", "peak GB", "ours | floor"]
    right = ["left", "right", "right", "left", "right", "left", "right", "right", "left"]
    text = tabulate(cells, headers, "simple_outline", colalign=right, disable_numparse=True)
    notes = [f"{row.name}: {row.notes}" for row in rows if row.notes]
    return "\n".join([text, *notes])


_RATIO = {"cost": "x the cost", "speedup": "x as fast"}


def _number(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def _synchronize() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
