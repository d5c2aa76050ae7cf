"""A model that detects bright boxes, its config, and a predictor with it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from clipdense.run.predictor import Predictor
from tests.helpers import engine_toy  # noqa: F401  (registers the dataset "toy")
from tests.helpers.bright_box import CLASSES, dataset, write_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("predictor")


@pytest.fixture(scope="module")
def config(folder: Path) -> Iterator[Path]:
    with dataset(classes=CLASSES) as name:
        yield write_model(folder, name)


@pytest.fixture(scope="module")
def predictor(config: Path) -> Predictor:
    return Predictor(config)
