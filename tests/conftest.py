"""What every test shares: where golden files and real data lie, and fresh interpreters."""

import atexit
import copy
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

# One thread a process: two pytest workers share two cores, and results stay the same on any machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Configs name no device; results are compared on the CPU also where there is a GPU.
os.environ.setdefault("CLIPDENSE_DEVICE", "cpu")

# Nothing is read from or left in the user's cache; pytest-xdist's workers inherit the folder.
if "CLIPDENSE_CACHE" not in os.environ:
    os.environ["CLIPDENSE_CACHE"] = tempfile.mkdtemp(prefix="clipdense-tests-")
    atexit.register(shutil.rmtree, os.environ["CLIPDENSE_CACHE"], ignore_errors=True)

import pytest

import clipdense  # noqa: F401  (before any test module imports detectron2)

ROOT = Path(__file__).resolve().parents[1]


def _shared(variable: str, default: str) -> Path:
    path = Path(os.environ.get(variable) or ROOT.parent / "shared" / default)
    if not path.is_dir():
        pytest.skip(f"{path} is not there; name the folder in {variable}")
    return path


@pytest.fixture(scope="session")
def parity_dir() -> Path:
    """Folder of golden files, from ``CLIPDENSE_PARITY_DIR`` (default: ``../shared/parity``)."""
    return _shared("CLIPDENSE_PARITY_DIR", "parity")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder of real sample data, from ``CLIPDENSE_DATA`` (default: ``../shared/data``)."""
    return _shared("CLIPDENSE_DATA", "data")


# Source that makes a package look as if it were not installed.
_BLOCK = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == {package!r}:
            raise ModuleNotFoundError("No module named " + {package!r}, name={package!r})
sys.meta_path.insert(0, Blocker())
"""


@pytest.fixture(scope="session")
def run_python() -> Callable[..., str]:
    """Run Python source in a fresh interpreter; returns its stdout, and fails with its stderr.

    ``without`` names a package that it shall not find; further keywords are environment variables.
    """

    def run(source: str, *args: str, without: str = "", cwd: str | Path = ROOT, **env: str) -> str:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **env}
        source = (_BLOCK.format(package=without) if without else "") + source
        command = [sys.executable, "-c", source, *args]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd, timeout=600)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.fixture
def catalogs() -> Iterator[None]:
    """Restore Detectron2's catalogs after the test."""
    from detectron2.data import DatasetCatalog, MetadataCatalog

    before = dict(DatasetCatalog.data), copy.deepcopy(MetadataCatalog.data)
    yield
    DatasetCatalog.data, MetadataCatalog.data = before
