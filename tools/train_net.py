"""Train or evaluate any model of clipdense or Detectron2.

    python tools/train_net.py --config-file configs/shapes/mask_rcnn_clip_rn.yaml SOLVER.MAX_ITER 1000
    torchrun --nproc-per-node 2 tools/train_net.py --config-file ... MODEL.DEVICE cpu
"""

import argparse

import clipdense  # noqa: F401  (registers datasets and models)
from detectron2.config import get_cfg
from detectron2.engine import default_argument_parser, default_setup

from clipdense.config import add_clipdense_config
from clipdense.engine.launch import launch
from clipdense.engine.trainer import Trainer


def main(args: argparse.Namespace) -> None:
    cfg = get_cfg()
    add_clipdense_config(cfg)
    cfg.merge_from_file(args.config_file)
    cfg.merge_from_list(args.opts)
    cfg.freeze()
    default_setup(cfg, args)
    trainer = Trainer(cfg)
    trainer.resume_or_load(args.resume)
    trainer.train()


if __name__ == "__main__":
    args = default_argument_parser().parse_args()
    launch(main, args.num_gpus, args.num_machines, args.machine_rank, args.dist_url, args=(args,))
