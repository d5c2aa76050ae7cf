"""Checkpoints of a training: everything that a resumed run needs, in one file or in shards."""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clipdense.checkpoint import Checkpoint, CheckpointError
from clipdense.checkpoint.io import shard_folder
from clipdense.checkpoint.shards import load_shards, shard_sizes
from clipdense.engine.checkpoint import check_training_state
from clipdense.engine.distributed import random_state
from clipdense.engine.divergence import divergence, non_finite_weights
from clipdense.engine.metrics import current_scalars, drop_rows_from, has_row, recent_history
from clipdense.engine.output import prepare_output_dir
from clipdense.files import json_text, write_text

from detectron2.utils import comm

__all__ = ["ResumedRun", "resume_or_load", "save", "save_best"]

logger = logging.getLogger(__name__)


@dataclass
class ResumedRun:
    """What a checkpoint tells about the run before it; the defaults are those of a new run.

    Attributes:
        start_iter: first iteration to run.
        elapsed: seconds of training so far.
        random_state: random state of this process; None to seed it.
        data_order: numbers from which, with the iteration, the position in the data follows; empty if the
            loader does not tell them.
        history: result of `recent_history`.
        scalars: result of `current_scalars` if the last iteration has not been evaluated and logged.
    """

    start_iter: int = 0
    elapsed: float = 0.0
    random_state: dict[str, Any] | None = None
    data_order: dict[str, int] = field(default_factory=dict)
    history: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    scalars: dict[str, tuple[float, int, bool]] = field(default_factory=dict)


def save(trainer: Any, name: str) -> None:
    """Write ``<name>.pth``, from which training can resume exactly; every process must call this function.

    The entry ``model`` holds the weights that are evaluated. With a moving average of the weights, these are
    the averaged ones, and ``online`` holds the trained ones. With ``SOLVER.PARALLEL fsdp``, these entries and
    the optimizer's state are in the folder ``<name>.shards``; any number of processes can resume from it.

    Args:
        trainer: the `Trainer`.
        name: name of the checkpoint, without suffix.

    Raises:
        FloatingPointError: If a weight is NaN or infinite.
        CheckpointError: If the checkpoint cannot be written.
    """
    model, ema = trainer.parallel.model, trainer.ema
    bad = dict.fromkeys(n for part in comm.all_gather(non_finite_weights(model)) for n in part)
    if bad:
        raise divergence(trainer, [f"{name} after the update" for name in bad])
    state: dict[str, Any] = {"model": model.state_dict(), "online": {}}
    if ema is not None:
        state = {"model": {**state["model"], **ema.average}, "online": ema.online_state()}
    shards = None
    if trainer.options.parallel == "fsdp":
        state["optimizer"] = _named_state(model, trainer.optimizer)
        shards = {f"{kind}.{key}": v.detach() for kind, part in state.items() for key, v in part.items()}
        state = {}
    else:
        state["optimizer"] = trainer.optimizer.state_dict()
    trainer.checkpointer.save(
        name,
        shards=shards,
        **state,
        scaler=trainer.scaler.state_dict(),
        iteration=trainer.done - 1,
        elapsed=trainer.elapsed,
        seed=trainer.options.seed,
        data_order=trainer.data_order,
        random_states=comm.gather(random_state()),
        history=recent_history(trainer.storage),
        scalars=current_scalars(trainer.storage, trainer.done - 1),
        metadata=trainer.options.metadata,
    )


def save_best(trainer: Any, name: str, metric: str) -> None:
    """Write the evaluated weights as ``<name>.pth`` and the metric's value as ``<name>.json``.

    The main process calls this function within `Trainer.evaluated_weights`.
    """
    options, iteration = trainer.options, trainer.done - 1
    trainer.checkpointer.save(name, tag=False, iteration=iteration, metadata=options.metadata)
    value = trainer.storage.latest()[metric][0]
    record = {"metric": metric, "value": value, "iteration": iteration}
    write_text(Path(options.output_dir, f"{name}.json"), json_text(record))


def resume_or_load(trainer: Any, resume: bool, weights: Checkpoint | None) -> ResumedRun:
    """Continue from the last checkpoint in the output folder, or start from ``MODEL.WEIGHTS``.

    Files of an earlier run in the output folder are moved to a subfolder unless that run is resumed. The
    trainer distributes its model as soon as its weights are there.

    Args:
        trainer: the `Trainer`.
        resume: whether to look for a checkpoint. Without one, training starts at iteration 0.
        weights: content of the weight file, if it has been read already.

    Raises:
        FileNotFoundError: If the weight file does not exist.
        CheckpointError: If a file cannot be read or does not match the model or the optimizer.
    """
    options, checkpointer = trainer.options, trainer.checkpointer
    if comm.is_main_process():
        prepare_output_dir(options.output_dir, keep=resume, weights=options.weights)
        checkpointer.remove_leftovers()
    comm.synchronize()
    found = comm.all_gather(checkpointer.has_checkpoint())
    if resume and len(set(found)) > 1:
        raise CheckpointError(
            f"only some processes see the checkpoint in {options.output_dir}: "
            "resuming needs a folder that all machines share"
        )
    if resume and found[0]:
        return _resume(trainer, checkpointer.get_checkpoint_file())
    if resume:
        logger.info("No checkpoint in %s: training starts at iteration 0", options.output_dir)
        if comm.is_main_process():  # rows of a run that was killed before its first checkpoint
            drop_rows_from(Path(options.output_dir, "metrics.json"), 0)
    checkpointer.load_weights(options.weights, file=weights)
    trainer.distribute()
    return ResumedRun()


def _resume(trainer: Any, path: str) -> ResumedRun:
    """Restore model, optimizer and loss scale from a checkpoint; return the rest of its state."""
    options = trainer.options
    state = trainer.checkpointer.load_weights(path, complete=True)
    check_training_state(state, path)
    trainer.distribute()  # the moving average starts at the weights that the checkpoint evaluates
    if "shards" in state:
        _load_shards(trainer, Path(path), state["shards"])
    elif trainer.parallel.model is not trainer.model:
        raise CheckpointError(
            f"{path} was saved with SOLVER.PARALLEL ddp: continue with ddp, or start from it as MODEL.WEIGHTS"
        )
    else:
        trainer.model.load_state_dict(state.get("online", {}), strict=False)
        try:
            trainer.optimizer.load_state_dict(state["optimizer"])
        except (KeyError, ValueError) as e:
            raise _mismatch(path, e) from e
    trainer.scaler.load_state_dict(state.get("scaler", {}))
    resumed = ResumedRun(state["iteration"] + 1, state.get("elapsed", 0.0), history=state.get("history", {}))
    resumed.data_order = state.get("data_order", {})
    recorded = True
    if comm.is_main_process():
        metrics = Path(options.output_dir, "metrics.json")
        drop_rows_from(metrics, resumed.start_iter)
        recorded = has_row(metrics, resumed.start_iter - 1) or not _row_is_due(trainer, resumed)
    if not all(comm.all_gather(recorded)):
        resumed.scalars = state.get("scalars", {})
    random_states = state.get("random_states", [])
    if len(random_states) == comm.get_world_size():
        resumed.random_state = random_states[comm.get_rank()]
    else:
        logger.warning(
            "%s was saved by %d processes: the data order continues, dropout and sampling are reseeded",
            path,
            len(random_states),
        )
    if state.get("seed", options.seed) != options.seed:
        logger.warning("%s was trained with SEED %d: the data order changes", path, state["seed"])
    return resumed


def _load_shards(trainer: Any, path: Path, name: str) -> None:
    """Restore the trained weights beside a moving average, and the optimizer's state, from shards."""
    folder, model = shard_folder(path, name), trainer.parallel.model
    own = model.state_dict()
    tensors: dict[str, Tensor] = {f"online.{key}": own[key] for key in shard_sizes(folder, "online.")}
    parameters = dict(model.named_parameters())
    trained = {p for group in trainer.optimizer.param_groups for p in group["params"]}
    for key, size in shard_sizes(folder, "optimizer.").items():
        owner, _, entry = key.rpartition("/")
        parameter = parameters.get(owner)
        if parameter is None or parameter not in trained or size not in (parameter.shape, torch.Size([])):
            raise _mismatch(str(path), ValueError(f"it has a state of {owner}"))
        value = torch.zeros_like(parameter) if size == parameter.shape else torch.zeros(size)
        trainer.optimizer.state[parameter][entry] = tensors[f"optimizer.{key}"] = value.detach()
    try:
        load_shards(folder, tensors)
    except Exception as e:  # torch raises almost anything for damaged shards
        raise CheckpointError(f"cannot resume from {path}: {folder.name} is damaged ({e})") from e


def _mismatch(path: str, reason: Exception) -> CheckpointError:
    return CheckpointError(f"cannot resume from {path}: its optimizer does not match this config ({reason})")


def _named_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the tensors of an optimizer's state as ``<parameter>/<entry>``, e.g. ``head.bias/exp_avg``."""
    names = {p: name for name, p in model.named_parameters()}
    states: dict[Any, dict[str, Any]] = optimizer.state
    return {
        f"{names[p]}/{entry}": value
        for p, state in states.items()
        for entry, value in state.items()
        if isinstance(value, Tensor)
    }


def _row_is_due(trainer: Any, resumed: ResumedRun) -> bool:
    """Return whether metrics are evaluated or written after the last iteration of the resumed run."""
    done = resumed.start_iter
    over: bool = trainer.progress(done, resumed.elapsed) >= 1.0
    return over or trainer.options.row_is_due(done)
