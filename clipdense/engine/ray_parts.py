"""Parts of a run on a Ray cluster: read -> model actors -> write, with Ray Data.

Ray Data schedules the stages, keeps the images that wait for a model within the object store (back-pressure),
replaces actors that die, and computes their parts again. Only this module imports Ray, and only when it is
used.
"""

from __future__ import annotations

import logging
import os
import socket
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from torch.multiprocessing.spawn import ProcessRaisedException

from clipdense.engine.options import ConfigError
from clipdense.engine.parts import Item, Loaded, PartedRun, PartWorker

__all__ = ["compute_on_ray", "connect"]

_CONNECT_SECONDS = 10
_RETRIES = 5
"""How often a part is computed again after its process died."""


def connect(address: str) -> None:
    """Connect this process to a Ray cluster; without effect if it is connected.

    Args:
        address: "auto" for the cluster that this machine belongs to, ``HOST:PORT`` of its head,
            ``ray://HOST:PORT``, or "local" for a Ray on this machine, which ends with this process.

    Raises:
        ImportError: If Ray is not installed.
        ConfigError: If there is no cluster at the address.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nobody gets statistics
    try:
        import ray.data
    except ImportError as error:
        raise ImportError(
            "--ray needs Ray, which is not installed: pip install 'clipdense[scale]' (or 'ray[data]'), or "
            "leave out --ray to run on this machine alone"
        ) from error
    if ray.is_initialized():
        return
    options: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
    try:
        if ":" in address:  # a wrong address would be an error of Ray after minutes
            host, _, port = address.rpartition("://")[2].rpartition(":")
            socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS).close()
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **options)
    except (OSError, RuntimeError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"cannot connect to a Ray cluster at {address!r} ({reason}): start one with 'ray start --head', "
            "run this command on a machine of the cluster, or leave out --ray"
        ) from error


def compute_on_ray(run: PartedRun, actors: int = 0) -> None:
    """Compute the unfinished parts on the connected cluster, with a progress bar.

    Args:
        run: all machines must find its folder and its images under the same paths. On device "cuda", a model
            takes one GPU; on others, or if the cluster has no GPUs, one CPU.
        actors: largest number of models at a time; 0: the number of GPUs, or of CPUs less one, which reads.

    Raises:
        ConfigError: If a machine does not see the folder of the run, or some parts could not be computed.
        ProcessRaisedException: If a worker raises an exception; its text is that of the other process.
    """
    import ray.data

    pending = run.pending()
    if not pending:
        return
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.max_errored_blocks = -1  # a part whose processes die does not end the run
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    resources = ray.cluster_resources()
    gpus = int(resources.get("GPU", 0)) if run.device.startswith("cuda") else 0
    limit = actors or gpus or max(1, int(resources.get("CPU", 1)) - 1)
    sent = replace(run.without_items(), device="cuda" if gpus else "cpu")
    parts = [{"part": _Part(part, list(run.part_items(part)))} for part in pending]
    # A block holds one part: an actor that dies takes no other part with it.
    results = (
        ray.data.from_items(parts, override_num_blocks=len(parts))
        .map(_read, fn_args=[sent])
        .map(
            _Model,
            fn_constructor_args=[sent, os.getcwd()],
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=limit),
            max_task_retries=_RETRIES,
            **({"num_gpus": 1} if gpus else {"num_cpus": 1}),
        )
        .map(_write, fn_args=[sent])
    )
    with run.progress(pending) as bar:
        for row in results.iter_rows():
            part: _Part = row["part"]
            if part.error:
                raise ProcessRaisedException(
                    f"\n\n-- Process {part.process} terminated with the following error:\n{part.error}",
                    0,
                    part.process,
                )
            bar.update(len(run.part_items(part.number)))
    if missing := run.pending():
        raise ConfigError(
            f"{len(missing)} of {len(run)} parts are not in {run.folder}: their processes died {_RETRIES} "
            "times, or the machines of the cluster do not share the folder. The first of these parts begins "
            f"with {run.part_items(missing[0])[0]['file_name']}. The same command tries them again."
        )


@dataclass
class _Part:
    """A part between the stages; Ray sends it as a Python object.

    Attributes:
        number: of the part.
        items: its images.
        images: their pixels, after they are read.
        content: of its file, after it is computed.
        error: traceback of an exception that ends the run.
        process: number of the process that raised it.
    """

    number: int
    items: Sequence[Item] = ()
    images: Sequence[Loaded] = ()
    content: dict[str, Any] = field(default_factory=dict)
    error: str = ""
    process: int = 0

    def then(self, stage: Callable[[], _Part]) -> dict[str, _Part]:
        """Return the row after a stage; an exception becomes its traceback and ends the run in the driver."""
        if self.error:
            return {"part": self}
        try:
            return {"part": stage()}
        except Exception:
            return {"part": _Part(self.number, error=traceback.format_exc(), process=os.getpid())}


def _read(row: dict[str, _Part], run: PartedRun) -> dict[str, _Part]:
    """Read the images of a part."""

    def stage() -> _Part:
        if not (run.folder / "run.json").is_file():
            raise ConfigError(
                f"{socket.gethostname()} does not see {run.folder}: the output must be a folder that all "
                "machines of the cluster share"
            )
        part = row["part"]
        return replace(part, images=[run.read(item) for item in part.items])

    return row["part"].then(stage)


class _Model:
    """Actor that builds a worker for its first part, and computes parts."""

    def __init__(self, run: PartedRun, folder: str) -> None:
        with suppress(OSError):  # relative paths of configs and weights are those of the driver
            os.chdir(folder)
        self._run = run
        self._worker: PartWorker | None = None

    def __call__(self, row: dict[str, _Part]) -> dict[str, _Part]:
        part = row["part"]

        def stage() -> _Part:
            if self._worker is None:
                self._worker = self._run.build_worker(self._run.device)
            return _Part(part.number, content=self._worker(part.items, part.images))

        return part.then(stage)


def _write(row: dict[str, _Part], run: PartedRun) -> dict[str, _Part]:
    """Write the file of a part."""

    def stage() -> _Part:
        run.write(row["part"].number, row["part"].content)
        return _Part(row["part"].number)

    return row["part"].then(stage)
