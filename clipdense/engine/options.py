"""Settings of a training run, except model, optimizer, schedule and data."""

from dataclasses import dataclass, field
from typing import Any

from detectron2.config import CfgNode

__all__ = ["ConfigError", "TrainerOptions"]

_PARALLEL = ("ddp", "fsdp")
_PRECISIONS = ("float32", "float16", "bfloat16")


class ConfigError(ValueError):
    """Error for a wrong setting; the message names the setting and the remedy."""


@dataclass(frozen=True)
class TrainerOptions:
    """Options of `Trainer`. Fields without a description have that of the config key of the same name.

    Attributes:
        output_dir: folder to which the run writes.
        max_iter: number of iterations; an upper limit if ``max_seconds`` is positive.
        precision: "float32", or the data type of autocast, "float16" or "bfloat16".
        clip_type: type of gradient clipping: "" (none), "value", "norm" or "full_model".
        weights: weight file to start from.
        weights_skip: patterns of parameters that may differ from the weight file.
        seed: random seed of initial weights and data order; stored in every checkpoint.
        loss_period: iterations between two measurements of the validation loss.
        loggers: names in `clipdense.engine.loggers.LOGGERS`, beside metrics.json.
        metadata: entries stored in every checkpoint, such as the classes of the training data.

    Raises:
        ConfigError: If a value is out of its range.
    """

    output_dir: str
    max_iter: int
    max_seconds: float = 0.0
    precision: str = "float32"
    accumulation_steps: int = 1
    clip_type: str = ""
    clip_value: float = 1.0
    clip_norm_type: float = 2.0
    ema_decay: float = 0.0
    find_unused_parameters: bool = False
    parallel: str = "ddp"
    shard_processes: int = 0
    activation_checkpointing: bool = False
    checkpoint_period: int = 5000
    checkpoint_keep: int = 0
    log_period: int = 20
    eval_period: int = 0
    best_metric: str = ""
    best_mode: str = "max"
    loss_period: int = 0
    early_stopping_patience: int = 0
    loggers: tuple[str, ...] = ("tensorboard",)
    logger_project: str = "clipdense"
    weights: str = ""
    weights_skip: tuple[str, ...] = ()
    allow_pickle: bool = False
    seed: int = 0
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.precision not in _PRECISIONS:
            raise ConfigError(f"precision must be one of {', '.join(_PRECISIONS)}, got {self.precision!r}")
        if self.parallel not in _PARALLEL:
            raise ConfigError(f"SOLVER.PARALLEL must be ddp or fsdp, got {self.parallel!r}")
        if self.parallel == "fsdp" and self.precision == "float16":
            raise ConfigError("SOLVER.PARALLEL fsdp has no loss scaling: set SOLVER.AMP.DTYPE bfloat16")
        if self.best_mode not in ("max", "min"):
            raise ConfigError(f"TEST.BEST_MODE must be 'max' or 'min', got {self.best_mode!r}")
        for name in ("max_iter", "accumulation_steps", "checkpoint_period", "log_period"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.max_seconds < 0 or not 0 <= self.ema_decay < 1:
            raise ConfigError(
                "max_seconds must be at least 0, and ema_decay in 0..1 (excluding 1), got "
                f"{self.max_seconds} and {self.ema_decay}"
            )
        if self.early_stopping_patience and not (self.best_metric and self.best_period):
            raise ConfigError(
                f"TEST.EARLY_STOPPING.PATIENCE {self.early_stopping_patience} needs TEST.BEST_METRIC, and "
                "TEST.EVAL_PERIOD (for a metric validation/...: TEST.LOSS.PERIOD) above 0"
            )

    @property
    def best_period(self) -> int:
        """Iterations between two values of the best metric."""
        return self.loss_period if self.best_metric.startswith("validation/") else self.eval_period

    def row_is_due(self, done: int) -> bool:
        """Return whether metrics are measured or written after ``done`` iterations."""
        periods = (self.eval_period, self.loss_period, self.log_period)
        return any(period > 0 and done % period == 0 for period in periods)

    @classmethod
    def from_config(cls, cfg: CfgNode, metadata: dict[str, Any]) -> "TrainerOptions":
        """Read the options from a yacs config."""
        s, clip = cfg.SOLVER, cfg.SOLVER.CLIP_GRADIENTS
        return cls(
            output_dir=cfg.OUTPUT_DIR,
            max_iter=s.MAX_ITER,
            max_seconds=s.MAX_SECONDS,
            precision=s.AMP.DTYPE if s.AMP.ENABLED else "float32",
            accumulation_steps=s.ACCUMULATION_STEPS,
            clip_type=clip.CLIP_TYPE if clip.ENABLED else "",
            clip_value=clip.CLIP_VALUE,
            clip_norm_type=clip.NORM_TYPE,
            ema_decay=s.EMA_DECAY,
            find_unused_parameters=s.FIND_UNUSED_PARAMETERS,
            parallel=s.PARALLEL,
            shard_processes=s.SHARD_PROCESSES,
            activation_checkpointing=s.ACTIVATION_CHECKPOINTING,
            checkpoint_period=s.CHECKPOINT_PERIOD,
            checkpoint_keep=s.CHECKPOINT_KEEP,
            log_period=s.LOG_PERIOD,
            eval_period=cfg.TEST.EVAL_PERIOD,
            best_metric=cfg.TEST.BEST_METRIC,
            best_mode=cfg.TEST.BEST_MODE,
            loss_period=cfg.TEST.LOSS.PERIOD,
            early_stopping_patience=cfg.TEST.EARLY_STOPPING.PATIENCE,
            loggers=tuple(s.LOGGERS),
            logger_project=s.LOGGER_PROJECT,
            weights=cfg.MODEL.WEIGHTS,
            weights_skip=tuple(cfg.MODEL.WEIGHTS_SKIP),
            allow_pickle=cfg.MODEL.ALLOW_PICKLE,
            seed=cfg.SEED,
            metadata=metadata,
        )
