"""What a data check found: counts by kind, with examples, and what to do about each."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

__all__ = ["DataError", "Finding", "Report", "Severity"]

Severity = Literal["error", "repaired", "note"]

_MAX_EXAMPLES = 3
_TITLES = {"error": "refused", "repaired": "repaired", "note": "noticed"}


class DataError(ValueError):
    """Data that would train or score wrongly. The message names the file, what was found and the remedy."""


@dataclass
class Finding:
    """One kind of fault.

    Attributes:
        kind: what was found, e.g. "images share an id".
        severity: "error" (the data are refused), "repaired" (unambiguous, and read as the remedy says) or
            "note" (kept or left out, as the remedy says).
        remedy: what was done, or what the user can do.
        count: how often.
        examples: the first few places, each naming an id, a file or a line.
    """

    kind: str
    severity: Severity
    remedy: str
    count: int = 0
    examples: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        places = "; ".join(self.examples)
        if self.count > len(self.examples):
            places += f"; {self.count - len(self.examples)} more"
        return f"{self.kind}: {places}. {self.remedy}"


@dataclass
class Report:
    """Everything found in one file or folder.

    Attributes:
        source: path that was checked.
        counts: number of images, annotations, classes ... by name.
        findings: by kind, in the order in which they were met.
        without_mask: number of objects that have a box but no mask.
        stamps: file that was opened, or folder of images -> its size in bytes and time of change in ns.
    """

    source: str
    counts: dict[str, int] = field(default_factory=dict)
    findings: dict[str, Finding] = field(default_factory=dict)
    without_mask: int = 0
    stamps: dict[str, list[int]] = field(default_factory=dict)

    def add(self, severity: Severity, kind: str, example: str, remedy: str) -> None:
        """Count one fault; the first few of a kind are kept as examples."""
        finding = self.findings.setdefault(kind, Finding(kind, severity, remedy))
        finding.count += 1
        if len(finding.examples) < _MAX_EXAMPLES:
            finding.examples.append(example)

    def stamp(self, path: str | os.PathLike[str]) -> None:
        """Note the size and time of change of a file or folder on which the report depends."""
        self.stamps[os.fspath(path)] = _stamp(os.fspath(path))

    def is_current(self) -> bool:
        """Return whether the files and folders on which the report depends are unchanged."""
        return all(_stamp(path) == stamp for path, stamp in self.stamps.items())

    @property
    def errors(self) -> list[Finding]:
        """The findings for which the data are refused."""
        return [finding for finding in self.findings.values() if finding.severity == "error"]

    def raise_errors(self) -> None:
        """Raise the first error, with the number of further kinds.

        Raises:
            DataError: If there is one.
        """
        if errors := self.errors:
            more = f" ({len(errors) - 1} more kinds of error: check_data lists them)" if errors[1:] else ""
            raise DataError(f"{self.source}: {errors[0]}{more}")

    def lines(self, *, skip_errors: bool = False) -> list[str]:
        """Counts and findings as lines for a log or a terminal."""
        counts = ", ".join(f"{value} {name}" for name, value in self.counts.items())
        lines = [f"{self.source}: {counts or 'nothing counted'}"]
        for severity, title in _TITLES.items():
            if severity == "error" and skip_errors:
                continue
            lines += [f"  {title}: {f}" for f in self.findings.values() if f.severity == severity]
        return lines

    def to_json(self) -> str:
        """Return the report as text for a cache file."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Read what `to_json` wrote.

        Raises:
            ValueError, TypeError, KeyError: If it is something else.
        """
        content: Mapping[str, Any] = json.loads(text)
        findings = {kind: Finding(**finding) for kind, finding in content["findings"].items()}
        return cls(
            content["source"],
            dict(content["counts"]),
            findings,
            int(content["without_mask"]),
            dict(content["stamps"]),
        )


def _stamp(path: str) -> list[int]:
    """Return the size and time of change of a file or folder; empty if it is not there."""
    try:
        status = os.stat(path)
    except OSError:
        return []
    return [status.st_size, status.st_mtime_ns]
