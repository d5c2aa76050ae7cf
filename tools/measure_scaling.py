"""Measure training steps in one, two and four processes on this machine's CPU, with gloo.

OMP_NUM_THREADS=1 python tools/measure_scaling.py

Each process trains a nano CLIPSelf on two images of random pixels; the fastest of --steps steps counts. The
result calibrates tools/plan_scaling.py, see docs/scale.md.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Sequence


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=20, help="steps of each run (default: %(default)s)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    parse_arguments()  # --help and wrong options end here, before the imports that take seconds

import torch
import torch.distributed as dist
import torch.multiprocessing
from tabulate import tabulate

from clipdense.clip import load_clip
from clipdense.engine.options import TrainerOptions
from clipdense.engine.parallel import build_parallel
from clipdense.run.boundary import tool_errors
from clipdense.systems.clipself import CLIPSelf


def measure(rank: int, size: int, parallel: str, steps: int, folder: str) -> None:
    """Write the seconds of the fastest step and of the fastest sum of all gradients to a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    torch.manual_seed(0)
    model = CLIPSelf(clip=load_clip("shapes-vit"))
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.zeros(sum(p.numel() for p in trained))
    optimizer = torch.optim.AdamW(trained, 1e-5)
    spread = build_parallel(model, optimizer, TrainerOptions("", 1, parallel=parallel))
    spread.wrapped.train()
    box = torch.tensor([[0.0, 0.0, 0.5, 1.0], [0.25, 0.25, 1.0, 1.0]])
    batch = [
        {
            "image": torch.randint(256, (3, 128, 128)).byte(),
            "boxes": box,
            "crops": torch.randint(256, (2, 3, 64, 64)).byte(),
        }
        for _ in range(2)
    ]
    fastest = [float("inf")] * 2
    for _ in range(steps):
        dist.barrier()
        start = time.perf_counter()
        optimizer.zero_grad()
        with spread.sync(enabled=True):
            torch.stack(list(spread.wrapped(batch).values())).sum().backward()
        optimizer.step()
        dist.barrier()
        middle = time.perf_counter()
        dist.all_reduce(gradients)
        fastest = [min(fastest[0], middle - start), min(fastest[1], time.perf_counter() - middle)]
    if rank == 0:
        torch.save([*fastest, gradients.numel()], f"{folder}/result")
    dist.destroy_process_group()


def main(argv: Sequence[str] | None = None) -> None:
    steps, rows = parse_arguments(argv).steps, []
    for size in (1, 2, 4):
        for parallel in ("ddp", "fsdp") if size > 1 else ("ddp",):
            with tempfile.TemporaryDirectory() as folder:
                torch.multiprocessing.start_processes(
                    measure, (size, parallel, steps, folder), nprocs=size, start_method="fork"
                )
                step, exchange, count = torch.load(f"{folder}/result")
            rows.append([size, parallel if size > 1 else "-", 1e3 * step, 1e3 * exchange, count / 1e6])
    head = ["processes", "parallel", "step (ms)", "sum of gradients (ms)", "million parameters"]
    print(tabulate(rows, head, tablefmt="github", floatfmt=("", "", ".0f", ".1f", ".2f")))
    print(f"{os.cpu_count()} cores, torch {torch.__version__}, {torch.get_num_threads()} thread a process")


if __name__ == "__main__":
    with tool_errors():
        main()
