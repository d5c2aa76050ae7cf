"""`clipdense.compat` does nothing on a healthy install, and lets detectron2 0.6 evaluate and draw."""

import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clipdense import compat

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.build import print_instances_class_histogram
from detectron2.data.detection_utils import annotations_to_instances
from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    CityscapesSemSegEvaluator,
    COCOEvaluator,
    COCOPanopticEvaluator,
    LVISEvaluator,
    PascalVOCDetectionEvaluator,
    RotatedCOCOEvaluator,
    SemSegEvaluator,
)
from detectron2.layers import ROIAlign, batched_nms, paste_masks_in_image
from detectron2.structures import BitMasks, Boxes, BoxMode, Instances, RotatedBoxes, pairwise_iou_rotated
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.video_visualizer import VideoVisualizer
from detectron2.utils.visualizer import ColorMode, Visualizer

SIZE = 32
BOX = [4.0, 6.0, 20.0, 26.0]  # x0, y0, x1, y1 of the one object of the one image

# ------------------------------------------------------------------------------------ what is supplied

_APPLY = """
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location("compat", sys.argv[1])
compat = importlib.util.module_from_spec(spec)
spec.loader.exec_module(compat)
import numpy as np, PIL.Image
names = {"numpy": set(vars(np)), "pillow": set(vars(PIL.Image))}
supplied, again = compat.apply(), compat.apply()
print(json.dumps({
    "supplied": supplied, "again": again, "numpy": sorted(set(vars(np)) - names["numpy"]),
    "pillow": sorted(set(vars(PIL.Image)) - names["pillow"]), "stub": "detectron2._C" in sys.modules,
    "detectron2": "detectron2" in sys.modules,
}))
"""


def _apply_beside(package: Path, run_python) -> dict:
    return json.loads(run_python(_APPLY, compat.__file__, PYTHONPATH=str(package), PYTHONWARNINGS="error"))


@pytest.fixture
def fake_detectron2(tmp_path):
    package = tmp_path / "detectron2"
    package.mkdir()
    (package / "__init__.py").write_text(
        "raise AssertionError('compat has no reason to import detectron2')\n"
    )
    return package


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_every_user_of_a_removed_name_is_known():
    """The files that `compat` reads are all files of the installed detectron2 that use a removed name."""
    root = Path(importlib.util.find_spec("detectron2").submodule_search_locations[0])
    removed = re.compile(r"\bnp\.(int|float|bool|str|object)\b|\bImage\.LINEAR\b")
    users = {
        p.relative_to(root).as_posix() for p in root.rglob("*.py") if removed.search(p.read_text("utf-8"))
    }
    assert users <= {*compat.NUMPY_USERS, *compat.PILLOW_USERS}


def test_inert_beside_a_healthy_detectron2(fake_detectron2, run_python):
    (fake_detectron2 / "_C.py").write_text("")
    write(fake_detectron2 / "data/build.py", "np.zeros(3, dtype=np.int64)\n")
    write(fake_detectron2 / "data/transforms/transform.py", "Image.BILINEAR\n")
    (fake_detectron2 / "export").mkdir()
    (fake_detectron2 / "export/__init__.py").write_text("if caffe2:\n    from .api import *\n")
    assert _apply_beside(fake_detectron2.parent, run_python) == {
        "supplied": [], "again": [], "numpy": [], "pillow": [], "stub": False, "detectron2": False,
    }  # fmt: skip


def test_supplies_only_what_is_mentioned_and_missing(fake_detectron2, run_python):
    write(fake_detectron2 / "data/build.py", "np.zeros(3, dtype=np.int)\nnp.zeros(3, np.float32)\n")
    write(fake_detectron2 / "structures/masks.py", "np.bool\n")
    (fake_detectron2 / "export").mkdir()
    (fake_detectron2 / "export/__init__.py").write_text("from .api import *\n")
    result = _apply_beside(fake_detectron2.parent, run_python)
    # np.bool is in NumPy 2
    assert result["supplied"] == ["numpy.int", "detectron2._C", "detectron2.export.api"]
    assert result["again"] == []
    assert result["numpy"] == ["int"] and result["pillow"] == [] and result["stub"]


def test_stub_names_the_op_and_the_remedy():
    from detectron2 import _C

    if getattr(_C, "__file__", None):
        pytest.skip("detectron2 is compiled here")
    with pytest.raises(RuntimeError, match=r"box_iou_rotated .*DETECTRON2="):
        pairwise_iou_rotated(RotatedBoxes(torch.zeros(1, 5)), RotatedBoxes(torch.zeros(1, 5)))
    with pytest.raises(RuntimeError, match="nms_rotated"):
        torch.ops.detectron2.nms_rotated(torch.zeros(1, 5), torch.zeros(1), 0.5)
    assert "not compiled" in collect_env_info()


# -------------------------------------------------------------------------- ops that need no extension


def test_axis_aligned_ops_run():
    features = torch.arange(64.0).reshape(1, 1, 8, 8)
    pooled = ROIAlign((2, 2), 1.0, 0, aligned=True)(features, torch.tensor([[0.0, 0.0, 0.0, 8.0, 8.0]]))
    torch.testing.assert_close(pooled, torch.nn.functional.avg_pool2d(features, 4))
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 9.0], [0.0, 0.0, 10.0, 9.0]])
    keep = batched_nms(boxes, torch.tensor([0.9, 0.8, 0.7]), torch.tensor([0, 0, 1]), 0.5)
    assert keep.tolist() == [0, 2]
    masks = paste_masks_in_image(torch.ones(1, 28, 28), torch.tensor([[0.0, 0.0, 5.0, 10.0]]), (10, 10))
    assert masks[0].sum() == 50


def test_bitmask_annotations_and_class_histogram(caplog):
    annotation = {"bbox": BOX, "bbox_mode": BoxMode.XYXY_ABS, "category_id": 1, "iscrowd": 0}
    annotation["segmentation"] = _mask()
    target = annotations_to_instances([annotation], (SIZE, SIZE), mask_format="bitmask")
    assert target.gt_masks.tensor.sum() == _mask().sum()
    with caplog.at_level("INFO"):
        print_instances_class_histogram([{"annotations": [annotation]}], ["cat", "dog"])
    assert "dog" in caplog.text and "1" in caplog.text


# ------------------------------------------------------------------------------------------ evaluators


def _mask() -> np.ndarray:
    mask = np.zeros((SIZE, SIZE), np.uint8)
    mask[int(BOX[1]) : int(BOX[3]), int(BOX[0]) : int(BOX[2])] = 1
    return mask


@pytest.fixture
def dataset(tmp_path):
    """One image with one dog, with the metadata that every evaluator asks for."""
    name = f"compat_{tmp_path.name}"
    Image.fromarray(np.full((SIZE, SIZE, 3), 127, np.uint8)).save(tmp_path / "1.jpg")
    Image.fromarray(_mask()).save(tmp_path / "1_sem.png")
    record = {"file_name": str(tmp_path / "1.jpg"), "image_id": 1, "height": SIZE, "width": SIZE}
    box = [BOX[0], BOX[1], BOX[2] - BOX[0], BOX[3] - BOX[1]]
    polygon = [BOX[0], BOX[1], BOX[2], BOX[1], BOX[2], BOX[3], BOX[0], BOX[3]]
    coco = {
        "info": {},
        "images": [{"id": 1, "file_name": "1.jpg", "height": SIZE, "width": SIZE}],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 2, "iscrowd": 0, "bbox": box, "area": box[2] * box[3],
             "segmentation": [polygon]},
        ],
    }  # fmt: skip
    (tmp_path / "coco.json").write_text(json.dumps(coco))
    DatasetCatalog.register(name, lambda: [{**record, "sem_seg_file_name": str(tmp_path / "1_sem.png")}])
    MetadataCatalog.get(name).set(
        json_file=str(tmp_path / "coco.json"), image_root=str(tmp_path), evaluator_type="coco",
        thing_classes=["cat", "dog"], thing_dataset_id_to_contiguous_id={1: 0, 2: 1},
        stuff_classes=["ground", "dog"], ignore_label=255,
    )  # fmt: skip
    yield name, [record]
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


def _prediction() -> Instances:
    return Instances(
        (SIZE, SIZE),
        pred_boxes=Boxes(torch.tensor([BOX])),
        scores=torch.tensor([0.9]),
        pred_classes=torch.tensor([1]),
        pred_masks=torch.as_tensor(_mask()[None], dtype=torch.bool),
    )


def _evaluate(evaluator, inputs, output) -> dict:
    evaluator.reset()
    evaluator.process(inputs, [output])
    return evaluator.evaluate()


@pytest.mark.parametrize("options", [{}, {"use_fast_impl": False}], ids=["default", "pycocotools"])
def test_coco_evaluator(dataset, tmp_path, options):
    """The default asks for the C++ metric; where it is not compiled, pycocotools' takes its place."""
    name, inputs = dataset
    evaluator = COCOEvaluator(name, output_dir=str(tmp_path), **options)
    results = _evaluate(evaluator, inputs, {"instances": _prediction()})
    assert results["bbox"]["AP"] == pytest.approx(100) and results["segm"]["AP"] == pytest.approx(100)


def test_sem_seg_evaluator(dataset, tmp_path):
    name, inputs = dataset
    scores = torch.nn.functional.one_hot(torch.as_tensor(_mask()).long(), 2).permute(2, 0, 1)
    results = _evaluate(SemSegEvaluator(name, distributed=False), inputs, {"sem_seg": scores})
    assert results["sem_seg"]["mIoU"] == pytest.approx(100)


def test_panoptic_evaluator(tmp_path, dataset):
    pytest.importorskip("panopticapi")
    name, inputs = dataset
    segments = _mask().astype(np.int32) + 1  # 1: ground, 2: dog
    Image.fromarray(np.stack([segments, 0 * segments, 0 * segments], 2).astype(np.uint8)).save(
        tmp_path / "1.png"
    )
    truth = {
        "images": [{"id": 1, "file_name": "1.jpg", "height": SIZE, "width": SIZE}],
        "categories": [{"id": 2, "name": "dog", "isthing": 1}, {"id": 3, "name": "ground", "isthing": 0}],
        "annotations": [
            {"image_id": 1, "file_name": "1.png", "segments_info": [
                {"id": 1, "category_id": 3, "iscrowd": 0, "area": int((segments == 1).sum())},
                {"id": 2, "category_id": 2, "iscrowd": 0, "area": int((segments == 2).sum())},
            ]},
        ],
    }  # fmt: skip
    (tmp_path / "panoptic.json").write_text(json.dumps(truth))
    MetadataCatalog.get(name).set(
        panoptic_json=str(tmp_path / "panoptic.json"), panoptic_root=str(tmp_path),
        stuff_dataset_id_to_contiguous_id={3: 0},
    )  # fmt: skip
    predicted = [{"id": 1, "category_id": 0, "isthing": False}, {"id": 2, "category_id": 1, "isthing": True}]
    output = {"panoptic_seg": (torch.as_tensor(segments), predicted)}
    results = _evaluate(COCOPanopticEvaluator(name, str(tmp_path / "out")), inputs, output)
    assert results["panoptic_seg"]["PQ"] == pytest.approx(100)


def test_pascal_voc_evaluator(tmp_path, dataset):
    name, inputs = dataset
    for folder in ("Annotations", "ImageSets/Main"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "ImageSets/Main/val.txt").write_text("1\n")
    x0, y0, x1, y1 = (int(v) for v in BOX)
    (tmp_path / "Annotations/1.xml").write_text(
        "<annotation><object><name>dog</name><pose>Left</pose><truncated>0</truncated><difficult>0</difficult>"
        f"<bndbox><xmin>{x0 + 1}</xmin><ymin>{y0 + 1}</ymin><xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox>"
        "</object></annotation>"
    )
    MetadataCatalog.get(name).set(dirname=str(tmp_path), split="val", year=2012)
    inputs = [{**inputs[0], "image_id": "1"}]
    with np.errstate(all="ignore"):  # no cat: 0 / 0 in upstream's recall
        results = _evaluate(PascalVOCDetectionEvaluator(name), inputs, {"instances": _prediction()})
    assert results["bbox"]["AP50"] == pytest.approx(
        50
    )  # the mean over dog (100) and cat (no ground truth, 0)


def test_lvis_evaluator_says_what_is_missing(dataset):
    if importlib.util.find_spec("lvis"):
        pytest.skip("lvis is installed; clipdense evaluates LVIS without it")
    with pytest.raises(ModuleNotFoundError, match="lvis"):
        LVISEvaluator(dataset[0])


@pytest.mark.parametrize("evaluator", [CityscapesInstanceEvaluator, CityscapesSemSegEvaluator])
def test_cityscapes_evaluators_say_what_is_missing(dataset, evaluator):
    """detectron2 0.6 imports cityscapesscripts, its main branch another package that contains them."""
    if importlib.util.find_spec("cityscapesscripts"):
        pytest.skip("cityscapesscripts is installed")
    name, inputs = dataset
    with pytest.raises(ModuleNotFoundError, match="cityscapesscripts|deeplearning"):
        _evaluate(
            evaluator(name), inputs, {"instances": _prediction(), "sem_seg": torch.zeros(2, SIZE, SIZE)}
        )


def test_rotated_coco_evaluator(dataset, tmp_path):
    from detectron2 import _C

    if getattr(_C, "__file__", None):
        pytest.skip("detectron2 is compiled here")
    name, inputs = dataset
    prediction = _prediction()
    prediction.remove("pred_masks")
    prediction.pred_boxes = RotatedBoxes(torch.tensor([[12.0, 16.0, 16.0, 20.0, 0.0]]))
    evaluator = RotatedCOCOEvaluator(name, output_dir=str(tmp_path), use_fast_impl=False)
    with pytest.raises(RuntimeError, match="box_iou_rotated"):
        _evaluate(evaluator, inputs, {"instances": prediction})


# ----------------------------------------------------------------------------------------- visualizers


def test_visualizer_draws(dataset, tmp_path):
    name, _ = dataset
    image = np.full((SIZE, SIZE, 3), 127, np.uint8)
    metadata = MetadataCatalog.get(name)
    annotation = {"bbox": BOX, "bbox_mode": BoxMode.XYXY_ABS, "category_id": 1, "iscrowd": 0}
    annotation["segmentation"] = [[4.0, 6.0, 20.0, 6.0, 20.0, 26.0]]
    segments = torch.as_tensor(_mask(), dtype=torch.int32)
    info = [{"id": 1, "category_id": 1, "isthing": True, "score": 0.5}]
    drawings = {
        mode.name: Visualizer(image, metadata, instance_mode=mode).draw_instance_predictions(_prediction())
        for mode in ColorMode
    }
    drawings["truth"] = Visualizer(image, metadata).draw_dataset_dict({"annotations": [annotation]})
    drawings["sem_seg"] = Visualizer(image, metadata).draw_sem_seg(_mask(), area_threshold=0)
    drawings["panoptic"] = Visualizer(image, metadata).draw_panoptic_seg(segments, info, area_threshold=0)
    drawings["video"] = VideoVisualizer(metadata).draw_instance_predictions(image, _prediction())
    for title, drawing in drawings.items():
        drawn = drawing.get_image()
        assert drawn.shape == image.shape, title
        assert (drawn != image).any(), title
    drawings["truth"].save(str(tmp_path / "truth.png"))
    assert Image.open(tmp_path / "truth.png").size == (SIZE, SIZE)


def test_bitmasks_crop_and_resize():
    masks = BitMasks(torch.as_tensor(_mask()[None], dtype=torch.bool))
    assert masks.crop_and_resize(torch.tensor([BOX]), 7).all()


def test_the_list_of_tests_for_every_detectron2_names_tests():
    """The list is read by `make test-detectron2`; this file is in it."""
    root = Path(__file__).resolve().parents[1]
    lines = (root / "tests" / "both_detectron2.txt").read_text().splitlines()
    listed = [line for line in lines if not line.startswith("#")]
    assert "tests/test_compat.py" in listed
    assert [path for path in listed if not (root / path).exists()] == []
