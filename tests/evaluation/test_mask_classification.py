"""Classification of ground-truth masks: which masks count, what the metrics mean, which probe is measured."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from clipdense.clip import load_clip
from clipdense.clip.text import TextBank
from clipdense.clip.vocabulary import Vocabulary
from clipdense.data.mappers import original_sample
from clipdense.evaluation import (
    EVALUATOR_REGISTRY,
    MaskClassificationEvaluator,
    Probes,
    RegionEncoderProbe,
    RegionProbe,
    SemanticEvaluator,
)
from clipdense.regions import RegionEncoder
from clipdense.run.config import add_clipdense_config

from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog

CLASSES = ["red star", "blue star", "red ring", "sand", "snow"]
TRUTH = [[(1, 0), (2, 2), (3, 3)], [(1, 1), (2, 0), (3, 3), (4, 4)]]  # of each image: (segment id, class)
PREDICTED = {(0, 2): 0, (1, 3): 4}  # (image, class) that the probe gets wrong -> its prediction


class Oracle:
    """A region probe that predicts the class which the image's red channel shows inside a mask."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.clip = load_clip("shapes-vit", "random")
        self.text = TextBank(self.clip, "single")(CLASSES)

    def embed_masks(self, image: Tensor, masks: Tensor) -> Tensor:
        return 7 * self.text[[int(image[0][mask].max()) for mask in masks]]

    def embed_classes(self, vocabulary: Vocabulary, templates: str | Sequence[str]) -> Tensor:
        assert templates == "single" and list(vocabulary.names) == CLASSES
        return self.text


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle()


@pytest.fixture
def cfg() -> CfgNode:
    cfg = get_cfg()
    add_clipdense_config(cfg)
    return cfg


@pytest.fixture
def dataset(tmp_path: Path, register: Callable[..., str]) -> str:
    """Two images of quarters; a crowd beside them, and a segment without a pixel."""
    records = []
    for i, segments in enumerate(TRUTH):
        ids = np.zeros((20, 30), np.uint8)
        ids[:10, :10], ids[:10, 10:17], ids[10:, :], ids[2:4, 20:25] = 1, 2, 3, 9
        if i:
            ids[15:, 5:] = 4
        image, semantic = np.zeros((20, 30, 3), np.uint8), np.full((20, 30), 255, np.uint8)
        for label, k in segments:
            image[ids == label, 0] = PREDICTED.get((i, k), k)
            semantic[ids == label] = k
        names = {kind: str(tmp_path / f"{kind}{i}.png") for kind in ("image", "ids", "semantic")}
        for kind, pixels in (("image", image), ("ids", ids), ("semantic", semantic)):
            Image.fromarray(pixels).save(names[kind])
        info = [{"id": label, "category_id": k} for label, k in segments]
        info += [{"id": 9, "category_id": 0, "iscrowd": 1}, {"id": 200, "category_id": 1}]
        records.append(
            {
                "file_name": names["image"],
                "image_id": i,
                "pan_seg_file_name": names["ids"],
                "sem_seg_file_name": names["semantic"],
                "segments_info": info,
            }
        )
    return register(
        records,
        evaluator_type="coco_panoptic_seg",
        thing_classes=CLASSES,
        stuff_classes=CLASSES,
        thing_dataset_id_to_contiguous_id={10: 0, 11: 1, 12: 2},
        stuff_dataset_id_to_contiguous_id={20: 3, 21: 4},
        ignore_label=255,
        novel_classes=["red ring"],
        class_attributes={"color": ["red", "blue", "red"]},
    )


def run(dataset: str, probe: RegionProbe, **settings: Any) -> dict[str, float]:
    evaluator = MaskClassificationEvaluator(dataset, probe, templates="single", **settings)
    evaluator.reset()
    for record in DatasetCatalog.get(dataset):
        evaluator.process([original_sample(record)], [{}])
    results = evaluator.evaluate()
    assert results is not None
    return results["mask_classification"]


def test_metrics(dataset: str, oracle: Oracle, tmp_path: Path) -> None:
    found = run(dataset, oracle, output_dir=str(tmp_path / "out"))
    assert found["n"] == 7  # neither the crowd nor the empty segment
    assert found["top1"] == pytest.approx(100 * 5 / 7)
    assert found["macc1"] == pytest.approx(100 * (1 + 1 + 0 + 1 / 2 + 1) / 5)
    assert found["top1-novel"] == 0 and found["top1-base"] == pytest.approx(100 * 5 / 6)
    assert found["thing.top1"] == pytest.approx(75) and found["stuff.top1"] == pytest.approx(200 / 3)
    assert found["top1-color"] == 100  # a red ring taken for a red star
    assert json.loads((tmp_path / "out" / "mask_classification.json").read_text()) == pytest.approx(found)


def test_map_metrics_equal_the_semantic_evaluator(dataset: str, oracle: Oracle) -> None:
    found = run(dataset, oracle)
    semantic = SemanticEvaluator(dataset)
    semantic.reset()
    for i, record in enumerate(DatasetCatalog.get(dataset)):
        ids = np.array(Image.open(record["pan_seg_file_name"]))
        labels = torch.zeros(20, 30, dtype=torch.int64)
        for label, k in TRUTH[i]:
            labels[torch.from_numpy(ids == label)] = PREDICTED.get((i, k), k)
        semantic.process([record], [{"sem_seg_labels": labels}])
    results = semantic.evaluate()
    assert results is not None
    expected = results["sem_seg"]
    keys = [key for key in found if "IoU" in key]
    assert {"mIoU", "mIoU_base", "mIoU_novel", "hIoU"} <= set(keys)
    assert {key: found[key] for key in keys} == pytest.approx({key: expected[key] for key in keys})
    assert 0 < found["mIoU"] < 100


def test_semantic_datasets_have_a_mask_for_each_class(cfg: CfgNode, dataset: str, oracle: Oracle) -> None:
    """The evaluator of a semantic dataset measures the region probe of a model."""
    records = DatasetCatalog.get(dataset)
    for record in records:
        del record["pan_seg_file_name"], record["segments_info"]
    probes = Probes(regions=RegionEncoderProbe(RegionEncoder(oracle.clip)))
    evaluator = EVALUATOR_REGISTRY.get("sem_seg")(cfg, dataset, "", probes)
    evaluator.reset()
    for record in records:
        evaluator.process([original_sample(record)], [{}])
    results = evaluator.evaluate()
    assert list(results) == ["mask_classification"]
    assert results["mask_classification"]["n"] == 7


def test_without_a_probe_an_output_is_needed(cfg: CfgNode, dataset: str) -> None:
    evaluator = EVALUATOR_REGISTRY.get("sem_seg")(cfg, dataset, "", Probes())
    with pytest.raises(KeyError, match="needs the output sem_seg or .*, but the model gives nothing"):
        evaluator.process(DatasetCatalog.get(dataset)[:1], [{}])


def test_images_at_another_size_are_refused(dataset: str, oracle: Oracle) -> None:
    sample = original_sample(DatasetCatalog.get(dataset)[0])
    evaluator = MaskClassificationEvaluator(dataset, oracle, templates="single")
    sample["image"] = sample["image"][:, :10]
    with pytest.raises(ValueError, match=r"image0\.png: .* an image of 10 x 30 pixels, but .* is 20 x 30"):
        evaluator.process([sample], [{}])
    del sample["image"]
    with pytest.raises(ValueError, match="the sample has no image"):
        evaluator.process([sample], [{}])
