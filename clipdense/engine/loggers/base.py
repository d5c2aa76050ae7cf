"""What every logger of a training run implements."""

from __future__ import annotations

import uuid
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import yaml

from clipdense.engine.options import ConfigError
from clipdense.files import read_text, write_text

__all__ = ["RunInfo", "RunLogger"]

_ID_FILE = "run_id.txt"


@dataclass(frozen=True)
class RunInfo:
    """What a logger knows of a run.

    Attributes:
        folder: output folder of the run.
        project: name under which a service groups runs.
    """

    folder: Path
    project: str = "clipdense"

    @property
    def name(self) -> str:
        """Name of the run: that of its folder."""
        return self.folder.resolve().name

    def identity(self) -> str:
        """Return an id that a resumed run keeps; it is stored in the folder."""
        path = self.folder / _ID_FILE
        if not path.is_file():
            write_text(path, uuid.uuid4().hex[:12])
        return read_text(path).strip()

    def settings(self) -> dict[str, Any]:
        """Return the content of the run's config.yaml; empty if there is none."""
        path = self.folder / "config.yaml"
        content = yaml.safe_load(read_text(path)) if path.is_file() else {}
        return content if isinstance(content, dict) else {}


class RunLogger(ABC):
    """Logger of one run. It is built before the first write, in the main process only.

    Attributes:
        package: name of the package that it needs; "" for none.
    """

    package: ClassVar[str] = ""

    @abstractmethod
    def __init__(self, run: RunInfo) -> None: ...

    @classmethod
    def require(cls) -> None:
        """Check that the package of the logger is installed.

        Raises:
            ConfigError: If it is not; says how to install it.
        """
        if cls.package and find_spec(cls.package) is None:
            raise ConfigError(
                f"SOLVER.LOGGERS names a logger that needs the package {cls.package}, which is not "
                'installed: pip install "clipdense[track]", or remove it from SOLVER.LOGGERS'
            )

    @abstractmethod
    def write(self, scalars: Mapping[str, float], iteration: int) -> None:
        """Write the scalars of an iteration; iterations rise from call to call."""

    @abstractmethod
    def picture(self, name: str, path: Path, iteration: int) -> None:
        """Write a picture, an image file."""

    @abstractmethod
    def close(self) -> None:
        """Write what is buffered, and end the run."""
