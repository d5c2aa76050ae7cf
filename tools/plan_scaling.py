"""Compute, without a GPU, how a training scales over GPUs: step time, efficiency, images per second.

python tools/plan_scaling.py  # EVA-CLIP L/14-336 distilled on one to 1,024 GPUs
python tools/plan_scaling.py --parameters 632e6 --parallel fsdp --hours-for 1e8
python tools/plan_scaling.py --distil 1e8  # and cost, storage, reading and restarts of a run

The result is computed from the options, not measured. docs/scale.md explains the model.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tabulate import tabulate

from clipdense.run.boundary import tool_errors

_OPTIONS: tuple[tuple[str, Callable[[str], float], float, str], ...] = (
    ("parameters", float, 304e6, "trained parameters (default: %(default)g)"),
    ("teraflop", float, 17.1, "TFLOP of an image in a step (default: %(default)g)"),
    ("images", int, 2, "images of a GPU in a step (default: %(default)s)"),
    ("peak", float, 989, "TFLOP/s of a GPU in bfloat16 (default: %(default)g)"),
    ("utilisation", float, 0.4, "share of the peak that is reached (default: %(default)g)"),
    ("gpus-per-node", int, 8, "(default: %(default)s)"),
    ("inside", float, 300, "GB/s of a GPU inside a node (default: %(default)g)"),
    ("outside", float, 45, "GB/s of a GPU between nodes (default: %(default)g)"),
    ("latency", float, 20, "microseconds of a message at each step of its tree (default: %(default)g)"),
    ("overlap", float, 0.8, "share of the backward pass beside which messages run (default: %(default)g)"),
    ("spread", float, 0.02, "standard deviation of a step among processes, relative (default: %(default)g)"),
)
_RUN_OPTIONS: tuple[tuple[str, Callable[[str], float], float, str], ...] = (
    ("gpus", int, 64, "GPUs of the run (default: %(default)s)"),
    ("price", float, 3, "USD of a GPU hour (default: %(default)g)"),
    ("kilobytes", float, 200, "KB of an image (default: %(default)g)"),
    ("decoding", float, 30, "ms of a core for decoding and cropping an image (default: %(default)g)"),
    ("shard", float, 1, "GB of a shard (default: %(default)g)"),
    ("storage", float, 1, "GB/s at which a checkpoint is written (default: %(default)g)"),
    ("checkpoint-steps", int, 500, "steps between two checkpoints (default: %(default)s)"),
    ("restart", float, 145, "seconds until lost processes train again (default: %(default)g)"),
    ("failure", float, 50_000, "hours between two failures of a GPU (default: %(default)g)"),
)
_INDEX_BYTES = 88
"""Of a sample in the index of a dataset of shards: a line of about 80 bytes, and its offset."""
_GPUS = (1, 2, 4, 8, 16, 64, 256, 1024)


@dataclass(frozen=True)
class Plan:
    """A training and its machines. Fields have the units of the options of the same name."""

    parameters: float
    teraflop: float
    images: int
    peak: float
    utilisation: float
    gpus_per_node: int
    inside: float
    outside: float
    latency: float
    overlap: float
    spread: float
    parallel: str

    def compute(self) -> float:
        """Return the seconds of a step without communication."""
        return self.images * self.teraflop / (self.peak * self.utilisation)

    def communication(self, gpus: int) -> float:
        """Return the seconds that the messages of a step take: ring collectives, at the slowest link.

        DDP reduces float32 gradients: 2 (n - 1) / n * 4 bytes per parameter, in buckets of 25 MB. FSDP
        gathers float32 parameters in the forward and the backward pass and scatters float32 gradients:
        (n - 1) / n * (4 + 4 + 4) bytes, with three collectives for each of 24 blocks.
        """
        if gpus == 1:
            return 0.0
        sharded = self.parallel == "fsdp"
        volume = (12 if sharded else 8) * self.parameters * (gpus - 1) / gpus / 1e9  # GB
        bandwidth = self.inside if gpus <= self.gpus_per_node else self.outside
        messages = 3 * 24 if sharded else 4 * self.parameters / 25e6
        steps = math.ceil(math.log2(gpus))
        return volume / bandwidth + messages * steps * self.latency * 1e-6

    def step(self, gpus: int) -> float:
        """Return the seconds of a step: compute, the slowest of ``gpus`` processes, and exposed messages."""
        compute = self.compute()
        slowest = compute * (1 + self.spread * math.sqrt(2 * math.log(gpus)))  # maximum of n normal values
        hidden = self.overlap * 2 / 3 * compute  # messages run beside the backward pass
        return slowest + max(0.0, self.communication(gpus) - hidden)

    def rows(self, counts: Sequence[int] = _GPUS) -> list[list[float]]:
        """Return (GPUs, step in ms, messages in ms, images/s, efficiency) for each number of GPUs."""
        alone = self.step(1)
        return [
            [
                n,
                1e3 * self.step(n),
                1e3 * self.communication(n),
                n * self.images / self.step(n),
                alone / self.step(n),
            ]
            for n in counts
        ]


@dataclass(frozen=True)
class Run:
    """One pass over many images. Fields have the units of the options of the same name."""

    gpus: int
    price: float
    kilobytes: float
    decoding: float
    shard: float
    storage: float
    checkpoint_steps: int
    restart: float
    failure: float

    def rows(self, plan: Plan, images: float) -> list[list[str]]:
        """Return (quantity, value) of a training of ``plan`` that sees each of ``images`` images once."""
        step = plan.step(self.gpus)
        speed = self.gpus * plan.images / step
        hours, nodes = images / speed / 3600, max(1, self.gpus // plan.gpus_per_node)
        bytes_read, cores = speed * self.kilobytes / 1e3, speed * self.decoding / 1e3  # MB/s
        checkpoint = 12 * plan.parameters / 1e9  # weights and two moments in float32, GB
        period = self.checkpoint_steps * step
        failures = self.gpus * hours / self.failure
        terabytes = images * self.kilobytes / 1e9
        return [
            ["compute", f"{images * plan.teraflop * 1e12:.1e} FLOP"],
            ["throughput", f"{speed / self.gpus:.0f} images/s per GPU, {speed:,.0f} images/s"],
            ["time", f"{hours:.1f} h"],
            ["cost", f"{self.gpus * hours:,.0f} GPU hours, {self.gpus * hours * self.price:,.0f} USD"],
            ["storage", f"{terabytes:,.1f} TB in {1e3 * terabytes / self.shard:,.0f} shards"],
            ["index of the shards", f"{images * _INDEX_BYTES / 1e9:.1f} GB on each node, mapped into memory"],
            ["reading", f"{bytes_read:,.0f} MB/s, {bytes_read / nodes:,.0f} MB/s per node"],
            ["requests to a store", f"{speed:,.0f} per second, one for each image"],
            ["decoding", f"{cores:.0f} cores, {cores / nodes:.0f} per node"],
            ["checkpoint", f"{checkpoint:.1f} GB, {4 / 3 * checkpoint:.1f} GB with EMA"],
            ["writing it", f"{checkpoint / self.storage:.0f} s every {period:.0f} s"],
            ["restart", f"{self.restart:.0f} s, and {period / 2:.0f} s of lost work on average"],
            ["failures", f"{failures:.2f} in the run, {failures * (self.restart + period / 2):.0f} s lost"],
        ]


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, kind, default, help in (*_OPTIONS, *_RUN_OPTIONS):
        parser.add_argument(f"--{name}", type=kind, default=default, metavar="X", help=help)
    parser.add_argument("--parallel", choices=("ddp", "fsdp"), default="ddp", help="(default: %(default)s)")
    parser.add_argument("--hours-for", type=float, default=0, metavar="N", help="hours for N images, too")
    parser.add_argument("--distil", type=float, default=0, metavar="N", help="plan one pass over N images")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    options = vars(parse_arguments(argv))
    images, distilled = options.pop("hours_for"), options.pop("distil")
    run = Run(**{key: options.pop(key) for key in (name.replace("-", "_") for name, *_ in _RUN_OPTIONS)})
    plan = Plan(**options)
    head = ["GPUs", "step (ms)", "messages (ms)", "images/s", "efficiency"]
    rows = [[*row, images / row[3] / 3600] if images else row for row in plan.rows()]
    formats = (".0f", ".0f", ".1f", ".0f", ".2f", ".1f")
    print(tabulate(rows, [*head, "hours"] if images else head, tablefmt="github", floatfmt=formats))
    if distilled:
        head = [f"one pass over {distilled:.0e} images on {run.gpus} GPUs", "value"]
        print("\n" + tabulate(run.rows(plan, distilled), head, tablefmt="github"))
    print("\nComputed from the options, not measured.")


if __name__ == "__main__":
    with tool_errors():
        main()
