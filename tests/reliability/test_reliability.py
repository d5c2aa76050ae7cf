"""A small share of the reliability checks, with fixed seeds, in a process of its own."""

import subprocess
import sys
from pathlib import Path

import pytest

SHARE = Path(__file__).with_name("share.py")
ROOT = SHARE.parents[2]


@pytest.mark.slow
def test_a_share_of_the_checks_holds() -> None:
    """The checks fork their process: in pytest's, threads of other tests' libraries would be missing."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(SHARE)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout
