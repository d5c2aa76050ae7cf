"""Train or evaluate any model of clipdense or Detectron2.

python tools/train_net.py --config-file configs/shapes/mask_rcnn_clip_rn.yaml SOLVER.MAX_ITER 1000
python tools/train_net.py --config-file ... --resume
python tools/train_net.py --config-file ... --eval-only MODEL.WEIGHTS output/model_final.pth
torchrun --nproc-per-node 2 tools/train_net.py --config-file ...        # on CPU as well

A config file ending in .py (a LazyConfig) is a program and is run: use only files that you trust.
"""

import argparse
from dataclasses import replace

from clipdense.engine.build import evaluate_weights
from clipdense.engine.launch import launch
from clipdense.engine.report import print_results
from clipdense.engine.run_config import run_config
from clipdense.engine.trainer import Trainer
from clipdense.run.boundary import tool_errors
from clipdense.run.setup import setup

from detectron2.engine import default_argument_parser

_INTERRUPTED = "interrupted; --resume continues a training from its last checkpoint"


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


def process(args: argparse.Namespace) -> None:
    """Run `main` in a process of the launcher, which prints its own error."""
    with tool_errors(_INTERRUPTED):
        main(args)


def run() -> None:
    args = default_argument_parser(__doc__).parse_args()
    launch(process, args.num_gpus, args.num_machines, args.machine_rank, args.dist_url, args=(args,))


if __name__ == "__main__":
    with tool_errors(_INTERRUPTED):
        run()
