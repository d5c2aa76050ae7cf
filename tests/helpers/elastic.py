"""Program of a worker under torchrun: tools/train_net.py with the toy world, and a worker that kills itself.

``elastic.py FOLDER PARALLEL RANK``: process RANK kills itself once, when iteration 5 begins.
"""

import argparse
import os
import runpy
import signal
import sys
from pathlib import Path

import torch

from clipdense.engine.launch import launch
from clipdense.engine.trainer import Trainer
from tests.helpers.engine_toy import ROOT

from detectron2.utils import comm

CONFIG = """
MODEL: {META_ARCHITECTURE: ToyNetWithoutDropout, SYNC_BN: True}
INPUT: {MAPPER: ToyMapper}
DATASETS: {TRAIN: [toy], TEST: [toy]}
SOLVER: {IMS_PER_BATCH: 4, MAX_ITER: 8, LOG_PERIOD: 1, CHECKPOINT_PERIOD: 2, EMA_DECAY: 0.5, BASE_LR: 0.01,
  WARMUP_ITERS: 0}
TEST: {EVAL_PERIOD: 3}
DATALOADER: {NUM_WORKERS: 0}
SEED: 5
VERSION: 2
"""


def train(folder: str, parallel: str) -> None:
    """Run tools/train_net.py, without --resume, in the processes of the group."""
    config = Path(folder, "toy.yaml")
    if comm.is_main_process():
        config.write_text(CONFIG)
    comm.synchronize()
    main = runpy.run_path(str(ROOT / "tools" / "train_net.py"))["main"]
    opts = ["OUTPUT_DIR", f"{folder}/run", "SOLVER.PARALLEL", parallel]
    main(argparse.Namespace(config_file=str(config), opts=opts, resume=False, eval_only=False))


def kill_once(marker: Path) -> None:
    """Let this process kill itself, as kill -9 does, when it begins iteration 5 for the first time."""
    step = Trainer.run_step

    def run_step(self: Trainer) -> None:
        if self.iter == 5 and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        step(self)

    Trainer.run_step = run_step  # type: ignore[method-assign]


if __name__ == "__main__":
    torch.set_num_threads(1)
    if os.environ["RANK"] == sys.argv[3]:
        kill_once(Path(sys.argv[1], "killed"))
    launch(train, 1, args=(sys.argv[1], sys.argv[2]))
