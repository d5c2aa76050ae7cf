"""Golden files: found by what they are, counted, and none forgotten.

A test names its files by a marker and takes the fixture `golden`, one file a run:

    @pytest.mark.golden(case="openai_clip")       by the `case` in the file's metadata (see FAMILIES)
    @pytest.mark.golden(kind="criterion")         by `kind` (see FAMILIES)
    @pytest.mark.golden(name="cs_eva_*")          by file name, any family
    @pytest.mark.golden(manifest="openai_clip_*") manifests, by file name

`pending.txt` lists the files that no test reads yet, one `<family>/<stem>` a line.
"""

import json
import os
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

HERE = Path(__file__).parent
# Family -> the metadata entry that says what a file is; None: the file's name does.
FAMILIES = {
    "denseclip_family": "case",
    "ovseg_family": "kind",
    "clipself_family": None,
    "training_free_family": "case",
    "successors_family": "kind",
}
CLAIMED = pytest.StashKey[set[str]]()
MODULES = pytest.StashKey[set[str]]()


@dataclass
class Golden:
    """One golden file.

    Attributes:
        id: `<family>/<stem>`.
        config: its metadata; `args` the settings of denseclip_family.
        tolerance: (atol, rtol), never looser than the file's own.
    """

    id: str
    path: Path
    tolerance: tuple[float, float] = (0.0, 0.0)
    config: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.config = metadata(self.path)
        suggested = self.config.get("suggested_tolerance")
        if isinstance(suggested, dict):
            self.tolerance = (suggested["atol"], suggested["rtol"])

    @property
    def args(self) -> dict[str, Any]:
        """Settings of the recorded run."""
        return self.config["args"]

    @cached_property
    def shapes(self) -> dict[str, list[int]]:
        """Key -> shape of a manifest."""
        return {k: v for k, v in json.loads(self.path.read_text()).items() if k != "_info"}

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Everything in the file."""
        with safe_open(self.path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors below `state`, `in` or `out`, without that prefix."""
        return {
            k.removeprefix(f"{prefix}/"): v for k, v in self.tensors.items() if k.startswith(f"{prefix}/")
        }

    def check(self, results: dict[str, Tensor]) -> None:
        """Every recorded output has a result, within the file's tolerance."""
        expected = self.part("out")
        assert expected, f"{self.id} records nothing"
        missing = sorted(set(expected) - set(results))
        assert not missing, f"{self.id}: no result for {missing}"
        atol, rtol = self.tolerance
        for name, value in expected.items():
            try:
                torch.testing.assert_close(results[name], value, atol=atol, rtol=rtol)
            except AssertionError as e:
                raise AssertionError(f"{self.id} {name}: {e}") from None

    def differs(self, name: str, value: Tensor) -> bool:
        """Whether a negative control is outside the tolerance, and not by its shape alone."""
        atol, rtol = self.tolerance
        expected = self.part("out")[name]
        assert value.shape == expected.shape
        return not torch.allclose(value, expected, atol=atol, rtol=rtol)


def folder() -> Path:
    """Where golden files lie; it need not exist."""
    return Path(os.environ.get("CLIPDENSE_PARITY_DIR") or HERE.parents[2] / "shared" / "parity")


@cache
def metadata(path: Path) -> dict[str, Any]:
    """The `config` of a golden file; empty for a manifest."""
    if path.suffix == ".json":
        return {}
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["config"])


@cache
def files() -> dict[str, Path]:
    """Every golden file by its id."""
    found = {
        f"{family}/{p.stem}": p
        for family in FAMILIES
        for p in sorted((folder() / family).glob("*.safetensors"))
    }
    return {**found, **{f"manifests/{p.stem}": p for p in sorted((folder() / "manifests").glob("*.json"))}}


def pending() -> list[str]:
    """Ids that no test reads yet."""
    return (HERE / "pending.txt").read_text().split()


def _matches(name: str, path: Path, marker: dict[str, str]) -> bool:
    (key, value), family = next(iter(marker.items())), name.split("/")[0]
    if key in ("case", "kind"):
        return FAMILIES.get(family) == key and metadata(path).get(key) == value
    return (family == "manifests") == (key == "manifest") and fnmatch(path.stem, value)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "golden(case|kind|name|manifest=...): the golden files that a test reads"
    )
    config.stash[CLAIMED], config.stash[MODULES] = set(), set()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    metafunc.config.stash[MODULES].add(metafunc.definition.path.name)
    marker = metafunc.definition.get_closest_marker("golden")
    if marker is None:
        return
    chosen = [name for name, path in files().items() if _matches(name, path, marker.kwargs)]
    metafunc.config.stash[CLAIMED].update(chosen)
    absent = pytest.param(
        None, marks=pytest.mark.skip(f"{folder()} has no file with {marker.kwargs}"), id="absent"
    )
    metafunc.parametrize(
        "golden", [pytest.param(name, id=name) for name in chosen] or [absent], indirect=True
    )


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    """One golden file of the test's marker."""
    return Golden(request.param, files()[request.param])


@pytest.fixture
def accounts(request: pytest.FixtureRequest) -> tuple[set[str], set[str], list[str]]:
    """Ids that are there, ids that a collected test reads, ids that are pending."""
    modules = {p.name for p in HERE.glob("test_*.py")}
    if not files():
        pytest.skip(f"no golden files in {folder()}; name the folder in CLIPDENSE_PARITY_DIR")
    if not modules <= request.config.stash[MODULES]:
        pytest.skip("counts files only when the whole folder is collected")
    return set(files()), request.config.stash[CLAIMED], pending()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """`golden files: N consumed | N pending | N absent`; consumed = a test that reads it has passed."""
    passed = [r.nodeid for r in terminalreporter.stats.get("passed", []) if "[" in r.nodeid]
    consumed = {name for name in files() if any(f"{name}]" in node or f"{name}-" in node for node in passed)}
    waiting = pending()
    absent = len(set(waiting) - set(files()))
    terminalreporter.section("parity")
    counts = f"{len(consumed)} consumed | {len(waiting) - absent} pending | {absent} absent"
    terminalreporter.line(f"golden files: {counts}  ({folder()})")
