"""A short share of the reliability checks, with fixed seeds, in a process of its own."""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

from tests.reliability.mutations import damage_bytes, damage_json

SHARE = Path(__file__).with_name("share.py")
ROOT = SHARE.parents[2]


def test_a_share_of_the_checks_holds() -> None:
    """The checks fork their process, which must have a single thread: pytest's has those of other tests."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(SHARE)]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=900)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert process.returncode == 0, output[-4000:]
    assert " passed" in output


def test_damage_is_reproducible() -> None:
    content = {"a": [{"b": 1, "c": [1, 2]}], "d": "text"}
    for damage, whole in ((damage_json, content), (damage_bytes, bytes(range(200)))):
        first = [damage(whole, random.Random(seed)) for seed in range(50)]  # type: ignore[operator]
        assert first == [damage(whole, random.Random(seed)) for seed in range(50)]  # type: ignore[operator]
        assert len({data for _, data in first}) > 20
