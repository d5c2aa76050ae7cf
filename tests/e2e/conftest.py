"""The `shapes` datasets with a handful of images."""

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from clipdense.data.shapes import splits
from clipdense.data.shapes.datasets import register_shapes

from detectron2.data import DatasetCatalog, MetadataCatalog


@pytest.fixture(scope="session")
def small_shapes_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shapes")


@pytest.fixture(scope="module")
def small_shapes(small_shapes_root: Path) -> Iterator[None]:
    """Every `shapes` dataset with four training and two validation images, while the module runs."""
    before = dict(DatasetCatalog.data), copy.deepcopy(MetadataCatalog.data)
    with pytest.MonkeyPatch.context() as patch:
        for name, split in list(splits.SPLITS.items()):
            patch.setitem(splits.SPLITS, name, replace(split, images=4 if split.training else 2))
        for name in splits.MINI:
            patch.setitem(splits.MINI, name, splits.SPLITS[name].images)
        for name in [name for name in DatasetCatalog.list() if name.startswith("shapes_")]:
            DatasetCatalog.pop(name)
            MetadataCatalog.pop(name)
        register_shapes(small_shapes_root)
        yield
    DatasetCatalog.data, MetadataCatalog.data = before
