"""Learning-rate schedules as functions of the iteration and of the training's progress."""

import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass

from clipdense.engine.options import ConfigError

from detectron2.config import CfgNode

__all__ = ["Schedule", "build_schedule", "cosine", "multi_step", "poly"]

Decay = Callable[[float], float]


def cosine(end: float = 0.0) -> Decay:
    """Half a cosine from 1 down to ``end``."""
    return lambda p: end + (1.0 - end) * 0.5 * (1.0 + math.cos(math.pi * p))


def poly(power: float = 0.9, end: float = 0.0) -> Decay:
    """``(1 - p) ** power`` from 1 down to ``end``."""
    return lambda p: end + (1.0 - end) * (1.0 - p) ** power


def multi_step(milestones: list[float], gamma: float = 0.1) -> Decay:
    """1, multiplied by ``gamma`` at each of ``milestones`` (progress in 0..1)."""
    return lambda p: gamma ** bisect_right(milestones, p)


@dataclass(frozen=True)
class Schedule:
    """LR multiplier: ``decay(progress)``, approached from ``warmup_factor`` during the first iterations.

    Progress runs from 0 to 1. As long as it is ``iteration / max_iter``, the values are those of Detectron2's
    ``WarmupParamScheduler``. Under a wall-clock cap (``SOLVER.MAX_SECONDS``) progress may run ahead of the
    iterations; the LR then still decays to its end, and warm-up is over at a tenth of the progress at the
    latest.
    """

    decay: Decay
    max_iter: int
    warmup_iters: int = 0
    warmup_factor: float = 0.001
    warmup_method: str = "linear"
    timed: bool = False

    def __call__(self, iteration: int, progress: float) -> float:
        progress = min(progress, 1.0)
        warmup_end = min(self.warmup_iters / self.max_iter, 1.0)
        alpha = iteration / self.warmup_iters if self.warmup_iters else 1.0
        if self.timed:
            alpha = max(alpha, progress / 0.1)
        if alpha >= 1.0:
            return self.decay(progress)
        start = self.warmup_factor * self.decay(0.0)
        if self.warmup_method == "constant":
            return start
        return start * (1.0 - alpha) + self.decay(max(progress, warmup_end)) * alpha


def build_schedule(cfg: CfgNode) -> Schedule:
    """The schedule that ``SOLVER.LR_SCHEDULER_NAME`` names.

    Raises:
        ConfigError: an unknown schedule or warm-up method, with the known ones.
    """
    s = cfg.SOLVER
    end = s.BASE_LR_END / s.BASE_LR if s.BASE_LR else 0.0
    decays: dict[str, Callable[[], Decay]] = {
        "WarmupMultiStepLR": lambda: multi_step(
            [x / s.MAX_ITER for x in s.STEPS if x <= s.MAX_ITER], s.GAMMA
        ),
        "WarmupCosineLR": lambda: cosine(end),
        "WarmupPolyLR": lambda: poly(s.POLY_LR_POWER, end),
    }
    if s.LR_SCHEDULER_NAME not in decays:
        raise ConfigError(f"SOLVER.LR_SCHEDULER_NAME {s.LR_SCHEDULER_NAME!r} is none of {', '.join(decays)}")
    if s.WARMUP_METHOD not in ("linear", "constant"):
        raise ConfigError(f"SOLVER.WARMUP_METHOD {s.WARMUP_METHOD!r} is neither 'linear' nor 'constant'")
    return Schedule(
        decays[s.LR_SCHEDULER_NAME](),
        s.MAX_ITER,
        s.WARMUP_ITERS,
        s.WARMUP_FACTOR,
        s.WARMUP_METHOD,
        timed=s.MAX_SECONDS > 0,
    )
