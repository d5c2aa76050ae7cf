"""Workers of runs in parts that fail."""

import os
import signal
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from clipdense.engine.options import ConfigError

__all__ = ["build_killed_worker", "fail_to_build"]


def build_killed_worker(build: Callable[..., Any], folder: Path, *arguments: Any) -> Any:
    """Build the worker of ``build``, which dies in the third part that any process begins.

    ``folder`` gets a file for each part that is begun, with its first image in the name.
    """
    return partial(_compute, build(*arguments), folder)


def fail_to_build(*_: Any) -> Any:
    """Fail as a model whose weights are missing."""
    raise ConfigError("set MODEL.CLIP.PRETRAINED")


def _compute(worker: Any, folder: Path, items: Sequence[dict[str, Any]], images: Iterable[Any]) -> Any:
    stem = Path(items[0]["file_name"]).stem
    (folder / f"{stem}.{len(list(folder.glob(f'{stem}.*')))}").touch()
    if len(list(folder.iterdir())) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return worker(items, images)
