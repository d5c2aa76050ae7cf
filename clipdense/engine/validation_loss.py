"""Loss on validation data, measured like the training loss without any effect on the training."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from clipdense.data.checks import dataset_classes
from clipdense.data.loader import build_train_loader
from clipdense.engine.distributed import preserved_random_state, share_rows
from clipdense.engine.options import ConfigError

from detectron2.config import CfgNode
from detectron2.engine.train_loop import HookBase
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage

__all__ = [
    "ValidationLoss",
    "build_validation_batches",
    "check_loss_classes",
    "loss_datasets",
    "loss_mode",
    "mean_losses",
]

logger = logging.getLogger(__name__)

Batches = Iterable[list[dict[str, Any]]]

_RANDOM = ("Drop", "StochasticDepth")
"""Parts of the names of layers that leave something out at random: Dropout, DropPath, PatchDropout ..."""


class ValidationLoss(HookBase):
    """Logs ``validation/total_loss`` and ``validation/<loss>`` every ``period`` iterations and at the end.

    Args:
        period: iterations between two measurements, at least 1.
        batches: returns the same batches at each call, as many in every process.
    """

    def __init__(self, period: int, batches: Callable[[], Batches]) -> None:
        self.period, self._batches = period, batches

    def after_step(self) -> None:
        """Measure the loss if it is due; the last iteration is left to `after_train`."""
        done = self.trainer.iter + 1
        if done % self.period == 0 and done < self.trainer.max_iter:
            self._measure()

    def after_train(self) -> None:
        """Measure the loss of the trained model."""
        if self.trainer.finished:
            self._measure()

    def _measure(self) -> None:
        trainer = self.trainer
        precision = getattr(torch, trainer.options.precision)
        with trainer.evaluated_weights():
            losses = mean_losses(trainer.model, self._batches(), precision, trainer.options.seed)
        trainer.train_mode()
        named = {f"validation/{name}": value for name, value in losses.items()}
        trainer.storage.put_scalars(smoothing_hint=False, **named)
        if comm.is_main_process():
            trainer.results = {**trainer.results, **named}
        logger.info("Validation: %s", "  ".join(f"{name} {value:.4g}" for name, value in losses.items()))


def loss_datasets(cfg: CfgNode) -> list[str]:
    """Return the names of the datasets of the validation loss; empty if it is not measured."""
    return list(cfg.TEST.LOSS.DATASETS or cfg.DATASETS.TEST) if cfg.TEST.LOSS.PERIOD else []


def check_loss_classes(cfg: CfgNode) -> None:
    """Check that the validation loss is measured on data with the classes of the training data.

    Raises:
        ConfigError: If there is no dataset, or its classes differ; names it.
    """
    if not cfg.TEST.LOSS.PERIOD:
        return
    if not loss_datasets(cfg):
        raise ConfigError("TEST.LOSS.PERIOD needs datasets: set TEST.LOSS.DATASETS or DATASETS.TEST")
    first = cfg.DATASETS.TRAIN[0]
    for name in loss_datasets(cfg):
        if any(dataset_classes(name, kind) != dataset_classes(first, kind) for kind in ("thing", "stuff")):
            raise ConfigError(
                f"the validation loss on {name} needs the classes of {first}, on which the model is trained; "
                "name a dataset with the same classes in TEST.LOSS.DATASETS, or set TEST.LOSS.PERIOD 0"
            )


def build_validation_batches(cfg: CfgNode, masks_optional: bool = False) -> Callable[[], Batches] | None:
    """Build what gives the batches of the validation loss, the same ones at each call.

    They are mapped as in training, with the augmentation of the same seed each time. Every image is used
    once; the last batch may be filled up with images that were used.

    Args:
        cfg: reads TEST.LOSS.*, DATASETS.TEST, SOLVER.IMS_PER_BATCH, INPUT.*, DATALOADER.*, SEED.
        masks_optional: see `build_train_loader`.

    Returns:
        Function without arguments; None if ``TEST.LOSS.PERIOD`` is 0.
    """
    names = loss_datasets(cfg)
    if not names:
        return None
    cfg = cfg.clone()
    cfg.defrost()
    cfg.DATASETS.TRAIN, cfg.DATALOADER.SAMPLER_TRAIN = names, "TrainingSampler"
    cfg.DATALOADER.ASPECT_RATIO_GROUPING = False  # would use some images later than others
    cfg.freeze()

    @cache
    def loader() -> Any:  # at the first use: a resumed run may have ended
        return build_train_loader(cfg, seed=cfg.SEED, masks_optional=masks_optional)

    def batches() -> Batches:
        count = -(-len(loader().dataset) // cfg.SOLVER.IMS_PER_BATCH)
        return islice(loader(), min(count, cfg.TEST.LOSS.MAX_BATCHES or count))

    return batches


def mean_losses(
    model: nn.Module, batches: Batches, precision: torch.dtype = torch.float32, seed: int = 0
) -> dict[str, float]:
    """Compute the mean losses of a model on batches; neither the model nor the random state is changed.

    Norms use their running statistics and nothing is dropped out. What the model draws at random (anchors,
    regions, points) is drawn from the seed, so that two measurements differ by the weights alone.

    Args:
        model: returns a dict of scalar losses in training mode.
        batches: of this process; every process needs the same number of them.
        precision: data type of autocast; float32 for none.
        seed: of the random values.

    Returns:
        ``total_loss`` and, if there are several, each loss: means over the images of all processes.
    """
    device = next(model.parameters()).device
    total: dict[str, Tensor] = {}
    count = 0
    with preserved_random_state(), loss_mode(model), torch.no_grad(), EventStorage():
        seed_all_rng(seed + comm.get_rank())
        for batch in batches:
            with torch.autocast(device.type, precision, enabled=precision != torch.float32):
                losses = model(batch)
            losses = {"total_loss": losses} if isinstance(losses, Tensor) else losses
            for name, loss in losses.items():
                total[name] = total.get(name, 0) + loss.double() * len(batch)
            count += len(batch)
    names = sorted(total)
    row = torch.stack([*(total[name] for name in names), torch.tensor(count, device=device).double()])
    *sums, images = share_rows(row).sum(0).tolist()
    means = {name: value / images for name, value in zip(names, sums, strict=True)}
    return {"total_loss": sum(means.values()), **(means if len(means) > 1 else {})}


@contextmanager
def loss_mode(model: nn.Module) -> Iterator[None]:
    """Make a model return losses while its norms and dropouts work as in evaluation.

    At the end every module has its mode, buffers and plain attributes again: some detectors keep running
    means of their own, which a forward in training mode moves.
    """
    modules = list(model.modules())
    modes = [module.training for module in modules]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    attributes = [_plain_attributes(module) for module in modules]
    try:
        model.train()
        for module in modules:
            random = any(part in type(module).__name__ for part in _RANDOM)
            if random or isinstance(module, (nn.modules.batchnorm._NormBase, nn.MultiheadAttention)):
                module.eval()
            if isinstance(module, nn.modules.dropout._DropoutNd):
                module.p = 0.0  # attention layers read it while they are in training mode
        yield
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        for module, mode, plain in zip(modules, modes, attributes, strict=True):
            for name in _plain_attributes(module).keys() - plain.keys():
                delattr(module, name)
            module.__dict__.update(plain)
            module.training = mode


def _plain_attributes(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if type(value) in (int, float)}
