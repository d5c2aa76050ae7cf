"""The training loop."""

import logging
import math
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from clipdense.checkpoint import Checkpoint, CheckpointError
from clipdense.engine.checkpoint import TrainingCheckpointer
from clipdense.engine.clipping import build_clipper, gradient_norms
from clipdense.engine.denormals import flush_denormals
from clipdense.engine.device import images_to_device
from clipdense.engine.distributed import preserved_random_state, set_random_state, share_rows
from clipdense.engine.divergence import divergence, non_finite_values
from clipdense.engine.ema import ModelEMA
from clipdense.engine.hooks import default_hooks, repeat_after_step
from clipdense.engine.interrupt import Interrupt
from clipdense.engine.lock import FolderLock
from clipdense.engine.metrics import restore_metrics
from clipdense.engine.optimizer import keep_frozen_in_eval
from clipdense.engine.options import TrainerOptions
from clipdense.engine.parallel import Replicas, build_parallel
from clipdense.engine.report import write_report
from clipdense.engine.run_config import run_config
from clipdense.engine.training_state import ResumedRun, resume_or_load, save
from clipdense.files import WriteError
from clipdense.open_vocabulary import TrainingStart

from detectron2.config import configurable
from detectron2.engine.train_loop import TrainerBase
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage

__all__ = ["Trainer"]

logger = logging.getLogger(__name__)

# A smaller loss scale means that fp16 gradients overflowed in about 30 consecutive iterations, i.e. that they
# are NaN.
_MIN_LOSS_SCALE = 2.0**-14

Batch = list[dict[str, Any]]


class Trainer(TrainerBase):
    """Trainer for any Detectron2 meta-architecture: ``list[dict]`` in, a dict of scalar losses out.

    An iteration is one optimizer step. Several processes on shares of a batch train like one process on the
    whole batch, provided that the losses are means over images. Detectron2's detectors draw anchors and
    regions at random in each process, and average over the drawn ones: on the same global batch, their losses
    differ as if by another seed, and are equal if everything is drawn. ``Trainer(cfg)`` builds all arguments
    from a yacs config or a LazyConfig (see `clipdense.engine.run_config`).

    Args:
        model: returns a dict of scalar losses in training mode.
        optimizer: its groups have base learning rates, from which ``schedule`` computes the learning rates.
        schedule: (iteration, progress in 0..1, base learning rate of a group) -> learning rate of the group.
        train_loader: number of the first batch -> endless iterable of batches from that one on.
        evaluate: (model, final) -> nested dict of metrics, empty except in the main process; None disables
            evaluation.
        options: all other settings.
        validation_batches: returns the same batches at each call, for the validation loss; None: no loss.

    Attributes:
        model: the model that is evaluated and exported. With FSDP, its trained parameters are there only
            within `evaluated_weights`.
        parallel: the model that is trained, in its distribution over the processes.
        ema: moving average of the weights; None if it is disabled.
        elapsed: seconds of training so far, resumed runs included; equal in all processes.
        elapsed_before: the part of ``elapsed`` that the resumed runs took.
        done: number of finished iterations.
        batch: this process's share of the current batch.
        data_order: see `ResumedRun`.
        finished: whether training has reached its end.
        results: flattened metrics of the last evaluation.
    """

    @configurable
    def __init__(
        self,
        *,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: Callable[[int, float, float], float],
        train_loader: Callable[[int], Iterable[Batch]],
        evaluate: Callable[[nn.Module, bool], dict[str, Any]] | None,
        options: TrainerOptions,
        validation_batches: Callable[[], Iterable[Batch]] | None = None,
    ) -> None:
        super().__init__()
        self.model, self.optimizer, self.schedule, self.options = model, optimizer, schedule, options
        self.device = next(model.parameters()).device
        self.start_iter, self.max_iter = 0, options.max_iter
        self.elapsed = self.elapsed_before = 0.0
        self.finished = False
        self.results: dict[str, float] = {}
        self._dtype = getattr(torch, options.precision)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=options.precision == "float16")
        self.checkpointer = TrainingCheckpointer(
            model, options.output_dir, options.weights_skip, options.allow_pickle, options.checkpoint_keep
        )
        self.parallel: Replicas
        self.ema: ModelEMA | None = None
        self._clip = build_clipper(options.clip_type, options.clip_value, options.clip_norm_type)
        self.train_loader, self.evaluate = train_loader, evaluate
        self.validation_batches, self._stopped_early = validation_batches, False
        self._batches: Iterator[Batch]
        self.batch: Batch = []
        self.data_order: dict[str, int] = {}
        self.resumed = ResumedRun()
        self._interrupt, self._signal = Interrupt(), 0
        self._consistent = True  # False within an optimizer step
        self.register_hooks(default_hooks(self))

    @classmethod
    def from_config(cls, cfg: Any, fetch_weights: bool = True) -> dict[str, Any]:
        """Build the constructor's arguments from a config; see `RunConfig.trainer_arguments`."""
        return run_config(cfg).trainer_arguments(fetch_weights)

    # ---- the loop

    def train(self) -> dict[str, float]:
        """Train from ``start_iter`` to the end, evaluate, and write the report of the run.

        Returns:
            Flattened metrics of the final evaluation; empty except in the main process.

        Raises:
            FloatingPointError: If a loss, a gradient or a weight is NaN or infinite.
            WriteError: If the final checkpoint cannot be written.
            SystemExit: If SIGINT or SIGTERM arrived; a checkpoint is saved first.
        """
        if not hasattr(self, "parallel"):  # it starts from the weights that the model was built with
            self.distribute()
        self.iter = self.done = self._saved = self.start_iter
        with EventStorage(self.start_iter) as self.storage:
            restore_metrics(self.storage, self.resumed.history, self.resumed.scalars)
            try:
                # interrupts before the loader starts its workers, which Ctrl-C reaches as well
                with flush_denormals(), self._interrupt:
                    self.before_train()
                    self._prepare()
                    if self.resumed.scalars:
                        repeat_after_step(self)
                    while self.iter < self.max_iter:
                        self.before_step()
                        self.run_step()
                        self.after_step()
                        self.iter += 1
                        self._stop_if_requested()
                self.finished = True
                logger.info("%s", self._describe_end())
            except Exception as e:
                self._save_after_error(e)
                raise
            finally:
                self._batches = iter(())  # ends the loading processes, which must not outlive the loader
                self.after_train()
        with self.evaluated_weights():
            if comm.is_main_process():
                write_report(self.model, self.options.output_dir, self.results, self.ended_by)
        if comm.is_main_process():
            FolderLock(self.options.output_dir, "OUTPUT_DIR").release()
        return self.results

    @property
    def ended_by(self) -> str:
        """Name of the setting that ends the training at the current iteration."""
        if self._stopped_early:
            return "TEST.EARLY_STOPPING.PATIENCE"
        return "SOLVER.MAX_ITER" if self.done >= self.options.max_iter else "SOLVER.MAX_SECONDS"

    def _describe_end(self) -> str:
        """Describe which setting has ended the training, and how to continue it."""
        text = f"Training ended after {self.done} of {self.options.max_iter} iterations by {self.ended_by}"
        if self.ended_by != "SOLVER.MAX_SECONDS":
            return text
        return (
            f"{text} {self.options.max_seconds:g}. To continue: --resume with a larger SOLVER.MAX_SECONDS, "
            "or 0 for no limit."
        )

    def stop_early(self, done: int) -> None:
        """End the training after ``done`` iterations, with a final checkpoint; every process must call it."""
        self.max_iter, self._stopped_early = done, True
        if self.done > self.start_iter:
            self.save("model_final")

    def progress(self, iteration: int, elapsed: float | None = None) -> float:
        """Return the share of the training (0..1) that ``iteration`` iterations make, or ``elapsed`` seconds.

        Args:
            iteration: number of iterations.
            elapsed: seconds of training; by default those so far.
        """
        cap, seconds = self.options.max_seconds, self.elapsed if elapsed is None else elapsed
        return min(1.0, max(iteration / self.options.max_iter, seconds / cap if cap else 0.0))

    def train_mode(self) -> None:
        """Put the model into training mode, except norms and dropouts of frozen modules."""
        self.parallel.wrapped.train()
        keep_frozen_in_eval(self.parallel.model)

    def _prepare(self) -> None:
        self.train_mode()
        if self.progress(self.start_iter) >= 1.0 or self._stopped_early:
            logger.info("%s holds a finished run", self.options.output_dir)
            self.max_iter = self.start_iter
            return
        if isinstance(self.parallel.model, TrainingStart):
            self.parallel.model.start_training()
        loader = self.train_loader(self.start_iter)
        self.data_order = getattr(getattr(loader, "batch_sampler", None), "order", {})
        if self.resumed.data_order and self.resumed.data_order != self.data_order:
            logger.warning(
                "The run was started with %s and continues with %s: it will see some samples twice in this "
                "epoch, and others not at all",
                self.resumed.data_order,
                self.data_order,
            )
        self._batches = iter(loader)
        if self.resumed.random_state is not None:
            set_random_state(self.resumed.random_state)
        else:  # the number of random values drawn so far depends on the imported modules
            seed_all_rng(self.options.seed + comm.get_rank())
        self._started = time.monotonic() - self.elapsed

    def run_step(self) -> None:
        """Run one iteration: one optimizer step."""
        progress = self.progress(self.iter)
        for group, base_lr in zip(self.optimizer.param_groups, self._base_lrs, strict=True):
            group["lr"] = self.schedule(self.iter, progress, base_lr)
        start = time.perf_counter()
        self.batch = next(self._batches)
        batch = images_to_device(self.batch, self.device)
        data_time = time.perf_counter() - start

        self._consistent = False
        self.optimizer.zero_grad()
        try:
            losses = self._accumulate_gradients(batch)
        except FloatingPointError as e:  # a model's own check; the other processes do not know of it
            raise divergence(self, [str(e)]) from e
        self.scaler.unscale_(self.optimizer)
        trained = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        norms = gradient_norms(trained)
        self._share_metrics(losses, norms.norm(), data_time)
        self._clip(trained, norms)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.ema is not None:
            self.ema.update(self.iter)
        self._consistent, self.done = True, self.iter + 1

        if self.progress(self.done) >= 1.0:
            self.max_iter = self.done

    def _accumulate_gradients(self, batch: Batch) -> dict[str, Tensor]:
        """Accumulate the gradients of the mean loss over the parts of a batch; return the detached losses."""
        size = math.ceil(len(batch) / self.options.accumulation_steps)
        parts = [batch[i : i + size] for i in range(0, len(batch), size)]
        total: dict[str, Tensor] = {}
        for i, part in enumerate(parts):
            with self.parallel.sync(enabled=i + 1 == len(parts)):
                with torch.autocast(self.device.type, self._dtype, enabled=self._dtype != torch.float32):
                    losses = self.parallel.wrapped(part)
                if isinstance(losses, Tensor):
                    losses = {"total_loss": losses}
                losses = {name: loss.float() * (len(part) / len(batch)) for name, loss in losses.items()}
                self.scaler.scale(torch.stack(list(losses.values())).sum()).backward()
            for name, loss in losses.items():
                total[name] = total[name] + loss.detach() if name in total else loss.detach()
        return total

    def _share_metrics(self, losses: dict[str, Tensor], norm: Tensor, data_time: float) -> None:
        """Log the losses of the global batch; agree with the other processes on the time and on stopping.

        It costs one small exchange and one synchronisation with the device per iteration.
        """
        names = sorted(losses)
        measured = torch.stack([*(losses[name] for name in names), norm]).double()
        state = measured.new_tensor([data_time, self._interrupt.signal, time.monotonic() - self._started])
        rows = share_rows(torch.cat([measured, state])).cpu()
        self.elapsed, self._signal = float(rows[0, -1]), int(rows[:, -2].max())

        means = dict(zip(names, rows.mean(0).tolist(), strict=False))
        # with loss scaling, gradients may overflow: the scaler then skips the step
        finite = rows[:, : len(names) + (not self.scaler.is_enabled())].isfinite()
        if not finite.all() or self.scaler.get_scale() < _MIN_LOSS_SCALE:
            own = finite[comm.get_rank()]
            raise non_finite_values(self, means, suspicious=not finite.all() and not bool(own.all()))
        self.storage.put_scalars(total_loss=sum(means.values()), data_time=float(rows[:, -3].max()))
        if len(means) > 1:
            self.storage.put_scalars(**means)
        if rows[0, len(names)].isfinite():
            self.storage.put_scalar("grad_norm", float(rows[0, len(names)]))
        lr = max(group["lr"] for group in self.optimizer.param_groups)
        self.storage.put_scalar("lr", lr, smoothing_hint=False)

    # ---- faults

    def _stop_if_requested(self) -> None:
        # with several processes, use the signal that all of them have agreed on
        number = self._interrupt.signal if comm.get_world_size() == 1 else self._signal
        if not number:
            return
        if self._saved < self.done:
            self.save(f"model_{self.done - 1:07d}")
        comm.synchronize()  # torchrun ends all processes when one ends: wait until the checkpoint is saved
        logger.warning(
            "Stopped by %s after %d iterations; --resume continues.", signal.Signals(number).name, self.done
        )
        raise SystemExit(128 + number)

    def _save_after_error(self, error: Exception) -> None:
        """Save a checkpoint if an error occurred between two iterations (in data loading or evaluation)."""
        if isinstance(error, (CheckpointError, WriteError)) or not self._consistent:
            return
        # with several processes, saving needs all of them, and the others may wait elsewhere
        if comm.get_world_size() == 1 and self._saved < self.done:
            logger.error("%s: %s. Saving a checkpoint before exiting.", type(error).__name__, error)
            self.save(f"model_{self.done - 1:07d}")

    # ---- evaluation

    def test(self) -> dict[str, Any]:
        """Evaluate the current weights, or their average; training is not affected.

        Returns:
            Nested dict of metrics; empty except in the main process. ``results`` keeps the flattened ones.
        """
        if self.evaluate is None:
            return {}
        with preserved_random_state(), self.evaluated_weights():
            results = self.evaluate(self.model, self.finished)
        self.train_mode()
        self.results = {name: float(value) for name, value in flatten_results_dict(results).items()}
        best = self.options.best_metric
        if best and results and best not in self.results and not best.startswith("validation/"):
            logger.error(
                "TEST.BEST_METRIC %r is not among the metrics: %s",
                best,
                ", ".join(name for name in sorted(self.results) if "-" not in name),
            )
        return results

    @contextmanager
    def evaluated_weights(self) -> Iterator[None]:
        """Give ``model`` the weights to evaluate, trained or averaged; every process must enter it."""
        with self.ema.applied() if self.ema is not None else nullcontext(), self.parallel.whole_model():
            yield

    # ---- checkpoints

    def save(self, name: str) -> None:
        """Write ``<name>.pth``; see `clipdense.engine.training_state.save`. Every process must call it."""
        save(self, name)
        self._saved = self.done

    def resume_or_load(self, resume: bool = True, weights: Checkpoint | None = None) -> None:
        """Resume or start the run, and distribute the model; see `training_state.resume_or_load`.

        Args:
            resume: whether to look for a checkpoint. Without one, training starts at iteration 0.
            weights: content of the weight file, if it has been read already.
        """
        self.resumed = resume_or_load(self, resume, weights)
        self.start_iter = self.resumed.start_iter
        self.elapsed = self.elapsed_before = self.resumed.elapsed

    def distribute(self) -> None:
        """Distribute the model, which holds its initial weights, over the processes; build its average."""
        self.parallel = build_parallel(self.model, self.optimizer, self.options)
        self.ema = ModelEMA(self.parallel.model, self.options.ema_decay) if self.options.ema_decay else None
        self._base_lrs = [group["lr"] for group in self.optimizer.param_groups]
