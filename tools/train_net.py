"""Train or evaluate any model of clipdense or Detectron2.

python tools/train_net.py --config-file configs/shapes/mask_rcnn_clip_rn.yaml SOLVER.MAX_ITER 1000
python tools/train_net.py --config-file ... --resume
python tools/train_net.py --config-file ... --eval-only MODEL.WEIGHTS output/model_final.pth
torchrun --nproc-per-node 2 tools/train_net.py --config-file ...        # on CPU as well
"""

import argparse
import sys
from dataclasses import replace

from clipdense.checkpoint import CheckpointError
from clipdense.engine.build import evaluate_weights
from clipdense.engine.launch import launch
from clipdense.engine.options import ConfigError
from clipdense.engine.report import print_results
from clipdense.engine.run_config import run_config
from clipdense.engine.trainer import Trainer
from clipdense.files import WriteError
from clipdense.run.setup import setup

from detectron2.engine import default_argument_parser


def main(args: argparse.Namespace) -> dict[str, float]:
    loaded = setup(args)
    if args.eval_only:
        results = evaluate_weights(loaded.cfg, args.resume, loaded.weights)
        print_results(results)
    else:
        trainer = Trainer(loaded.cfg)
        trainer.resume_or_load(args.resume, loaded.weights)
        loaded = replace(loaded, weights=None)  # free the memory of the file
        results = trainer.train()
    run_config(loaded.cfg).verify(results)
    return results


if __name__ == "__main__":
    arguments = default_argument_parser(__doc__).parse_args()
    try:
        launch(
            main,
            arguments.num_gpus,
            arguments.num_machines,
            arguments.machine_rank,
            arguments.dist_url,
            args=(arguments,),
        )
    except (CheckpointError, ConfigError, WriteError, FileNotFoundError, FloatingPointError) as e:
        sys.exit(f"error: {e}")
