"""`clipdense.Predictor`: configs, weights, class names, and equality with evaluation."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import clipdense
from clipdense.backbone.score_map import without_padding
from clipdense.checkpoint import CheckpointError, save_checkpoint
from clipdense.data.loader import build_test_loader
from clipdense.engine.build import build_model
from clipdense.engine.options import ConfigError
from clipdense.run.predictor import Predictor
from clipdense.run.setup import load_config
from tests.helpers.bright_box import CLASSES, check_box, dataset, scene, write_model

from detectron2.config import CfgNode, LazyConfig
from detectron2.data import MetadataCatalog


def test_is_exported() -> None:
    assert clipdense.Predictor is Predictor
    with pytest.raises(AttributeError, match="no attribute 'Predicto'"):
        _ = clipdense.Predicto


def test_config_objects_are_left_alone(config: Path, folder: Path) -> None:
    cfg = load_config(str(config))
    before = copy.deepcopy(cfg)
    weights = folder / "other.pth"
    torch.save({"model": {"level": torch.tensor(300.0)}}, weights)
    predictor = Predictor(cfg, weights, ["INPUT.MIN_SIZE_TEST", 64])
    assert cfg == before and predictor.cfg.INPUT.MIN_SIZE_TEST == 64
    assert len(predictor(scene())["instances"]) == 0  # nothing is brighter than 300
    assert not predictor.model.training
    check_box(Predictor(cfg)(scene()))


def test_gpu_configs_run_without_one(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert Predictor(config, opts=("MODEL.DEVICE", "cuda")).cfg.MODEL.DEVICE == "cpu"
    asked = Predictor(config, opts=("MODEL.DEVICE", "cuda:7"), device="cpu")
    assert asked.cfg.MODEL.DEVICE == "cpu"


def test_classes_of_the_weights_go_before_those_of_the_data(config: Path, tmp_path: Path) -> None:
    predictor = Predictor(config)
    assert predictor.metadata.thing_classes == CLASSES
    test_set = predictor.cfg.DATASETS.TEST[0]
    noting = write_model(tmp_path, test_set, thing_classes=["a", "b", "c"])
    metadata = Predictor(noting).metadata
    assert metadata.thing_classes == ["a", "b", "c"] and metadata.stuff_classes == CLASSES
    assert MetadataCatalog.get(test_set).thing_classes == CLASSES
    # a dataset that is not registered here
    unknown = write_model(tmp_path, "birds_of_elsewhere", thing_classes=["a", "b", "c"])
    assert Predictor(unknown).metadata.get("thing_classes") == ["a", "b", "c"]
    assert "birds_of_elsewhere" not in MetadataCatalog.list()
    own = ("DATASETS.COCO_JSON", "['birds_of_elsewhere:gone.json:gone']")
    assert Predictor(unknown, opts=own).metadata.thing_classes == ["a", "b", "c"]


def test_the_training_set_names_classes_where_there_is_no_test_set(config: Path) -> None:
    name = load_config(str(config)).DATASETS.TEST[0]
    opts = ("DATASETS.TEST", "()", "DATASETS.TRAIN", (name,))
    assert Predictor(config, opts=opts).metadata.thing_classes == CLASSES


@pytest.mark.parametrize(
    "opts, error, message",
    [
        (("MODEL.WEIGHTS", ""), ConfigError, "no trained weights are named: give e.g. MODEL.WEIGHTS"),
        (("MODEL.WEIGHTS", "none.pth"), FileNotFoundError, "none.pth does not exist"),
        (("DATASETS.TEST", "('birds_of_elsewhere',)"), ConfigError, r"no class names.*birds_of_elsewhere"),
        (("DATASETS.TEST", "()"), ConfigError, "no class names.*none is named"),
        (("INPUT.MIN_SIZE_TESTS", "3"), ConfigError, "Did you mean INPUT.MIN_SIZE_TEST"),
    ],
)
def test_errors_name_the_remedy(config: Path, opts: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Predictor(config, opts=opts)


def test_weights_of_another_model_are_refused(config: Path, tmp_path: Path) -> None:
    torch.save({"model": {"other": torch.ones(3)}}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"does not fit the model(.|\n)*level: not in the file"):
        Predictor(config, tmp_path / "other.pth")


def test_weights_bring_the_config_keys_that_they_need(config: Path, tmp_path: Path) -> None:
    weights = tmp_path / "converted.safetensors"
    options = {"config": {"MODEL.RPN.CONV_DIMS": [77], "MODEL.META_ARCHITECTURE": "RetinaNet"}}
    save_checkpoint(weights, {"level": torch.tensor(128.0)}, {"layout": "clipdense", "options": options})
    for source in (config, load_config(str(config))):
        cfg = Predictor(source, weights).cfg
        assert cfg.MODEL.RPN.CONV_DIMS == [77] and cfg.MODEL.META_ARCHITECTURE == "BrightBox"
    named = ("MODEL.RPN.CONV_DIMS", "[66]", "MODEL.WEIGHTS", str(weights))
    for source in (config, load_config(str(config))):
        assert Predictor(source, opts=named).cfg.MODEL.RPN.CONV_DIMS == [66]


def test_published_weights_of_other_classes_are_refused(config: Path, tmp_path: Path) -> None:
    weights, classes = tmp_path / "converted.safetensors", [*CLASSES[:2], "pink box"]
    metadata = {"layout": "clipdense", "options": {"config": {"MODEL.LANGUAGE.CLASSES": classes}}}
    save_checkpoint(weights, {"level": torch.tensor(128.0)}, metadata | {"thing_classes": classes})
    with pytest.raises(ConfigError, match="class 2: 'pink box' in the file, 'blue box' expected"):
        Predictor(config, weights)


def test_mappers_without_augmentations_are_refused(config: Path) -> None:
    with pytest.raises(ConfigError, match="INPUT.MAPPER CropCaptionMapper has no augmentations"):
        Predictor(config, opts=("INPUT.MAPPER", "CropCaptionMapper", "DATASETS.TEST", "('shapes_clip_val',)"))


LAZY = """
import detectron2.data.transforms as T
from tests.helpers.bright_box import BrightBox
from detectron2.config import LazyCall as L
from detectron2.data import DatasetMapper

model = L(BrightBox)()
dataloader = dict(
    test=dict(
        dataset=dict(names={names!r}),
        mapper=L(DatasetMapper)(
            is_train=False,
            augmentations=[L(T.ResizeShortestEdge)(short_edge_length=96, max_size=128)],
            image_format="BGR",
        ),
    )
)
train = dict(output_dir="", init_checkpoint={weights!r}, max_iter=1, device="cuda", seed=0)
"""


def test_lazy_configs(config: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (name,) = load_config(str(config)).DATASETS.TEST
    weights = str(folder / "model.pth")
    path = tmp_path / "lazy.py"
    path.write_text(LAZY.format(names=name, weights=weights))
    predictor = Predictor(path)
    check_box(predictor(scene()), 0)  # BGR: blue comes first
    assert predictor.metadata.thing_classes == CLASSES
    cfg = LazyConfig.load(str(path))
    with pytest.raises(ConfigError, match="no trained weights"):
        Predictor(cfg, opts=["train.init_checkpoint=''"])
    assert cfg.train.init_checkpoint == weights and cfg.train.device == "cuda"
    # class names of other origins
    path.write_text(LAZY.format(names=["unknown"], weights=weights))
    with pytest.raises(ConfigError, match=r"no class names.*\(unknown\).*train\.metadata\.thing_classes"):
        Predictor(path)
    assert Predictor(path, opts=["+train.metadata={thing_classes: [a, b]}"]).metadata.thing_classes == [
        "a",
        "b",
    ]
    write_model(tmp_path, thing_classes=["c", "d"])
    assert Predictor(path, tmp_path / "model.pth").metadata.thing_classes == ["c", "d"]
    del cfg.dataloader.test.mapper
    with pytest.raises(ConfigError, match="dataloader.test.mapper has no augmentations"):
        Predictor(cfg)


@pytest.fixture(scope="module")
def photos(folder: Path) -> list[dict[str, Any]]:
    """Images of sizes that no stride divides; one is stored lying."""
    generator, records = np.random.default_rng(0), []
    for i, (height, width) in enumerate([(90, 130), (121, 75)]):
        noise = generator.integers(0, 255, (height // 5, width // 5, 3), dtype=np.uint8)
        image = Image.fromarray(noise).resize((width, height))
        exif = Image.Exif()
        exif[274] = 6 if i else 1
        path = folder / f"photo{i}.jpg"
        image.save(path, exif=exif)
        records.append({"file_name": str(path), "image_id": i})
        records[-1] |= {"height": width, "width": height} if i else {"height": height, "width": width}
    return records


@pytest.fixture(scope="module")
def language(folder: Path, photos: list[dict[str, Any]]) -> Iterator[tuple[CfgNode, Predictor]]:
    """A Mask R-CNN on a language backbone, with random weights that detect something."""
    with dataset(photos, CLASSES) as name:
        cfg = load_config("configs/shapes/mask_rcnn_clip_rn.yaml")
        cfg.merge_from_list(
            ["DATASETS.TRAIN", (name,), "DATASETS.TEST", (name,), "MODEL.ROI_HEADS.NUM_CLASSES", len(CLASSES)]
            + ["MODEL.TRUNK.NAME", "LanguageTrunk", "MODEL.CLIP.PRETRAINED", "random"]
            + ["MODEL.WEIGHTS", str(folder / "language.pth"), "DATALOADER.NUM_WORKERS", 0]
            + ["INPUT.MIN_SIZE_TEST", 112, "INPUT.MAX_SIZE_TEST", 150]
        )
        torch.manual_seed(0)
        torch.save({"model": build_model(cfg).state_dict()}, cfg.MODEL.WEIGHTS)
        yield cfg, Predictor(cfg)


def test_equals_the_evaluation_loader(language: tuple[CfgNode, Predictor], photos: Any) -> None:
    cfg, predictor = language
    found = 0
    for batch, record in zip(build_test_loader(cfg, cfg.DATASETS.TEST[0]), photos, strict=True):
        with torch.no_grad():
            (expected,) = predictor.model(batch)
        a, b = expected["instances"], predictor(record["file_name"])["instances"]
        assert a.image_size == b.image_size == (record["height"], record["width"])
        for field in ("scores", "pred_classes", "pred_masks"):
            assert torch.equal(a.get(field), b.get(field))
        assert torch.equal(a.pred_boxes.tensor, b.pred_boxes.tensor)
        found += len(a)
    assert found > 0


def test_score_map(language: tuple[CfgNode, Predictor], photos: Any) -> None:
    _, predictor = language
    assert predictor.score_classes == tuple(CLASSES)
    model = predictor.model
    for size in ((96, 128), (100, 130)):
        image = np.random.default_rng(1).integers(0, 255, (*size, 3), dtype=np.uint8)
        scores, names = predictor.score_map(image)
        sample = predictor._load_sample(image)
        with torch.no_grad():
            images = model.preprocess_image([sample])
            expected = model.backbone(images.tensor)["score"]
        assert names == tuple(CLASSES) and scores.dtype == np.float32
        if images.tensor.shape[-2:] == sample["image"].shape[-2:]:
            np.testing.assert_allclose(scores, expected[0], atol=1e-5)
        assert scores.min() >= expected.min() and scores.max() <= expected.max()
    assert not model.backbone._forward_hooks


def test_score_map_leaves_the_padding_out() -> None:
    """A map whose values are the positions of its cells' centres, in pixels."""
    x, y = torch.arange(5) * 32.0 + 16, torch.arange(4) * 32.0 + 16
    positions = torch.stack([x.expand(4, 5), y[:, None].expand(4, 5)])[None]
    same = without_padding(positions, (128, 160), (128, 160))
    torch.testing.assert_close(same, positions)
    cut = without_padding(positions, (128, 160), (64, 128))
    torch.testing.assert_close(cut, positions[..., :2, :4])
    part = without_padding(positions, (128, 160), (128, 150))[0]  # 4.7 cells: five that are narrower
    torch.testing.assert_close(part[0, 0], torch.tensor([16.0, 45, 75, 105, 135]))  # nothing left of 16
    torch.testing.assert_close(part[1], positions[0, 1])
    assert without_padding(positions, (128, 160), (1, 1)).shape == (1, 2, 1, 1)


def test_models_without_score_map_say_so(predictor: Predictor) -> None:
    with pytest.raises(ValueError, match="BrightBox has no score map"):
        predictor.score_map(scene())
