"""Optimizers with parameter groups."""

import torch
from detectron2.config import CfgNode
from detectron2.solver.build import get_default_optimizer_params
from torch import nn

__all__ = ["build_optimizer"]


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer that ``SOLVER.OPTIMIZER`` names, over the trainable parameters of ``model``.

    Raises:
        ValueError: an unknown optimizer, with the known ones.
    """
    s = cfg.SOLVER
    groups = get_default_optimizer_params(
        model,
        base_lr=s.BASE_LR,
        weight_decay=s.WEIGHT_DECAY,
        weight_decay_norm=s.WEIGHT_DECAY_NORM,
        bias_lr_factor=s.BIAS_LR_FACTOR,
        weight_decay_bias=s.WEIGHT_DECAY_BIAS,
    )
    if s.OPTIMIZER == "SGD":
        return torch.optim.SGD(groups, s.BASE_LR, momentum=s.MOMENTUM, nesterov=s.NESTEROV)
    if s.OPTIMIZER == "AdamW":
        return torch.optim.AdamW(groups, s.BASE_LR, betas=tuple(s.BETAS), eps=s.EPS)
    raise ValueError(f"SOLVER.OPTIMIZER {s.OPTIMIZER!r} is none of SGD, AdamW")
