"""The toy run of `engine_toy.toy_config` as a LazyConfig."""

import torch
from fvcore.common.param_scheduler import CosineParamScheduler

from tests.helpers.engine_toy import ToyEvaluator, ToyNet, lazy_test_loader, lazy_train_loader

from detectron2.config import LazyCall as L
from detectron2.solver.build import get_default_optimizer_params

model = L(ToyNet)(dropout=0.0)
optimizer = L(torch.optim.AdamW)(
    params=L(get_default_optimizer_params)(base_lr=0.01, weight_decay_norm=0.0), lr=0.01, weight_decay=1e-4
)
lr_multiplier = L(CosineParamScheduler)(start_value=1.0, end_value=0.0)
dataloader = {
    "train": L(lazy_train_loader)(batch_size=4, seed=1),
    "test": L(lazy_test_loader)(),
    "evaluator": L(ToyEvaluator)(),
}
train = {
    "output_dir": "output",
    "init_checkpoint": "",
    "max_iter": 8,
    "amp": {"enabled": False},
    "ddp": {"find_unused_parameters": False},
    "checkpointer": {"period": 5, "max_to_keep": 10},
    "eval_period": 4,
    "log_period": 1,
    "device": "cpu",
    "seed": 1,
    "ema_decay": 0.9,
}
