"""Results of a run on disk, so that a run that was ended goes on where it was."""

import hashlib
import json
from pathlib import Path
from typing import Any

from tests.conftest import ROOT

__all__ = ["Records", "digest_sources"]

# What the results depend on: a run with other sources begins anew.
_SOURCES = ("clipdense", "configs", "tools", "tests/reliability")
_CALLER = ROOT / "tests/reliability/__main__.py"  # puts results together


class Records:
    """Rows of results, a JSON line each.

    Args:
        path: the file; it may exist. An incomplete last line is dropped.

    Attributes:
        rows: rows so far.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        if lines and not lines[-1].endswith(b"\n"):
            lines.pop()
            path.write_bytes(b"".join(lines))
        self.rows: list[Any] = [json.loads(line) for line in lines]

    def add(self, *rows: Any) -> None:
        """Append rows."""
        with open(self.path, "a") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
        self.rows += rows


def digest_sources() -> str:
    """Return a short digest of the code and the configs under test."""
    digest = hashlib.sha256()
    for path in sorted(path for folder in _SOURCES for path in (ROOT / folder).rglob("*")):
        if path.suffix in (".py", ".yaml") and path != _CALLER:
            digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]
