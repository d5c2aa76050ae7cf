"""Description of a training that has diverged: where, in which values, and which checkpoint to go back to."""

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from torch import nn

from clipdense.engine.distributed import local_part

from detectron2.utils import comm

__all__ = [
    "describe_divergence",
    "divergence",
    "file_names",
    "last_good_checkpoint",
    "non_finite_gradients",
    "non_finite_values",
    "non_finite_weights",
]

_PERIODIC = re.compile(r"model_(\d+)\.pth")

# A loss that is larger than the median of the earlier ones by this factor belongs to the divergence.
_EXPLOSION = 10.0


def non_finite_weights(model: nn.Module) -> list[str]:
    """Return the names of the parameters and running statistics that hold NaN or infinite values."""
    running = (
        (name, buffer)
        for name, buffer in model.named_buffers()
        if name.endswith(("running_mean", "running_var"))
    )
    return [
        name
        for name, value in [*model.named_parameters(), *running]
        if value.is_floating_point() and not local_part(value).isfinite().all()
    ]


def non_finite_gradients(model: nn.Module) -> list[str]:
    """Return the names of the parameters whose gradients hold NaN or infinite values."""
    return [
        name
        for name, p in model.named_parameters()
        if p.grad is not None and not local_part(p.grad).isfinite().all()
    ]


def file_names(batch: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the file names of a batch; the image ids of samples without one."""
    return [str(sample.get("file_name", sample.get("image_id", "?"))) for sample in batch]


def divergence(
    trainer: Any,
    values: list[str],
    images: list[str] | None = None,
    losses: Mapping[str, float] | None = None,
) -> FloatingPointError:
    """Build the error of a diverged training; ``--resume`` then starts from the last good checkpoint.

    Args:
        trainer: the `Trainer`.
        values: descriptions of the non-finite values.
        images: images of the batch; by default those of this process.
        losses: all losses, if they are known.
    """
    total = trainer.storage.histories().get("total_loss")
    good, suspects = last_good_checkpoint(
        trainer.options.output_dir, trainer.iter, total.values() if total is not None else []
    )
    if good is not None and suspects and comm.is_main_process():
        trainer.checkpointer.tag_last_checkpoint(good.name)
    images = file_names(trainer.batch) if images is None else images
    return FloatingPointError(describe_divergence(trainer.iter, values, images, losses or {}, good, suspects))


def non_finite_values(trainer: Any, losses: dict[str, float], suspicious: bool) -> FloatingPointError:
    """Build the error that names non-finite losses or gradients; every process must call this function.

    Args:
        trainer: the `Trainer`.
        losses: mean losses of the global batch.
        suspicious: whether this process has non-finite values.
    """
    bad = [f"{name} = {value}" for name, value in losses.items() if not math.isfinite(value)]
    found = comm.all_gather(non_finite_gradients(trainer.parallel.model))
    bad = bad or [f"the gradient of {name}" for name in dict.fromkeys(n for part in found for n in part)]
    images = comm.all_gather(file_names(trainer.batch) if suspicious else [])
    return divergence(trainer, bad, [name for names in images for name in names], losses)


def describe_divergence(
    iteration: int,
    values: list[str],
    images: list[str],
    losses: Mapping[str, float],
    good: Path | None,
    suspects: list[str],
) -> str:
    """Describe non-finite values: the iteration, the images, the last good checkpoint, and what to do.

    Args:
        iteration: iteration with the values.
        values: descriptions of the values.
        images: images of the batch.
        losses: all losses; empty if they are not known.
        good: last checkpoint from before the divergence.
        suspects: names of the later checkpoints.
    """
    shown = values[:10] + ["..."] * (len(values) > 10)
    lines = [f"NaN or infinite values at iteration {iteration}: {', '.join(shown)}"]
    if losses:
        lines.append(f"All losses: {', '.join(f'{name} = {value:.6g}' for name, value in losses.items())}")
    lines.append(f"Images of the batch: {', '.join(images)}")
    checkpoint = f"the last good checkpoint is {good or 'none yet'}"
    if suspects:
        checkpoint += f" ({', '.join(suspects[-3:])} may hold diverged weights)"
    lines.append(
        f"Training stopped; {checkpoint}. Check these images and their annotations, or lower "
        "SOLVER.BASE_LR, or set SOLVER.CLIP_GRADIENTS.ENABLED True."
    )
    return "\n".join(lines)


def last_good_checkpoint(
    folder: str, iteration: int, losses: Iterable[tuple[float, float]]
) -> tuple[Path | None, list[str]]:
    """Return the last periodic checkpoint from before a divergence.

    The checkpoint of iteration k holds the weights with which the loss of iteration k + 1 is computed. It
    counts as good if that loss is finite and at most ten times the median of the losses before it.

    Args:
        folder: output folder of the run.
        iteration: iteration with non-finite values.
        losses: (total loss, iteration) of the iterations before.

    Returns:
        The checkpoint, or None if there is none from before the divergence; and the names of the later ones.
    """
    known = {int(k): value for value, k in losses}
    found = sorted(
        (int(match[1]), path)
        for path in Path(folder).glob("model_*.pth")
        if (match := _PERIODIC.fullmatch(path.name))
    )
    suspects: list[str] = []
    for k, path in reversed(found):
        if k + 1 < iteration and _is_usual(known, k + 1):
            return path, suspects
        suspects.insert(0, path.name)
    return None, suspects


def _is_usual(losses: Mapping[int, float], iteration: int) -> bool:
    loss = losses.get(iteration)
    if loss is None:  # older than the metrics that are kept
        return True
    earlier = [value for k, value in losses.items() if k < iteration]
    return math.isfinite(loss) and (not earlier or loss <= _EXPLOSION * median(earlier))
