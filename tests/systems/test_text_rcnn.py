"""R-CNN with a text classifier."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from clipdense.regions import TextClassifier
from clipdense.run.config import add_clipdense_config
from clipdense.systems.text_rcnn import TextBoxPredictor

from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage

CLASSES = ["red star", "blue star", "green ring"]


@pytest.fixture
def dataset() -> str:
    name = "text_rcnn_test"
    DatasetCatalog.register(name, list)
    MetadataCatalog.get(name).thing_classes = CLASSES
    yield name
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


def config(dataset: str, *overrides: object) -> CfgNode:
    cfg = get_cfg()
    add_clipdense_config(cfg)
    cfg.merge_from_file(str(Path(__file__).parents[2] / "configs/shapes/mask_rcnn_clip_rn.yaml"))
    cfg.merge_from_list(
        ["DATASETS.TRAIN", (dataset,), "DATASETS.TEST", (), "MODEL.ROI_HEADS.NUM_CLASSES", len(CLASSES)]
        + ["MODEL.CLIP.PRETRAINED", "random", *overrides]
    )
    return cfg


def table(folder: Path, names: list[str] | None, rows: int = len(CLASSES)) -> str:
    path = folder / "table.npy"
    np.save(path, np.random.default_rng(0).normal(size=(rows, 16)).astype(np.float16))
    if names is not None:
        Path(f"{path}.json").write_text(json.dumps({"classes": names}))
    return str(path)


def images(training: bool) -> list[dict[str, object]]:
    torch.manual_seed(0)
    inputs: list[dict[str, object]] = []
    for _ in range(2):
        image = torch.randint(0, 255, (3, 96, 128), dtype=torch.uint8)
        inputs.append({"image": image, "height": 96, "width": 128})
        if training:
            instances = Instances((96, 128))
            instances.gt_boxes = Boxes(torch.tensor([[10.0, 10, 60, 60], [50, 20, 120, 80]]))
            instances.gt_classes = torch.tensor([0, 2])
            instances.gt_masks = BitMasks(torch.ones(2, 96, 128, dtype=torch.bool))
            inputs[-1]["instances"] = instances
    return inputs


def test_logits_are_scaled_cosines() -> None:
    torch.manual_seed(0)
    text = torch.randn(4, 8)
    classifier = TextClassifier(5, text * 7, temperature=0.1)
    x = torch.randn(6, 5)
    logits = classifier(x)
    z = classifier.project(x)
    for k in range(4):
        torch.testing.assert_close(logits[:, k], F.cosine_similarity(z, text[k : k + 1]) / 0.1)
    torch.testing.assert_close(logits[:, 4], F.cosine_similarity(z, classifier.background) / 0.1)


def test_zero_background_has_logit_zero() -> None:
    classifier = TextClassifier(5, torch.randn(4, 8), background="zero", learn_temperature=False)
    assert (classifier(torch.randn(6, 5))[:, -1] == 0).all()
    assert {n for n, p in classifier.named_parameters() if p.requires_grad} == {
        "project.weight",
        "project.bias",
    }


@pytest.mark.parametrize("kwargs", [{"background": "none"}, {"temperature": 0.0}])
def test_unknown_settings_are_refused(kwargs: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="must be"):
        TextClassifier(5, torch.randn(4, 8), **kwargs)


@pytest.mark.parametrize("agnostic", [True, False])
def test_trains_and_detects(dataset: str, tmp_path: Path, agnostic: bool) -> None:
    cfg = config(
        dataset,
        *("MODEL.TEXT_RCNN.TABLE", table(tmp_path, CLASSES)),
        *(
            "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG",
            agnostic,
            "MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK",
            agnostic,
        ),
    )
    model = build_model(cfg)
    predictor = model.roi_heads.box_predictor
    assert isinstance(predictor, TextBoxPredictor)
    assert predictor.bbox_pred.out_features == (4 if agnostic else 12)
    text = predictor.cls_score.text.clone()
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.01)
    with EventStorage():
        losses = model(images(training=True))
    assert {"loss_cls", "loss_box_reg", "loss_mask"} <= set(losses)
    sum(losses.values()).backward()
    optimizer.step()
    assert torch.equal(predictor.cls_score.text, text)
    assert predictor.cls_score.project.weight.grad.abs().sum() > 0
    assert predictor.cls_score.background.grad.abs().sum() > 0
    assert predictor.cls_score.log_scale.grad != 0

    model.eval()
    predictor.test_score_thresh = 0.0
    with torch.no_grad():
        (first, _) = model(images(training=False))
    found = first["instances"]
    assert len(found) > 0 and found.pred_masks.shape[1:] == (96, 128)
    assert found.pred_classes.max() < len(CLASSES) and found.scores.max() <= 1


def test_names_are_encoded_without_a_table(
    dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLIPDENSE_CACHE", str(tmp_path))
    torch.manual_seed(0)
    predictor = TextBoxPredictor(config(dataset), ShapeSpec(channels=4))
    text = predictor.cls_score.text
    assert text.shape == (3, 128)
    torch.testing.assert_close(text.norm(dim=1), torch.ones(3))
    assert (text @ text.T - torch.eye(3)).abs().max() > 0  # as random as its tower, but of different names
    assert not torch.equal(text[0], text[1])


def test_table_rows_follow_the_data_sets_order(dataset: str, tmp_path: Path) -> None:
    """An index decides which row is whose; without one, rows are taken in order."""
    path = table(tmp_path, CLASSES[::-1])
    rows = F.normalize(torch.from_numpy(np.load(path)).float(), dim=1)
    built = TextBoxPredictor(config(dataset, "MODEL.TEXT_RCNN.TABLE", path), ShapeSpec(channels=4))
    torch.testing.assert_close(built.cls_score.text, rows.flip(0))
    Path(f"{path}.json").unlink()
    built = TextBoxPredictor(config(dataset, "MODEL.TEXT_RCNN.TABLE", path), ShapeSpec(channels=4))
    torch.testing.assert_close(built.cls_score.text, rows)


def test_tables_lie_below_the_data_root_too(
    dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table(tmp_path, CLASSES)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    TextBoxPredictor(config(dataset, "MODEL.TEXT_RCNN.TABLE", "table.npy"), ShapeSpec(channels=4))
    with pytest.raises(FileNotFoundError, match="no.npy"):
        TextBoxPredictor(config(dataset, "MODEL.TEXT_RCNN.TABLE", "no.npy"), ShapeSpec(channels=4))


def test_wrong_class_lists_are_refused(dataset: str, tmp_path: Path) -> None:
    shape = ShapeSpec(channels=4)
    with pytest.raises(ValueError, match="'green ring'"):
        path = table(tmp_path, ["red star", "blue star", "green rings and more"])
        TextBoxPredictor(config(dataset, "MODEL.TEXT_RCNN.TABLE", path), shape)
    Path(f"{tmp_path}/table.npy.json").unlink()
    with pytest.raises(ValueError, match="3 classes"):
        TextBoxPredictor(config(dataset, "MODEL.TEXT_RCNN.TABLE", table(tmp_path, None, rows=4)), shape)
    with pytest.raises(ValueError, match="NUM_CLASSES is 5"):
        keys = ("MODEL.TEXT_RCNN.TABLE", table(tmp_path, CLASSES), "MODEL.ROI_HEADS.NUM_CLASSES", 5)
        TextBoxPredictor(config(dataset, *keys), shape)
    with pytest.raises(ValueError, match="different class lists"):
        TextBoxPredictor(config(dataset, "DATASETS.TEST", ("shapes_closed_val",)), shape)
    with pytest.raises(ValueError, match="DATASETS.TRAIN"):
        TextBoxPredictor(config(dataset, "DATASETS.TRAIN", ()), shape)


def test_real_table_of_coco(data_dir: Path) -> None:
    """OpenAI ViT-B/32: nearest neighbours of some class names are what they should be."""
    cfg = config("coco_2017_val", "MODEL.ROI_HEADS.NUM_CLASSES", 80)
    cfg.MODEL.TEXT_RCNN.TABLE = str(data_dir / "text_embeddings/detic_coco80_vitb32.npy")
    text = TextBoxPredictor(cfg, ShapeSpec(channels=4)).cls_score.text
    assert text.shape == (80, 512)
    names = MetadataCatalog.get("coco_2017_val").thing_classes
    similar = text @ text.T - 2 * torch.eye(80)
    nearest = {name: names[i] for name, i in zip(names, similar.argmax(1).tolist(), strict=True)}
    expected = {"bicycle": "motorcycle", "car": "truck", "cat": "dog", "spoon": "fork", "toaster": "oven"}
    assert {name: nearest[name] for name in expected} == expected


def test_learned_temperature_starts_where_it_is_told(dataset: str, tmp_path: Path) -> None:
    path = table(tmp_path, CLASSES)
    cfg = config(dataset, "MODEL.TEXT_RCNN.TABLE", path, "MODEL.TEXT_RCNN.TEMPERATURE", 0.05)
    classifier = TextBoxPredictor(cfg, ShapeSpec(channels=4)).cls_score
    assert (
        math.isclose(classifier.log_scale.exp().item(), 20, rel_tol=1e-5)
        and classifier.log_scale.requires_grad
    )
    cfg.MODEL.TEXT_RCNN.LEARN_TEMPERATURE = False
    assert not TextBoxPredictor(cfg, ShapeSpec(channels=4)).cls_score.log_scale.requires_grad
