"""AP of base and novel classes on OV-COCO, of rare, common and frequent ones on OV-LVIS."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as mask_utils

from clipdense import add_clipdense_config
from clipdense.data.datasets.open_vocabulary import (
    LVIS_RARE,
    OV_COCO,
    OV_COCO_NOVEL,
    register_open_vocabulary,
)
from clipdense.evaluation import build_evaluator

from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.lvis_v1_categories import LVIS_CATEGORIES
from detectron2.structures import Boxes, Instances

SETS = [name for name in DatasetCatalog.list() if name.startswith(("ovcoco_2017", "ovlvis_"))]


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    """Register the open-vocabulary datasets below a folder."""

    def register(root: Path | None) -> None:
        for name in SETS:
            DatasetCatalog.remove(name), MetadataCatalog.remove(name)
        register_open_vocabulary(root)

    register(tmp_path)
    for folder in ("coco/annotations", "lvis"):
        (tmp_path / folder).mkdir(parents=True)
    yield tmp_path
    register(None)


@pytest.fixture
def cfg(tmp_path: Path) -> CfgNode:
    cfg = get_cfg()
    add_clipdense_config(cfg)
    cfg.OUTPUT_DIR, cfg.TEST.PER_CLASS = str(tmp_path / "run"), True
    return cfg


def relabel(synthetic: Any, ids: list[int]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Give the synthetic annotations and detections these category ids, in the order of the classes."""
    _, dataset, results = synthetic
    new = dict(zip((c["id"] for c in dataset["categories"]), ids, strict=False))
    annotations, detections = (
        [r | {"category_id": new[r["category_id"]]} for r in rows if r["category_id"] in new]
        for rows in (dataset["annotations"], results)
    )
    return dataset | {"annotations": annotations}, detections


def evaluate(cfg: CfgNode, name: str, dataset: dict[str, Any], results: list[dict[str, Any]]) -> Any:
    """Feed predictions of a model with the dataset's vocabulary."""
    position = MetadataCatalog.get(name).thing_dataset_id_to_contiguous_id
    evaluator = build_evaluator(cfg, name)
    evaluator.reset()
    for image in dataset["images"]:
        rows = [r for r in results if r["image_id"] == image["id"]]
        boxes = torch.tensor([r["bbox"] for r in rows], dtype=torch.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        size = image["height"], image["width"]
        found = Instances(size, pred_boxes=Boxes(boxes))
        found.scores = torch.tensor([r["score"] for r in rows])
        found.pred_classes = torch.tensor([position[r["category_id"]] for r in rows], dtype=torch.int64)
        masks = [mask_utils.decode(r["segmentation"]) for r in rows]
        found.pred_masks = torch.from_numpy(np.stack(masks) if masks else np.zeros((0, *size))).bool()
        evaluator.process([{"image_id": image["id"]}], [{"instances": found}])
    return evaluator.evaluate()


def mean(metrics: dict[str, float], names: Any) -> float:
    return float(np.nanmean([metrics[f"AP-{name}"] for name in names]))


def test_ov_coco(cfg: CfgNode, root: Path, synthetic: Any) -> None:
    """Generalized protocol: 65 classes compete, means are over groups of classes."""
    dataset, results = relabel(synthetic, list(OV_COCO))
    dataset["categories"] = [{"id": k, "name": name} for k, name in OV_COCO.items()]
    (root / "coco/annotations/instances_val2017_all_2.json").write_text(json.dumps(dataset))
    got = evaluate(cfg, "ovcoco_2017_val", dataset, results)["bbox"]
    assert got["AP_novel"] == pytest.approx(mean(got, OV_COCO_NOVEL))
    assert got["AP_base"] == pytest.approx(mean(got, set(OV_COCO.values()) - set(OV_COCO_NOVEL)))
    assert got["AP"] == pytest.approx(mean(got, OV_COCO.values()))
    assert got["AP50"] > got["AP"] and got["AP50_novel"] > got["AP_novel"] > 0
    # without the novel classes' detections the base classes score the same
    novel = {k for k, name in OV_COCO.items() if name in OV_COCO_NOVEL}
    kept = [r for r in results if r["category_id"] not in novel]
    blind = evaluate(cfg, "ovcoco_2017_val", dataset, kept)["bbox"]
    assert blind["AP50_novel"] == 0 and blind["AP50_base"] == pytest.approx(got["AP50_base"])
    assert blind["AP50"] < got["AP50"]


def test_ov_lvis(cfg: CfgNode, root: Path, synthetic: Any) -> None:
    """Rare classes are the novel ones; boxes and masks."""
    ids = list(range(5, 1204, 15))
    dataset, results = relabel(synthetic, ids)
    dataset["categories"] = LVIS_CATEGORIES
    federated = {"neg_category_ids": ids, "not_exhaustive_category_ids": []}
    dataset["images"] = [image | federated for image in dataset["images"]]
    (root / "lvis/lvis_v1_val.json").write_text(json.dumps(dataset))
    got = evaluate(cfg, "ovlvis_v1_val", dataset, results)
    assert set(got) == {"bbox", "segm"}
    for metrics in got.values():
        for frequency in "rcf":
            names = [c["name"] for c in LVIS_CATEGORIES if c["frequency"] == frequency]
            assert metrics[f"AP{frequency}"] == pytest.approx(mean(metrics, names)) and metrics["APr"] > 0
        assert metrics["APr"] == metrics["AP_novel"]
        base = [c["name"] for c in LVIS_CATEGORIES if c["id"] not in LVIS_RARE]
        assert metrics["AP_base"] == pytest.approx(mean(metrics, base))
    assert got["bbox"]["APr"] != got["segm"]["APr"]
