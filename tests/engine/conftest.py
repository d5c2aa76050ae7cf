"""Lets the tests of this folder import the toy world, and run it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clipdense.engine.trainer import Trainer
from tests.helpers import engine_toy

from detectron2.utils.env import seed_all_rng


@pytest.fixture
def build_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Trainer]:
    """A toy trainer: ``build_trainer(KEY, VALUE, ..., folder="run", resume=False)``; draws no curve."""
    monkeypatch.setattr("clipdense.visualization.curves.draw_curve", lambda *paths: None)

    def build(*overrides: Any, folder: str = "run", resume: bool = False) -> Trainer:
        (tmp_path / folder).mkdir(exist_ok=True)
        seed_all_rng(0)
        trainer = Trainer(engine_toy.toy_config(tmp_path / folder, *overrides))
        trainer.resume_or_load(resume)
        return trainer

    return build
