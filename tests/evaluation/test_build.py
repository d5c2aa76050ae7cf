"""`build_evaluator`: the evaluator_type of a dataset decides, and several processes count as one."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from clipdense import add_clipdense_config
from clipdense.evaluation import (
    EVALUATOR_REGISTRY,
    InstanceEvaluator,
    build_evaluator,
)

from detectron2.config import CfgNode, get_cfg
from detectron2.evaluation import PascalVOCDetectionEvaluator
from detectron2.structures import Boxes, Instances


@pytest.fixture
def cfg(tmp_path: Path) -> CfgNode:
    cfg = get_cfg()
    add_clipdense_config(cfg)
    cfg.OUTPUT_DIR = str(tmp_path / "run")
    return cfg


def found(x0: float = 0.0) -> dict[str, Any]:
    """One box of class 0, 50 wide and 100 high."""
    boxes = Boxes(torch.tensor([[x0, 0.0, x0 + 50, 100.0]]))
    fields = {"scores": torch.tensor([0.9]), "pred_classes": torch.tensor([0])}
    return {"instances": Instances((100, 100), pred_boxes=boxes, **fields)}


def annotations(folder: Path) -> str:
    """One box of class 0 in image 1."""
    content = {
        "images": [{"id": 1, "height": 100, "width": 100}],
        "categories": [{"id": 7, "name": "cat", "frequency": "r"}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 7, "bbox": [0, 0, 50, 100], "area": 5000, "iscrowd": 0}
        ],
    }
    (folder / "instances.json").write_text(json.dumps(content))
    return str(folder / "instances.json")


def test_config_reaches_the_evaluator(cfg: CfgNode, register: Any, tmp_path: Path) -> None:
    shared = {"json_file": annotations(tmp_path), "thing_classes": ["cat"]}
    shared["thing_dataset_id_to_contiguous_id"] = {7: 0}
    keys = {}
    for kind in ("coco", "lvis"):
        name = register(evaluator_type=kind, **shared)
        cfg.TEST.PER_CLASS = True
        for cfg.TEST.METRIC_BACKEND in ("hotcoco", "reference"):
            evaluator = build_evaluator(cfg, name)
            assert isinstance(evaluator, InstanceEvaluator)
            evaluator.reset()
            evaluator.process([{"image_id": 1}], [found()])
            keys[kind] = evaluator.evaluate()["bbox"]
        # by default the detections of each dataset have a folder of their own
        assert (tmp_path / "run" / "inference" / name / f"{kind}_instances_results.json").is_file()
    assert keys["coco"]["AP-cat"] == keys["lvis"]["APr"] == pytest.approx(100)
    assert "APr" not in keys["coco"]
    cfg.TEST.METRIC_BACKEND = "numpy"
    with pytest.raises(ValueError, match=r"TEST\.METRIC_BACKEND is 'numpy'"):
        build_evaluator(cfg, name)


def test_max_dets(cfg: CfgNode, register: Any, tmp_path: Path) -> None:
    metadata = {"thing_classes": ["cat"], "thing_dataset_id_to_contiguous_id": {7: 0}}
    name = register(evaluator_type="coco", json_file=annotations(tmp_path), **metadata)
    results = {}
    for cfg.TEST.MAX_DETS in (0, 1):
        evaluator = build_evaluator(cfg, name)
        evaluator.reset()
        good, bad = found()["instances"], found(50.0)["instances"]
        bad.scores += 0.05
        evaluator.process([{"image_id": 1}], [{"instances": Instances.cat([good, bad])}])
        results[cfg.TEST.MAX_DETS] = evaluator.evaluate()["bbox"]["AP"]
    assert results == {0: pytest.approx(50), 1: 0}


def test_panoptic_datasets_are_evaluated_by_the_outputs_of_the_model(
    cfg: CfgNode, register: Any, tmp_path: Path
) -> None:
    ids = np.ones((100, 100), np.uint8)
    ids[:, 50:] = 2
    Image.fromarray(np.stack([ids, 0 * ids, 0 * ids], -1)).save(tmp_path / "1.png")
    Image.fromarray(ids - 1).save(tmp_path / "labels.png")
    segments = [{"id": i, "category_id": c, "area": 5000, "iscrowd": 0} for i, c in ((1, 7), (2, 8))]
    content = {
        "images": [{"id": 1, "height": 100, "width": 100}],
        "categories": [{"id": 7, "name": "cat", "isthing": 1}, {"id": 8, "name": "sky", "isthing": 0}],
        "annotations": [{"image_id": 1, "file_name": "1.png", "segments_info": segments}],
    }
    (tmp_path / "panoptic.json").write_text(json.dumps(content))
    record = {"file_name": "1.jpg", "image_id": 1, "sem_seg_file_name": str(tmp_path / "labels.png")}
    metadata = {
        "thing_classes": ["cat", "sky"],
        "stuff_classes": ["cat", "sky"],
        "thing_dataset_id_to_contiguous_id": {7: 0},
        "stuff_dataset_id_to_contiguous_id": {8: 1},
        "panoptic_json": str(tmp_path / "panoptic.json"),
        "panoptic_root": str(tmp_path),
        "json_file": annotations(tmp_path),
        "ignore_label": 255,
    }
    labels = torch.from_numpy(ids.astype(np.int64) - 1)
    outputs = {
        "panoptic_seg": (
            torch.from_numpy(ids.astype(np.int32)),
            [{"id": 1, "isthing": True, "category_id": 0}, {"id": 2, "isthing": False, "category_id": 1}],
        ),
        "sem_seg": torch.nn.functional.one_hot(labels, 2).permute(2, 0, 1),
        **found(),
    }
    tasks = {
        "panoptic_seg": ("panoptic_seg", "PQ"),
        "sem_seg": ("sem_seg", "mIoU"),
        "instances": ("bbox", "AP"),
    }
    for kind in ("coco_panoptic_seg", "ade20k_panoptic_seg"):
        evaluator = build_evaluator(cfg, register([record], evaluator_type=kind, **metadata))
        for given in (list(outputs), ["panoptic_seg"], ["sem_seg", "instances"]):
            evaluator.reset()
            evaluator.process([record], [{key: outputs[key] for key in given}])
            results = evaluator.evaluate()
            assert set(results) == {tasks[key][0] for key in given}
            for task, metric in (tasks[key] for key in given):
                assert results[task][metric] == pytest.approx(100)
    # without other annotations, a dataset has the evaluator of its panoptic ones alone
    bare = {key: value for key, value in metadata.items() if key != "json_file"}
    name = register([{"file_name": "1.jpg", "image_id": 1}], evaluator_type="coco_panoptic_seg", **bare)
    evaluator = build_evaluator(cfg, name)
    evaluator.reset()
    evaluator.process([record], [outputs])
    assert set(evaluator.evaluate()) == {"panoptic_seg"}
    name = register([record], evaluator_type="sem_seg", stuff_classes=["cat", "sky"], ignore_label=255)
    evaluator = build_evaluator(cfg, name)
    needed = "sem_seg or sem_seg_labels or proposal_masks"
    with pytest.raises(KeyError, match=f"{needed}, but .* gives instances"):
        evaluator.process([record], [{"instances": None}])


def test_pascal_voc(cfg: CfgNode, register: Any, tmp_path: Path) -> None:
    for folder in ("Annotations", "ImageSets/Main"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "ImageSets/Main/val.txt").write_text("a\nb\n")
    head = "<annotation><object><name>cat</name><pose>Left</pose><truncated>0</truncated>"
    head += "<difficult>0</difficult>"
    corners = "<xmin>1</xmin><ymin>1</ymin><xmax>50</xmax><ymax>100</ymax>"
    for image in "ab":
        (tmp_path / f"Annotations/{image}.xml").write_text(
            f"{head}<bndbox>{corners}</bndbox></object></annotation>"
        )
    name = register(
        evaluator_type="pascal_voc", dirname=str(tmp_path), split="val", year=2012, thing_classes=["cat"]
    )
    evaluator = build_evaluator(cfg, name)
    assert isinstance(evaluator, PascalVOCDetectionEvaluator)
    evaluator.reset()
    evaluator.process([{"image_id": "a"}, {"image_id": "b"}], [found(), found(50.0)])
    assert evaluator.evaluate()["bbox"]["AP50"] == pytest.approx(50)


def test_unknown_types_are_named(cfg: CfgNode, register: Any) -> None:
    with pytest.raises(
        KeyError, match="evaluator_type None; its metadata must name one of: .*coco_panoptic_seg"
    ):
        build_evaluator(cfg, register())
    assert {"coco", "lvis", "sem_seg", "coco_panoptic_seg", "pascal_voc"} <= {
        name for name, _ in EVALUATOR_REGISTRY
    }


# Forked after the imports, which take longest, and before hotcoco has threads.
_TWO_PROCESSES = """
import json, sys
import torch
import clipdense
from torch.distributed import init_process_group
from torch.multiprocessing import start_processes
from clipdense.evaluation import InstanceEvaluator, SemanticEvaluator
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances

folder = sys.argv[1]
record = [{"file_name": f"{i}.jpg", "sem_seg_file_name": f"{folder}/{i}.png"} for i in range(2)]
DatasetCatalog.register("labels", lambda: record)
MetadataCatalog.get("labels").set(stuff_classes=["a", "b"], ignore_label=255)
MetadataCatalog.get("boxes").set(json_file=f"{folder}/two.json", thing_classes=["cat"],
                                 thing_dataset_id_to_contiguous_id={7: 0})

def evaluate(rank):
    init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    box = Instances((9, 9), pred_boxes=Boxes(torch.tensor([[0.0, 0.0, 50.0, 100.0]])),
                    scores=torch.tensor([0.9]), pred_classes=torch.tensor([0]))
    for evaluator, sample, output in (
        (InstanceEvaluator("boxes"), {"image_id": rank + 1}, {"instances": box}),
        (SemanticEvaluator("labels"), record[rank], {"sem_seg_labels": torch.zeros(4, 4, dtype=torch.int64)}),
    ):
        evaluator.reset()
        evaluator.process([sample], [output])
        result = evaluator.evaluate()
        assert (result is None) == (rank == 1)
        if result:
            print(json.dumps(result), flush=True)

start_processes(evaluate, nprocs=2, start_method="fork")
"""


def test_two_processes_are_one_evaluation(tmp_path: Path, run_python: Any) -> None:
    content = json.loads(Path(annotations(tmp_path)).read_text())
    content["images"].append({"id": 2, "height": 100, "width": 100})
    content["annotations"].append({**content["annotations"][0], "id": 2, "image_id": 2})
    (tmp_path / "two.json").write_text(json.dumps(content))
    for i in range(2):
        Image.fromarray(np.full((4, 4), i, np.uint8)).save(tmp_path / f"{i}.png")
    boxes, labels = map(json.loads, run_python(_TWO_PROCESSES, str(tmp_path)).splitlines())
    assert boxes["bbox"]["AP"] == pytest.approx(100)  # one process alone would find half
    assert labels["sem_seg"]["pACC"] == pytest.approx(50)


def test_allowed_pairs_of_a_dataset(cfg: CfgNode, register: Any, tmp_path: Path) -> None:
    (tmp_path / "pairs.json").write_text('{"house": ["building"]}')
    record = {"file_name": "1.jpg", "sem_seg_file_name": str(tmp_path / "labels.png")}
    shared = {"ignore_label": 255, "evaluator_type": "sem_seg"}
    name = register([record], stuff_classes=["house", "building"], **shared)
    other = register([record], stuff_classes=["sky"], **shared)
    cfg.TEST.SEMANTIC.ALLOWED_PAIRS = [f"{name}:{tmp_path}/pairs.json"]
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "labels.png")
    for dataset, is_relaxed in ((name, True), (other, False)):
        evaluator = build_evaluator(cfg, dataset)
        evaluator.reset()
        evaluator.process([record], [{"sem_seg_labels": torch.zeros(4, 4, dtype=torch.int64)}])
        assert ("mIoU_relaxed" in evaluator.evaluate()["sem_seg"]) == is_relaxed
    cfg.TEST.SEMANTIC.ALLOWED_PAIRS = ["pairs.json"]
    with pytest.raises(ValueError, match="ALLOWED_PAIRS: 'pairs.json' does not read name:file.json"):
        build_evaluator(cfg, name)
    cfg.TEST.SEMANTIC.ALLOWED_PAIRS = [f"{name}x:pairs.json"]
    with pytest.raises(ValueError, match="is not registered"):
        build_evaluator(cfg, name)
