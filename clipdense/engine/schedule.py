"""Learning-rate schedules: fvcore's decays, with a warm-up that also ends under a wall-clock limit."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

from fvcore.common.param_scheduler import (
    CosineParamScheduler,
    MultiStepParamScheduler,
    ParamScheduler,
    PolynomialDecayParamScheduler,
)

from clipdense.engine.options import ConfigError

from detectron2.config import CfgNode

__all__ = ["PolynomialDecay", "Schedule", "build_schedule"]

logger = logging.getLogger(__name__)


class PolynomialDecay(ParamScheduler):
    """Polynomial decay from 1 to an end value: ``end + (1 - end) * (1 - where) ** power``.

    fvcore's `PolynomialDecayParamScheduler` always ends at 0.
    """

    def __init__(self, power: float, end: float) -> None:
        self.decay, self.end = PolynomialDecayParamScheduler(1.0 - end, power), end

    def __call__(self, where: float) -> float:
        """Return the value after a share of the training (0..1)."""
        return self.end + self.decay(where)


@dataclass(frozen=True)
class Schedule:
    """Learning rate of a parameter group: a decay after a warm-up.

    If progress equals ``iteration / max_iter``, the values are those of Detectron2's `WarmupParamScheduler`.
    Under a wall-clock limit (``SOLVER.MAX_SECONDS``), progress may be larger. The learning rate then still
    decays to its end, and the warm-up ends after a tenth of the progress at the latest.

    Attributes:
        decay: progress (0..1) -> multiplier after the warm-up.
        max_iter: number of iterations.
        warmup_iters: iterations of the warm-up.
        warmup_factor: factor at the first iteration.
        warmup_method: "linear" (straight from the first value to the value at the end of the warm-up),
            "constant", or "scaled_linear" (the decayed value times a factor that rises to 1, as in mmcv).
        timed: whether the training has a wall-clock limit.
        min_lr: learning rate at which every group ends: ``(base - min_lr) * decay + min_lr``, as in mmcv. It
            raises groups with a smaller base learning rate.
    """

    decay: Callable[[float], float]
    max_iter: int
    warmup_iters: int = 0
    warmup_factor: float = 0.001
    warmup_method: str = "linear"
    timed: bool = False
    min_lr: float = 0.0

    def __call__(self, iteration: int, progress: float, base_lr: float = 1.0) -> float:
        """Return the learning rate of a group at an iteration.

        Args:
            iteration: number of the iteration, from 0.
            progress: progress of the training, 0..1.
            base_lr: base learning rate of the group. With the default and without ``min_lr``, the result is
                the multiplier of every group.
        """

        def decayed(where: float) -> float:
            return (base_lr - self.min_lr) * self.decay(where) + self.min_lr

        progress = min(progress, 1.0)
        warmup_end = min(self.warmup_iters / self.max_iter, 1.0)
        alpha = iteration / self.warmup_iters if self.warmup_iters else 1.0
        if self.timed:
            alpha = max(alpha, progress / 0.1)
        if alpha >= 1.0:
            return decayed(progress)
        if self.warmup_method == "scaled_linear":
            return decayed(progress) * (1.0 - (1.0 - alpha) * (1.0 - self.warmup_factor))
        start = self.warmup_factor * decayed(0.0)
        if self.warmup_method == "constant":
            return start
        return start * (1.0 - alpha) + decayed(max(progress, warmup_end)) * alpha


def build_schedule(cfg: CfgNode) -> Schedule:
    """Build the schedule that ``SOLVER.LR_SCHEDULER_NAME`` names.

    Raises:
        ConfigError: If the schedule or the warm-up method is unknown (the message lists the known ones), or
            both MIN_LR and BASE_LR_END are set.
    """
    s = cfg.SOLVER
    if s.MIN_LR and s.BASE_LR_END:
        raise ConfigError(
            f"SOLVER.MIN_LR {s.MIN_LR} and SOLVER.BASE_LR_END {s.BASE_LR_END} both set the last learning "
            "rate: set one of them to 0"
        )
    end = s.BASE_LR_END / s.BASE_LR if s.BASE_LR else 0.0
    steps = [step for step in s.STEPS if step < s.MAX_ITER]
    if steps != sorted(set(steps)):
        raise ConfigError(f"SOLVER.STEPS must ascend, got {s.STEPS}")
    decays: dict[str, Callable[[], ParamScheduler]] = {
        "WarmupMultiStepLR": lambda: MultiStepParamScheduler(
            [s.GAMMA**k for k in range(len(steps) + 1)], s.MAX_ITER, steps
        ),
        "WarmupCosineLR": lambda: CosineParamScheduler(1.0, end),
        "WarmupPolyLR": lambda: PolynomialDecay(s.POLY_LR_POWER, end),
    }
    if s.LR_SCHEDULER_NAME not in decays:
        known = ", ".join(decays)
        raise ConfigError(f"SOLVER.LR_SCHEDULER_NAME must be one of {known}, got {s.LR_SCHEDULER_NAME!r}")
    if s.WARMUP_METHOD not in ("linear", "constant", "scaled_linear"):
        raise ConfigError(
            f"SOLVER.WARMUP_METHOD must be 'linear', 'constant' or 'scaled_linear', got {s.WARMUP_METHOD!r}"
        )
    if s.WARMUP_ITERS >= s.MAX_ITER:
        logger.warning(
            "SOLVER.WARMUP_ITERS %d is not below SOLVER.MAX_ITER %d: the learning rate never reaches "
            "SOLVER.BASE_LR. Lower SOLVER.WARMUP_ITERS, e.g. to %d.",
            *(s.WARMUP_ITERS, s.MAX_ITER, s.MAX_ITER // 10),
        )
    return Schedule(
        decays[s.LR_SCHEDULER_NAME](),
        s.MAX_ITER,
        s.WARMUP_ITERS,
        s.WARMUP_FACTOR,
        s.WARMUP_METHOD,
        timed=s.MAX_SECONDS > 0,
        min_lr=s.MIN_LR,
    )
