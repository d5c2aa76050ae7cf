"""Detectron2's PointRend, DeepLab and Panoptic-DeepLab on CLIP: plain Detectron2 training plus two lines.

python projects/PlugIn/train_net.py --config-file projects/PlugIn/configs/point_rend.yaml SOLVER.MAX_ITER 1000
"""

import argparse
from typing import Any

import torch

import clipdense  # (1) registers backbones, meta-architectures and datasets
from clipdense.engine.optimizer import build_optimizer
from clipdense.evaluation import build_evaluator
from clipdense.run.config_file import merge_config_file

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetMapper, build_detection_train_loader
from detectron2.engine import DefaultTrainer, default_argument_parser, default_setup, launch
from detectron2.projects.panoptic_deeplab import PanopticDeeplabDatasetMapper, add_panoptic_deeplab_config
from detectron2.projects.point_rend import add_pointrend_config


class Trainer(DefaultTrainer):
    """Detectron2's, with Panoptic-DeepLab's mapper for its models."""

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Any:
        """Batches of ``DATASETS.TRAIN``."""
        if "PanopticDeepLab" in (cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.PIXEL_TEXT.BASE):
            return build_detection_train_loader(cfg, mapper=PanopticDeeplabDatasetMapper(cfg))
        return build_detection_train_loader(cfg, mapper=DatasetMapper(cfg, is_train=True))

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: torch.nn.Module) -> torch.optim.Optimizer:
        """What ``SOLVER.OPTIMIZER`` and ``SOLVER.PARAM_GROUPS`` say."""
        return build_optimizer(cfg, model)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> Any:
        """The one of the dataset's kind."""
        return build_evaluator(cfg, dataset_name)


def setup(args: argparse.Namespace) -> CfgNode:
    """The projects' keys, clipdense's keys, the file, the command line."""
    cfg = get_cfg()
    add_pointrend_config(cfg)
    add_panoptic_deeplab_config(cfg)  # and DeepLab's
    clipdense.add_clipdense_config(cfg)  # (2) adds its keys
    merge_config_file(cfg, args.config_file)
    cfg.merge_from_list(args.opts)
    cfg.freeze()
    default_setup(cfg, args)
    return cfg


def main(args: argparse.Namespace) -> dict[str, Any] | None:
    """Train, or with ``--eval-only`` evaluate ``MODEL.WEIGHTS`` and return its metrics."""
    cfg = setup(args)
    if args.eval_only:
        model = Trainer.build_model(cfg)
        DetectionCheckpointer(model, cfg.OUTPUT_DIR).resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
        return Trainer.test(cfg, model)
    trainer = Trainer(cfg)
    trainer.resume_or_load(args.resume)
    return trainer.train()


if __name__ == "__main__":
    arguments = default_argument_parser().parse_args()
    launch(main, arguments.num_gpus, dist_url="auto", args=(arguments,))
