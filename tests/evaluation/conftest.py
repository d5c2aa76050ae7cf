"""Datasets and predictions of known quality for the evaluators."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from benchmarks.evaluation import synthetic_coco

from detectron2.data import DatasetCatalog, MetadataCatalog


@pytest.fixture(scope="session")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any], list[dict[str, Any]]]:
    """Annotation file, its content, and detections of 12 synthetic images."""
    dataset, results = synthetic_coco(12, seed=3)
    path = tmp_path_factory.mktemp("synthetic") / "instances.json"
    path.write_text(json.dumps(dataset))
    return str(path), dataset, results


@pytest.fixture
def register(request: pytest.FixtureRequest) -> Callable[..., str]:
    """Register dicts and metadata for one test; returns the name."""
    names: list[str] = []

    def run(dicts: list[dict[str, Any]] | None = None, **metadata: Any) -> str:
        name = f"{Path(request.node.nodeid).name}_{len(names)}"
        DatasetCatalog.register(name, lambda: dicts or [])
        MetadataCatalog.get(name).set(**metadata)
        names.append(name)
        return name

    def forget() -> None:
        for name in names:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)

    request.addfinalizer(forget)
    return run
