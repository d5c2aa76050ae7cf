"""Execution of a run in parts: in this process, in several of this machine, or on a Ray cluster."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass

from clipdense.engine.options import ConfigError
from clipdense.engine.parts import PartedRun
from clipdense.engine.ray_parts import compute_on_ray, connect
from clipdense.run.setup import available_device

__all__ = ["Execution", "execute"]


@dataclass(frozen=True)
class Execution:
    """Where and how a run is executed.

    Attributes:
        jobs: processes on this machine.
        ray: address of a Ray cluster, see `connect`; "": this machine, without Ray.
        actors: see `compute_on_ray`.
        part_size: images in a part.
        retry_failed: compute the parts again in which an image failed.

    Raises:
        ConfigError: If a number is wrong, or options for this machine and for Ray are mixed.
    """

    jobs: int = 1
    ray: str = ""
    actors: int = 0
    part_size: int = 64
    retry_failed: bool = False

    def __post_init__(self) -> None:
        for name, least in (("jobs", 1), ("part_size", 1), ("actors", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"--{name.replace('_', '-')} must be at least {least}")
        if self.ray and self.jobs > 1:
            raise ConfigError("--jobs are processes of this machine: use --actors with --ray")
        if self.actors and not self.ray:
            raise ConfigError("--actors need a Ray cluster: use --jobs, or name the cluster in --ray")

    def prepare(self) -> None:
        """Connect to the cluster, if there is one; called before anything that takes long."""
        if self.ray:
            connect(self.ray)

    def device(self, configured: str, chosen: bool) -> str:
        """Return the device of models; on a cluster these are its GPUs, if it has some.

        Args:
            configured: device of the config, by default what this machine has.
            chosen: whether the user has set it.
        """
        if self.ray:
            return configured if chosen or os.environ.get("CLIPDENSE_DEVICE") else "cuda"
        return available_device(configured)


def execute(run: PartedRun, execution: Execution, finish: Callable[[PartedRun], None]) -> int:
    """Compute the unfinished parts of a run, and merge all of them.

    Args:
        run: the run.
        execution: where and how.
        finish: merges the parts; it is called with the run.

    Returns:
        The exit status: 1 if an image failed, else 0. Failures are listed in ``errors.jsonl``.

    Raises:
        ConfigError: See `PartedRun.opened` and `compute_on_ray`.
    """
    with run.opened():
        if execution.retry_failed:
            run.discard_failed()
        if execution.ray:
            compute_on_ray(run, execution.actors)
        else:
            run.run(execution.jobs)
        failed = run.write_errors()
        finish(run)
    if failed:
        print(
            f"failed: {failed} of {len(run.items)} images; reasons: {run.folder / 'errors.jsonl'} "
            "(--retry-failed tries them again)",
            file=sys.stderr,
        )
    return 1 if failed else 0
