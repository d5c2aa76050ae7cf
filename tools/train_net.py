"""Train or evaluate any model of clipdense or Detectron2.

python tools/train_net.py --config-file configs/shapes/mask_rcnn_clip_rn.yaml SOLVER.MAX_ITER 1000
python tools/train_net.py --config-file ... --resume
python tools/train_net.py --config-file ... --eval-only MODEL.WEIGHTS output/model_final.pth
torchrun --nproc-per-node 2 tools/train_net.py --config-file ...        # on CPU as well

A config file ending in .py (a LazyConfig) is a program and is run: use only files that you trust.
"""

import argparse
import os
import sys
from collections.abc import Sequence


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the arguments of Detectron2's ``default_argument_parser``, without importing Detectron2."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", default="", metavar="FILE", help="config of the model (.yaml, .py)")
    parser.add_argument(
        "--resume", action="store_true", help="continue from the last checkpoint in the output folder"
    )
    parser.add_argument("--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS, train nothing")
    parser.add_argument("--num-gpus", type=int, default=1, help="GPUs of each machine (default: 1)")
    parser.add_argument("--num-machines", type=int, default=1, help="number of machines (default: 1)")
    parser.add_argument("--machine-rank", type=int, default=0, help="rank of this machine, from 0")
    port = 2**15 + 2**14 + hash(os.getuid() if sys.platform != "win32" else 1) % 2**14
    parser.add_argument(
        "--dist-url",
        default=f"tcp://127.0.0.1:{port}",
        help="address at which the processes meet, or auto (default: %(default)s)",
    )
    parser.add_argument(
        "opts",
        nargs=argparse.REMAINDER,
        default=[],
        metavar="KEY VALUE",
        help="config overrides after all options: KEY VALUE pairs, or key=value for a .py config",
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    parse_arguments()  # --help and wrong options end here, before the imports that take seconds

from clipdense.run.boundary import announce_imports, tool_errors

if __name__ == "__main__":
    announce_imports()

from clipdense.run.training import INTERRUPTED, run_arguments
from clipdense.run.training import train_or_evaluate as main

__all__ = ["main", "parse_arguments"]

if __name__ == "__main__":
    with tool_errors(INTERRUPTED):
        run_arguments(parse_arguments())
