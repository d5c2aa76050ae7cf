"""Compute, without a GPU, how a training scales over GPUs: step time, efficiency, images per second.

python tools/plan_scaling.py  # EVA-CLIP L/14-336 distilled on one to 1,024 GPUs
python tools/plan_scaling.py --parameters 632e6 --parallel fsdp --hours-for 1e8

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


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, kind, default, help in _OPTIONS:
        parser.add_argument(f"--{name}", type=kind, default=default, metavar="X", help=help)
    parser.add_argument("--parallel", choices=("ddp", "fsdp"), default="ddp", help="(default: %(default)s)")
    parser.add_argument("--hours-for", type=float, default=0, metavar="N", help="hours for N images, too")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    options = vars(parse_arguments(argv))
    images = options.pop("hours_for")
    plan = Plan(**options)
    head = ["GPUs", "step (ms)", "messages (ms)", "images/s", "efficiency"]
    rows = [[*row, images / row[3] / 3600] if images else row for row in plan.rows()]
    formats = (".0f", ".0f", ".1f", ".0f", ".2f", ".1f")
    print(tabulate(rows, [*head, "hours"] if images else head, tablefmt="github", floatfmt=formats))
    print("\nComputed from the options, not measured.")


if __name__ == "__main__":
    with tool_errors():
        main()
