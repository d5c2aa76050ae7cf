"""The one training loop."""

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.data import build_detection_train_loader
from detectron2.engine import hooks
from detectron2.engine.train_loop import SimpleTrainer, TrainerBase
from detectron2.engine.defaults import default_writers
from detectron2.modeling import build_model
from detectron2.utils import comm
from torch.nn.parallel import DistributedDataParallel

from clipdense.engine.optimizer import build_optimizer
from clipdense.engine.schedule import build_schedule

__all__ = ["Trainer"]


def build_train_loader(cfg: CfgNode, start_iter: int) -> Any:
    mapper = None
    try:
        from clipdense.data.mappers import MAPPER_REGISTRY

        mapper = MAPPER_REGISTRY.get(cfg.INPUT.MAPPER)(cfg, True)
    except (ImportError, AttributeError):
        pass
    return build_detection_train_loader(cfg, mapper=mapper)


class Trainer(TrainerBase):
    def __init__(self, cfg: CfgNode) -> None:
        super().__init__()
        self.cfg = cfg
        self.model = build_model(cfg)
        self.optimizer = build_optimizer(cfg, self.model)
        self.schedule = build_schedule(cfg)
        self.start_iter, self.max_iter = 0, cfg.SOLVER.MAX_ITER
        self.checkpointer = DetectionCheckpointer(
            self.model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self), optimizer=self.optimizer
        )
        self._forward = (
            DistributedDataParallel(self.model, broadcast_buffers=False) if comm.get_world_size() > 1 else self.model
        )
        self._base_lrs = [g["lr"] for g in self.optimizer.param_groups]
        self._batches: Iterator[list[dict[str, Any]]]
        self.register_hooks([hooks.IterationTimer()])
        if comm.is_main_process():
            self.register_hooks(
                [
                    hooks.PeriodicCheckpointer(self.checkpointer, cfg.SOLVER.CHECKPOINT_PERIOD),
                    hooks.PeriodicWriter(default_writers(cfg.OUTPUT_DIR, self.max_iter), period=20),
                ]
            )

    def resume_or_load(self, resume: bool = True) -> None:
        self.checkpointer.resume_or_load(self.cfg.MODEL.WEIGHTS, resume=resume)
        if resume and self.checkpointer.has_checkpoint():
            self.start_iter = self.iter + 1

    def train(self) -> None:
        self.model.train()
        self._batches = iter(build_train_loader(self.cfg, self.start_iter))
        super().train(self.start_iter, self.max_iter)
        if comm.is_main_process() and hasattr(self.model, "export_state"):
            from safetensors.torch import save_file

            state, metadata = self.model.export_state()
            save_file(state, f"{self.cfg.OUTPUT_DIR}/export.safetensors", metadata)

    def run_step(self) -> None:
        factor = self.schedule(self.iter, self.iter / self.max_iter)
        for group, lr in zip(self.optimizer.param_groups, self._base_lrs):
            group["lr"] = lr * factor
        data = next(self._batches)
        losses = self._forward(data)
        self.optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        SimpleTrainer.write_metrics(losses, 0.0)
        self.storage.put_scalar("lr", max(g["lr"] for g in self.optimizer.param_groups), smoothing_hint=False)
        self.optimizer.step()
