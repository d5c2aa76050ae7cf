"""A small share of the harness, run by `make test-slow`; `make test-reliability` runs all of it."""

import os
import random
import signal
import time
from itertools import islice
from pathlib import Path

import pytest

from clipdense.engine.options import ConfigError
from tests.reliability.inputs import KINDS
from tests.reliability.kills import JOBS
from tests.reliability.mutations import damage_bytes, damage_json
from tests.reliability.outcomes import Case, WrongResultError, run_case, run_cases
from tests.reliability.world import World


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("reliability"))


@pytest.mark.parametrize(
    ("kind", "number"),
    [
        ("images", 60),
        ("LVIS, panoptic, captions, pairs, shards", 20),
        ("tables and vocabularies", 30),
        ("state files", 4),
    ],
)
def test_damaged_inputs_are_refused_by_name(world: World, kind: str, number: int) -> None:
    cases = KINDS[kind][0](world, 0)
    counts, faults = run_cases(kind.split(",")[0], islice(cases, number), world.folder)
    assert counts.total() == number and counts["refused"] > 0
    assert not faults


def test_a_killed_drawing_and_table_are_continued(world: World) -> None:
    for job in ("drawing", "tables"):
        assert [notes for _, notes in JOBS[job][0](world, 1, random.Random(0)) if notes] == []


# ---- the harness itself


def _raise(error: BaseException) -> None:
    raise error


def test_verdicts(tmp_path: Path) -> None:
    expected = {
        "accepted": lambda: None,
        "refused": lambda: _raise(ConfigError("input.json: no")),
        "unnamed": lambda: _raise(ConfigError("no")),
        "traceback": lambda: [][1],
        "hang": lambda: time.sleep(60),
        "crash": lambda: os.kill(os.getpid(), signal.SIGSEGV),
        "wrong": lambda: _raise(WrongResultError("class 1000")),
    }
    for verdict, action in expected.items():
        case = Case(verdict, action, ("input.json",), limit=1.5)
        assert run_case(case, tmp_path / "log").verdict == verdict


def test_an_input_that_runs_code_is_found(tmp_path: Path) -> None:
    witness = tmp_path / "witness"
    assert run_case(Case("code", witness.touch, (), witness=witness), tmp_path / "log").verdict == "wrong"


def test_damage_is_reproducible() -> None:
    content = {"a": [{"b": 1, "c": [1, 2]}], "d": "text"}
    for damage, whole in ((damage_json, content), (damage_bytes, bytes(range(200)))):
        first = [damage(whole, random.Random(seed)) for seed in range(50)]  # type: ignore[operator]
        assert first == [damage(whole, random.Random(seed)) for seed in range(50)]  # type: ignore[operator]
        assert len({data for _, data in first}) > 20
