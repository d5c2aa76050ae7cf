"""The one training loop."""

import inspect
import json
import logging
import math
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from clipdense.checkpoint import CheckpointError
from clipdense.engine.checkpoint import TrainingCheckpointer
from clipdense.engine.distributed import preserved_random_state, random_state, set_random_state, share_rows
from clipdense.engine.ema import ModelEMA
from clipdense.engine.hooks import default_hooks
from clipdense.engine.interrupt import Interrupt
from clipdense.engine.optimizer import build_clipper, keep_frozen_in_eval
from clipdense.engine.options import TrainerOptions
from clipdense.engine.output import prepare_output_dir
from clipdense.engine.report import write_report
from clipdense.engine.run_config import run_config
from clipdense.files import WriteError, write_text

from detectron2.config import configurable
from detectron2.engine.train_loop import TrainerBase
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage

__all__ = ["Trainer", "distribute"]

logger = logging.getLogger(__name__)

# Below it, fp16 gradients have overflowed in some thirty iterations on end: they are NaN, not large.
_LEAST_SCALE = 2.0**-14

# Detectron2's writers take the median of this many values.
_SMOOTHING = 20

Batch = list[dict[str, Any]]


class Trainer(TrainerBase):
    """Trains any Detectron2 meta-architecture: ``list[dict]`` in, a dict of scalar losses out.

    An iteration is one optimizer step. It does the same in one process on a batch as in several on its
    shares, provided that the losses are means over images. ``Trainer(cfg)`` builds all arguments from a yacs
    config or a LazyConfig (see `clipdense.engine.run_config`).

    Args:
        model: returns a dict of scalar losses in training mode.
        optimizer: the learning rates of its groups are what ``schedule`` multiplies.
        schedule: (iteration, progress in 0..1) -> multiplier.
        train_loader: number of the first batch -> endless iterable of batches from that one on.
        evaluate: (model, final) -> nested dict of metrics, empty but in the main process; None for no
            evaluation.
        options: everything else.

    Attributes:
        ema: `ModelEMA`, or None.
        elapsed: seconds of training so far, all resumed parts together; the same in every process.
        elapsed_before: the part of it that earlier processes spent.
        results: flattened metrics of the last evaluation.
    """

    @configurable
    def __init__(
        self,
        *,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: Callable[[int, float], float],
        train_loader: Callable[[int], Iterable[Batch]],
        evaluate: Callable[[nn.Module, bool], dict[str, Any]] | None,
        options: TrainerOptions,
    ) -> None:
        super().__init__()
        self.model, self.optimizer, self.schedule, self.options = model, optimizer, schedule, options
        self.device = next(model.parameters()).device
        self.start_iter, self.max_iter = 0, options.max_iter
        self.elapsed = self.elapsed_before = 0.0
        self.results: dict[str, float] = {}
        self._dtype = getattr(torch, options.precision)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=options.precision == "float16")
        self.checkpointer = TrainingCheckpointer(
            model, options.output_dir, options.weights_skip, options.allow_pickle, options.checkpoint_keep
        )
        self._ddp = distribute(model, options.find_unused_parameters)
        self.ema = ModelEMA(model, options.ema_decay) if options.ema_decay else None
        self._clip = build_clipper(options.clip_type, options.clip_value, options.clip_norm_type)
        self._base_lrs = [group["lr"] for group in optimizer.param_groups]
        self._train_loader, self._evaluate = train_loader, evaluate
        self._batches: Iterator[Batch]
        self._random_state: dict[str, Any] | None = None
        self._history: dict[str, list[tuple[float, float]]] = {}
        self._interrupt, self._signal = Interrupt(), 0
        self._consistent = True  # whether model and optimizer are as some iteration left them
        self.register_hooks(default_hooks(options))

    @classmethod
    def from_config(cls, cfg: Any) -> dict[str, Any]:
        """Constructor arguments from a yacs config or a LazyConfig."""
        return run_config(cfg).trainer_arguments()

    # ---- the loop

    def train(self) -> dict[str, float]:
        """Train from ``start_iter`` to the end, evaluate, and write what a finished run leaves.

        Returns:
            Flattened metrics of the final evaluation (main process).

        Raises:
            FloatingPointError: a loss or a gradient became NaN or infinite.
            CheckpointError: the final checkpoint cannot be written.
            SystemExit: SIGINT or SIGTERM arrived; a checkpoint was saved first.
        """
        self.iter = self._done = self._saved = self.start_iter
        with EventStorage(self.start_iter) as self.storage:
            for name, values in self._history.items():
                for value, iteration in values:
                    self.storage.histories()[name].update(value, iteration)
            try:
                with self._interrupt:  # before the loader forks its workers, which Ctrl-C reaches as well
                    self.before_train()
                    self._prepare()
                    while self.iter < self.max_iter:
                        self.before_step()
                        self.run_step()
                        self.after_step()
                        self.iter += 1
                        self._stop_if_asked()
                self.storage.iter = self.iter
                self.test(final=True)
            except Exception as e:
                self._rescue(e)
                raise
            finally:
                self.after_train()
        if comm.is_main_process():
            with self._evaluated_weights():
                write_report(self.model, self.options.output_dir, self.results)
        return self.results

    def progress(self, iteration: int) -> float:
        """Share of the training that is done (0..1) after ``iteration`` iterations, at the present time."""
        cap = self.options.max_seconds
        return min(1.0, max(iteration / self.options.max_iter, self.elapsed / cap if cap else 0.0))

    def train_mode(self) -> None:
        """Training mode, but for norms and dropouts of frozen modules."""
        self._ddp.train()
        keep_frozen_in_eval(self.model)

    def _prepare(self) -> None:
        self.train_mode()
        if self.progress(self.start_iter) >= 1.0:
            logger.info("Nothing left to train: %s holds a finished run", self.options.output_dir)
            self.max_iter = self.start_iter
            return
        self._batches = iter(self._train_loader(self.start_iter))
        if self._random_state is not None:
            set_random_state(self._random_state)
        else:  # how much was drawn so far depends on what this process has imported
            seed_all_rng(self.options.seed + comm.get_rank())
        self._started = time.monotonic() - self.elapsed

    def run_step(self) -> None:
        """One iteration."""
        factor = self.schedule(self.iter, self.progress(self.iter))
        for group, base_lr in zip(self.optimizer.param_groups, self._base_lrs, strict=True):
            group["lr"] = base_lr * factor
        start = time.perf_counter()
        batch = next(self._batches)
        data_time = time.perf_counter() - start

        self._consistent = False
        self.optimizer.zero_grad()
        losses = self._accumulate_gradients(batch)
        self.scaler.unscale_(self.optimizer)
        trained = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack(torch._foreach_norm([p.grad for p in trained])).norm()
        self._share_metrics(losses, norm, data_time, batch)
        self._clip(trained)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.ema is not None:
            self.ema.update(self.iter)
        self._consistent, self._done = True, self.iter + 1

        if self.progress(self._done) >= 1.0:
            self.max_iter = self._done

    def _accumulate_gradients(self, batch: Batch) -> dict[str, Tensor]:
        """Gradients of the mean loss over ``batch``, part by part; returns the terms of the loss."""
        size = math.ceil(len(batch) / self.options.accumulation_steps)
        parts = [batch[i : i + size] for i in range(0, len(batch), size)]
        total: dict[str, Tensor] = {}
        for i, part in enumerate(parts):
            with self._sync(at_backward=i + 1 == len(parts)):
                with torch.autocast(self.device.type, self._dtype, enabled=self._dtype != torch.float32):
                    terms = self._ddp(part)
                if isinstance(terms, Tensor):
                    terms = {"total_loss": terms}
                terms = {name: term.float() * (len(part) / len(batch)) for name, term in terms.items()}
                self.scaler.scale(torch.stack(list(terms.values())).sum()).backward()
            for name, term in terms.items():
                total[name] = total[name] + term.detach() if name in total else term.detach()
        return total

    def _sync(self, at_backward: bool) -> AbstractContextManager[None]:
        if at_backward or not isinstance(self._ddp, DistributedDataParallel):
            return nullcontext()
        return self._ddp.no_sync()

    def _share_metrics(self, losses: dict[str, Tensor], norm: Tensor, data_time: float, batch: Batch) -> None:
        """Log the losses of the global batch; agree with the other processes on the time and on stopping.

        One small exchange, and one wait for the device, an iteration.
        """
        names = sorted(losses)
        measured = torch.stack([*(losses[name] for name in names), norm]).double()
        told = measured.new_tensor([data_time, self._interrupt.signal, time.monotonic() - self._started])
        rows = share_rows(torch.cat([measured, told])).cpu()
        self.elapsed, self._signal = float(rows[0, -1]), int(rows[:, -2].max())

        # under loss scaling an overflow of the gradients is expected; the scaler skips that step
        checked = rows[:, : len(names) + (not self.scaler.is_enabled())].isfinite()
        if not checked.all() or self.scaler.get_scale() < _LEAST_SCALE:
            values = dict(zip(names, rows.mean(0).tolist(), strict=False))
            raise FloatingPointError(
                self._describe_non_finite(values, batch, bool(checked[comm.get_rank()].all()))
            )

        means = dict(zip(names, rows.mean(0).tolist(), strict=False))
        self.storage.put_scalars(total_loss=sum(means.values()), data_time=float(rows[:, -3].max()))
        if len(means) > 1:
            self.storage.put_scalars(**means)
        if rows[0, len(names)].isfinite():
            self.storage.put_scalar("grad_norm", float(rows[0, len(names)]))
        lr = max(group["lr"] for group in self.optimizer.param_groups)
        self.storage.put_scalar("lr", lr, smoothing_hint=False)

    # ---- faults

    def _describe_non_finite(self, losses: dict[str, float], batch: Batch, fine_here: bool) -> str:
        bad = [f"{name} = {value}" for name, value in losses.items() if not math.isfinite(value)]
        if not bad:
            gradients = [
                n
                for n, p in self.model.named_parameters()
                if p.grad is not None and not p.grad.isfinite().all()
            ]
            bad = [f"the gradient of {name}" for name in gradients[:10]] + ["..."] * (len(gradients) > 10)
        mine = [] if fine_here else [str(x.get("file_name", x.get("image_id", "?"))) for x in batch]
        images = [name for names in comm.all_gather(mine) for name in names]
        last = self.checkpointer.get_checkpoint_file() if self.checkpointer.has_checkpoint() else "none yet"
        return (
            f"NaN or infinite at iteration {self.iter}: {', '.join(bad)}\n"
            f"All terms: {', '.join(f'{name} = {value:.6g}' for name, value in losses.items())}\n"
            f"Images of the batch: {', '.join(images)}\n"
            f"Training stopped before this update; the last checkpoint is {last}. Check these images "
            "and their annotations, or lower SOLVER.BASE_LR, or set SOLVER.CLIP_GRADIENTS.ENABLED True."
        )

    def _stop_if_asked(self) -> None:
        # a signal that came after the last exchange is known to this process alone
        number = self._interrupt.signal if comm.get_world_size() == 1 else self._signal
        if not number:
            return
        if self._saved < self._done:
            self.save(f"model_{self._done - 1:07d}")
        comm.synchronize()  # a process that ends makes torchrun end the others: not while one is saving
        logger.warning(
            "Stopped by %s after %d iterations; --resume goes on.", signal.Signals(number).name, self._done
        )
        raise SystemExit(128 + number)

    def _rescue(self, error: Exception) -> None:
        """When something fails between two iterations (data, evaluation), save what was trained so far."""
        if (
            isinstance(error, (CheckpointError, WriteError))
            or not self._consistent
            or self._saved >= self._done
        ):
            return
        if comm.get_world_size() == 1:  # the other processes are elsewhere, and saving is a joint effort
            logger.error("%s: %s. Saving a checkpoint before giving up.", type(error).__name__, error)
            self.save(f"model_{self._done - 1:07d}")

    # ---- evaluation

    def test(self, final: bool = False) -> dict[str, float]:
        """Evaluate the current weights (their average, if there is one); training is not affected.

        Returns:
            Flattened metrics, empty but in the main process; also left in ``results``.
        """
        if self._evaluate is None:
            return {}
        with preserved_random_state(), self._evaluated_weights():
            results = self._evaluate(self.model, final)
        self.train_mode()
        self.results = {name: float(value) for name, value in flatten_results_dict(results).items()}
        self.storage.put_scalars(**self.results, smoothing_hint=False)
        comm.synchronize()
        return self.results

    def _evaluated_weights(self) -> AbstractContextManager[None]:
        return self.ema.applied() if self.ema is not None else nullcontext()

    # ---- checkpoints

    def save(self, name: str) -> None:
        """Write ``<name>.pth``, from which training can go on exactly; every process must call it.

        Its ``model`` are the weights that are evaluated. With an average of weights, ``online`` holds the
        trained ones.
        """
        random_states = comm.gather(random_state())
        model = self.model.state_dict()
        if self.ema is not None:
            model = {**model, **self.ema.average}
        self.checkpointer.save(
            name,
            model=model,
            online=self.ema.online_state() if self.ema is not None else {},
            optimizer=self.optimizer.state_dict(),
            scaler=self.scaler.state_dict(),
            iteration=self._done - 1,
            elapsed=self.elapsed,
            seed=self.options.seed,
            random_states=random_states,
            history=self._recent_history(),
            metadata=self.options.metadata,
        )
        self._saved = self._done

    def _recent_history(self) -> dict[str, list[tuple[float, float]]]:
        """What the writers smooth over: the last values of each scalar, with their iterations."""
        smoothed = [name for name, smooth in self.storage.smoothing_hints().items() if smooth]
        return {name: self.storage.history(name).values()[-_SMOOTHING:] for name in smoothed}

    def save_best(self, metric: str, value: float) -> None:
        """Write the evaluated weights as ``model_best.pth`` (main process)."""
        with self._evaluated_weights():
            self.checkpointer.save(
                "model_best", tag=False, iteration=self._done - 1, metadata=self.options.metadata
            )
        record = json.dumps({"metric": metric, "value": value, "iteration": self._done - 1})
        write_text(Path(self.options.output_dir, "model_best.json"), record)

    def resume_or_load(self, resume: bool = True) -> None:
        """Continue from the last checkpoint in the output folder, or begin from ``MODEL.WEIGHTS``.

        What an earlier run left in the output folder is moved to a subfolder unless it is resumed.

        Args:
            resume: whether to look for a checkpoint; without one, or with False, training begins at iteration
                0.

        Raises:
            FileNotFoundError, CheckpointError: see `TrainingCheckpointer.load_weights`.
        """
        if comm.is_main_process():
            prepare_output_dir(self.options.output_dir, keep=resume, weights=self.options.weights)
            self.checkpointer.remove_leftovers()
        comm.synchronize()
        seen = comm.all_gather(self.checkpointer.has_checkpoint())
        if resume and len(set(seen)) > 1:
            raise CheckpointError(
                f"only some processes see the checkpoint in {self.options.output_dir}: "
                "resuming needs a folder that all machines share"
            )
        if not (resume and seen[0]):
            if resume:
                logger.info("No checkpoint in %s: training begins at iteration 0", self.options.output_dir)
            self.checkpointer.load_weights(self.options.weights)
            if self.ema is not None:
                self.ema.load(self.model.state_dict())
            return
        path = self.checkpointer.get_checkpoint_file()
        state = self.checkpointer.load_weights(path, complete=True)
        if self.ema is not None:
            self.ema.load(self.model.state_dict())
        self.model.load_state_dict(state.get("online", {}), strict=False)
        try:
            self.optimizer.load_state_dict(state["optimizer"])
        except (KeyError, ValueError) as e:
            raise CheckpointError(
                f"cannot resume from {path}: its optimizer is not the one of this config ({e})"
            ) from e
        self.scaler.load_state_dict(state.get("scaler", {}))
        self.start_iter = state["iteration"] + 1
        self.elapsed = self.elapsed_before = state.get("elapsed", 0.0)
        self._history = state.get("history", {})
        random_states = state.get("random_states", [])
        if len(random_states) == comm.get_world_size():
            self._random_state = random_states[comm.get_rank()]
        else:
            logger.warning(
                "%s was saved by %d processes: the data order continues, dropout and sampling start afresh",
                path,
                len(random_states),
            )
        if state.get("seed", self.options.seed) != self.options.seed:
            logger.warning("%s was trained with SEED %d: the data order changes", path, state["seed"])


def distribute(model: nn.Module, find_unused_parameters: bool = False) -> nn.Module:
    """``model`` itself in a single process, else wrapped so that gradients are averaged over processes."""
    if comm.get_world_size() == 1:
        return model
    device = next(model.parameters()).device
    known = inspect.signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    sync_buffers: dict[str, Any] = {name: False}
    return DistributedDataParallel(
        model,
        device_ids=[device.index] if device.type == "cuda" else None,
        find_unused_parameters=find_unused_parameters,
        **sync_buffers,
    )
