"""`clipdense.Predictor`: images of every kind, the same results as in evaluation, errors."""

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
from clipdense.clip import load_clip
from clipdense.clip.text import TextBank
from clipdense.clip.vocabulary import Vocabulary
from clipdense.data.image import BadImageError, array_to_image, image_to_array, load_image
from clipdense.data.loader import build_test_loader
from clipdense.engine.build import build_model
from clipdense.engine.options import ConfigError
from clipdense.run.predictor import Predictor, remove_background
from clipdense.run.setup import load_config
from tests.helpers.bright_box import BOX, CLASSES, OpenBrightBox, dataset, scene, write_model

from detectron2.config import CfgNode, LazyConfig
from detectron2.data import MetadataCatalog

ORIENTATIONS = range(1, 9)


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


def check(output: dict[str, Any], category: int = 2, box: list[float] = BOX, size: Any = (60, 80)) -> None:
    """The one detection of `scene`, up to what resizing blurs."""
    instances = output["instances"]
    assert instances.image_size == size and instances.pred_classes.tolist() == [category]
    torch.testing.assert_close(instances.pred_boxes.tensor, torch.tensor([box]), atol=1.0, rtol=0)
    assert instances.pred_masks.shape == (1, *size)


def test_is_exported() -> None:
    assert clipdense.Predictor is Predictor
    with pytest.raises(AttributeError, match="no attribute 'Predicto'"):
        _ = clipdense.Predicto


# ---- images


def test_paths_arrays_and_pil_images_are_the_same(predictor: Predictor, tmp_path: Path) -> None:
    Image.fromarray(scene()).save(tmp_path / "a.png")
    outputs = [
        predictor(image)
        for image in (
            tmp_path / "a.png",
            str(tmp_path / "a.png"),
            scene(),
            Image.fromarray(scene()),
            Image.open(tmp_path / "a.png"),  # not decoded yet
        )
    ]
    check(outputs[0])
    for output in outputs[1:]:
        assert torch.equal(output["instances"].pred_boxes.tensor, outputs[0]["instances"].pred_boxes.tensor)
        assert torch.equal(output["instances"].scores, outputs[0]["instances"].scores)


@pytest.mark.parametrize("color", [0, 1, 2])
@pytest.mark.parametrize("channels", ["RGB", "BGR"])
def test_channel_order(config: Path, color: int, channels: str) -> None:
    """The model sees what INPUT.FORMAT says; an image is RGB always."""
    output = Predictor(config, opts=("INPUT.FORMAT", channels))(
        scene(tuple(220 * np.eye(3, dtype=int)[color]))
    )
    check(output, color if channels == "RGB" else 2 - color)


def arrays() -> dict[str, np.ndarray]:
    rgb, grey = scene(), scene()[..., 2]
    return {
        "uint8": rgb,
        "not contiguous": np.ascontiguousarray(rgb[..., ::-1])[..., ::-1],
        "grey": grey,
        "grey with an axis": grey[..., None],
        "RGBA": np.dstack([rgb, np.full_like(grey, 255)]),
        "uint16": rgb.astype(np.uint16) * 257,
        "grey uint16": grey.astype(np.uint16) * 257,
        "bool": grey > 0,
        "float": rgb / 255,
        "float32 to 255": rgb.astype(np.float32),
    }


@pytest.mark.parametrize("kind", arrays())
def test_arrays_of_every_kind(predictor: Predictor, kind: str) -> None:
    array = arrays()[kind]
    before = array.copy()
    colored = array.ndim == 3 and array.shape[2] > 1
    check(predictor(array), 2 if colored else 0)  # grey: all channels are equal, the first wins
    assert np.array_equal(array, before)
    grey = np.repeat(scene()[..., 2:], 3, -1)
    expected = scene() if colored else np.where(grey, 255, 0) if array.dtype == bool else grey
    assert np.array_equal(load_image(array), expected)


def test_transparency_is_white() -> None:
    rgba = np.dstack([scene(), np.full((60, 80), 255, np.uint8)])
    rgba[:5, :, 3] = 0
    assert (load_image(rgba)[:5] == 255).all() and np.array_equal(load_image(rgba)[5:], scene()[5:])


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 4, 2), np.uint8),
        np.zeros((1, 4, 4, 3), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros((3, 40, 50), np.uint8),
        np.zeros((4, 4), np.int64),
        np.full((4, 4), np.nan),
        np.full((4, 4), -0.5),
    ],
)
def test_arrays_that_are_no_images(predictor: Predictor, array: np.ndarray) -> None:
    with pytest.raises(ValueError, match="an image array"):
        predictor(array)


COLORED = ["P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "RGBX", "RGBa"]


@pytest.mark.parametrize("mode", [*COLORED, "1", "L", "LA", "La", "PA", "I", "I;16", "F"])
def test_pil_images_of_every_mode(predictor: Predictor, mode: str) -> None:
    grey = Image.fromarray(scene()[..., 2])
    if mode in COLORED:
        image = Image.fromarray(scene()).convert("RGBA" if mode == "RGBa" else "RGB").convert(mode)
    elif mode in ("I", "I;16", "F"):
        kind, factor = {"I": ("i4", 257), "I;16": ("u2", 257), "F": ("f4", 1)}[mode]
        image = Image.fromarray(np.asarray(grey).astype(kind) * factor)
    else:
        image = grey.convert("LA" if mode in ("La", "PA") else "L").convert(mode)
    assert image.mode == mode
    check(predictor(image), 2 if mode in COLORED else 0)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_exif_gives_upright_coordinates(predictor: Predictor, tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    path = tmp_path / "turned.jpg"
    # as a camera stores it: what shows the scene upright once the tag is applied
    turns = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
    stored = Image.fromarray(scene())
    if orientation > 1:
        stored = stored.transpose(Image.Transpose(turns[orientation]))
    stored.save(path, exif=exif, quality=95)
    check(predictor(path))
    with Image.open(path) as image:
        check(predictor(image))
    # an array has no tag: it is taken as it lies
    size = predictor(np.asarray(stored))["instances"].image_size
    assert size == ((80, 60) if orientation > 4 else (60, 80))


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 2), (500, 40)])
def test_odd_sizes(predictor: Predictor, size: tuple[int, int]) -> None:
    assert predictor(np.full((*size, 3), 250, np.uint8))["instances"].image_size == size


def test_conversions_are_the_files_ones(tmp_path: Path) -> None:
    """An array, and a file that holds it, are the same image."""
    for kind, array in arrays().items():
        if array.dtype in (np.uint8, bool) or kind == "grey uint16":
            array_to_image(array).save(tmp_path / "a.png")
            assert np.array_equal(load_image(tmp_path / "a.png"), load_image(array)), kind
    assert np.array_equal(image_to_array(array_to_image(scene())), scene())


# ---- batches


def test_batches_keep_order_and_go_on_after_bad_images(predictor: Predictor, tmp_path: Path) -> None:
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    images: list[Any] = [
        scene(),
        tmp_path / "bad.jpg",
        scene((220, 0, 0)),
        np.zeros(3),
        tmp_path / "none.png",
    ]
    images += [scene((0, 220, 0))]
    for size in (1, 2, 4, 9):
        outputs = list(predictor.batch(images, batch_size=size))
        assert [type(o) for o in outputs] == [dict, BadImageError, dict, ValueError, FileNotFoundError, dict]
        assert [o["instances"].pred_classes.tolist() for o in outputs[::2] if isinstance(o, dict)] == [
            [2],
            [0],
        ]
        check(outputs[5], 1)
        assert "bad.jpg" in str(outputs[1]) and "none.png" in str(outputs[4])
    first = next(iter(predictor.batch(image for image in images)))  # of any length; nothing is read ahead
    check(first)
    assert list(predictor.batch([])) == []
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        list(predictor.batch(images, batch_size=0))


def test_one_bad_image_raises(predictor: Predictor, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="none.png"):
        predictor(tmp_path / "none.png")


def test_score_threshold(config: Path) -> None:
    dim, bright = scene((0, 0, 150)), scene((0, 0, 250))
    for threshold, found in ((None, 1), (0.5, 1), (0.9, 0)):
        predictor = Predictor(config, score_threshold=threshold)
        assert len(predictor(dim)["instances"]) == found and len(predictor(bright)["instances"]) == 1


# ---- configs, weights, classes


def test_config_objects_are_left_alone(config: Path, folder: Path) -> None:
    cfg = load_config(str(config))
    before = copy.deepcopy(cfg)
    weights = folder / "other.pth"
    torch.save({"model": {"level": torch.tensor(300.0)}}, weights)
    predictor = Predictor(cfg, weights, ["INPUT.MIN_SIZE_TEST", 64])
    assert cfg == before and predictor.cfg.INPUT.MIN_SIZE_TEST == 64
    assert len(predictor(scene())["instances"]) == 0  # nothing is brighter than 300
    assert not predictor.model.training
    check(Predictor(cfg)(scene()))


def test_gpu_configs_run_without_one(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert Predictor(config, opts=("MODEL.DEVICE", "cuda")).cfg.MODEL.DEVICE == "cpu"
    asked = Predictor(config, opts=("MODEL.DEVICE", "none"), device="cpu")
    assert asked.cfg.MODEL.DEVICE == "cpu"


def test_classes_of_the_weights_go_before_those_of_the_data(config: Path, tmp_path: Path) -> None:
    predictor = Predictor(config)
    assert predictor.metadata.thing_classes == CLASSES
    test_set = predictor.cfg.DATASETS.TEST[0]
    noting = write_model(tmp_path, test_set, thing_classes=["a", "b", "c"])
    metadata = Predictor(noting).metadata
    assert metadata.thing_classes == ["a", "b", "c"] and metadata.stuff_classes == CLASSES
    assert MetadataCatalog.get(test_set).thing_classes == CLASSES
    # a data set that is not registered here
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
    options = {"config": {"INPUT.MIN_SIZE_TRAIN": [77], "INPUT.MIN_SIZE_TEST": 77}}
    save_checkpoint(weights, {"level": torch.tensor(128.0)}, {"layout": "clipdense", "options": options})
    for source in (config, load_config(str(config))):
        keys = Predictor(source, weights).cfg.INPUT
        assert keys.MIN_SIZE_TRAIN == (77,) and keys.MIN_SIZE_TEST == 96  # the config file says the latter
    named = ("INPUT.MIN_SIZE_TRAIN", "(66,)", "MODEL.WEIGHTS", str(weights))
    for source in (config, load_config(str(config))):
        assert Predictor(source, opts=named).cfg.INPUT.MIN_SIZE_TRAIN == (66,)


def test_published_weights_of_other_classes_are_refused(config: Path, tmp_path: Path) -> None:
    weights, classes = tmp_path / "converted.safetensors", [*CLASSES[:2], "pink box"]
    options = {"classes": classes, "config": {"MODEL.LANGUAGE.CLASSES": classes}}
    save_checkpoint(weights, {"level": torch.tensor(128.0)}, {"layout": "clipdense", "options": options})
    with pytest.raises(ConfigError, match="class 2: 'pink box' in the file, 'blue box' wanted"):
        Predictor(config, weights)


# ---- vocabularies


def test_an_open_vocabulary_model_looks_for_the_test_sets_classes(config: Path, tmp_path: Path) -> None:
    test_set = load_config(str(config)).DATASETS.TEST[0]
    trained = {"thing_classes": ["red box"]}  # the base classes of the training set
    predictor = Predictor(write_model(tmp_path, test_set, "OpenBrightBox", **trained))
    assert predictor.model.vocabulary.names == tuple(CLASSES)
    assert predictor.metadata.thing_classes == CLASSES
    check(predictor(scene()))
    # a data set that is not registered here
    unknown = write_model(tmp_path, "birds_of_elsewhere", "OpenBrightBox", **trained)
    assert Predictor(unknown).metadata.thing_classes == ["red box"]
    # given words go before both, and need neither
    nameless = write_model(tmp_path, "birds_of_elsewhere", "OpenBrightBox")
    assert Predictor(nameless, vocabulary="sky, blue|azure").metadata.thing_classes == ["sky", "blue"]
    with pytest.raises(ConfigError, match="no class names.*give a vocabulary to an open-vocabulary model"):
        Predictor(nameless)


def test_another_vocabulary_builds_nothing_anew(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    bank = TextBank(load_clip("shapes-rn", "random"), "a photo of a {}.", cache_dir=None)
    encoded: list[str] = []
    fill = bank.templates.__class__.fill
    monkeypatch.setattr(bank.templates.__class__, "fill", lambda s, n: encoded.append(n) or fill(s, n))
    monkeypatch.setattr(OpenBrightBox, "embedder", staticmethod(bank))
    words = tmp_path / "words.txt"
    words.write_text("blue box, azure box\ncat\n")

    predictor = Predictor(write_model(tmp_path, "none", "OpenBrightBox"), vocabulary="red box, cat")
    assert encoded == ["red box", "cat"] and len(predictor(scene())["instances"]) == 0
    modules = list(map(id, predictor.model.modules()))
    weights = [p.data_ptr() for p in (*predictor.model.parameters(), *bank.clip.parameters())]
    predictor.set_vocabulary(words)
    assert encoded[2:] == ["blue box", "azure box"]
    check(predictor(scene()), 0)
    assert predictor.metadata.thing_classes == predictor.metadata.stuff_classes == ["blue box", "cat"]
    predictor.set_vocabulary(["red box", "azure box"])
    assert len(encoded) == 4 and torch.equal(
        predictor.model.text_embeddings()["classes"], bank(["red box", "azure box"])
    )
    assert list(map(id, predictor.model.modules())) == modules
    assert [p.data_ptr() for p in (*predictor.model.parameters(), *bank.clip.parameters())] == weights
    # what cannot be embedded changes nothing
    with pytest.raises(ValueError, match="too long"):
        predictor.set_vocabulary(["green box", "very " * 80 + "long"])
    assert predictor.metadata.thing_classes == ["red box", "azure box"]
    assert predictor.model.vocabulary.names == ("red box", "azure box")


def test_background_words(tmp_path: Path, config: Path) -> None:
    """They are looked for, and left out of every output."""
    predictor = Predictor(
        write_model(tmp_path, "none", "OpenBrightBox"), vocabulary="cat, red", background="blue"
    )
    assert predictor.model.vocabulary.names == ("cat", "red", "blue")
    assert predictor.model.vocabulary.thing == (True, True, False)
    assert predictor.metadata.thing_classes == ["cat", "red"]
    assert len(predictor(scene())["instances"]) == 0
    predictor.set_vocabulary("cat, blue")
    check(predictor(scene()), 1)
    with pytest.raises(ValueError, match="are the same"):
        predictor.set_vocabulary("cat, blue", "Blue")
    # beside the classes of the test set
    test_set = load_config(str(config)).DATASETS.TEST[0]
    predictor = Predictor(write_model(tmp_path, test_set, "OpenBrightBox"), background=["others"])
    assert predictor.model.vocabulary.names == (*CLASSES, "others")
    assert predictor.metadata.thing_classes == CLASSES
    with pytest.raises(ConfigError, match="closed vocabulary"):
        Predictor(config, background="others")


def test_commas_in_the_names_of_the_test_set(tmp_path: Path) -> None:
    with dataset(classes=["red box, crimson box", "cat"]) as name:
        config = write_model(tmp_path, name, "OpenBrightBox")
        for split, first in ((True, ("red box", "crimson box")), (False, ("red box, crimson box",))):
            predictor = Predictor(config, opts=["DATASETS.SPLIT_NAMES", split])
            assert predictor.model.vocabulary.synonyms == (first, ("cat",))


def test_outputs_without_background() -> None:
    scores = torch.tensor([[[0.5, 0.1, 0.0]], [[0.4, 0.2, 0.0]], [[0.3, 0.3, 0.2]]])
    ids, segments = (
        torch.tensor([[1, 2, 3]]),
        [{"id": i, "category_id": c} for i, c in ((1, 0), (2, 2), (3, 1))],
    )
    output = {"sem_seg": scores, "sem_seg_labels": scores.argmax(0), "panoptic_seg": (ids, segments)}
    got = remove_background(output, 2)
    assert torch.equal(got["sem_seg"], torch.tensor([[[0.5, 0, 0]], [[0.4, 0, 0]]]))
    assert got["sem_seg_labels"].tolist() == [[0, -1, -1]]
    assert got["panoptic_seg"][0].tolist() == [[1, 0, 3]]
    assert got["panoptic_seg"][1] == [segments[0], segments[2]]


def test_things_and_stuff_of_a_vocabulary(tmp_path: Path) -> None:
    predictor = Predictor(
        write_model(tmp_path, "none", "OpenBrightBox"),
        vocabulary=Vocabulary((("cat",), ("sky",)), thing=(True, False)),
    )
    assert predictor.metadata.thing_dataset_id_to_contiguous_id == {0: 0}
    assert predictor.metadata.stuff_classes == ["cat", "sky"]


def test_a_closed_vocabulary_stays(config: Path, predictor: Predictor, tmp_path: Path) -> None:
    expected = "BrightBox has a closed vocabulary: .*OpenBrightBox"
    with pytest.raises(ConfigError, match=expected):
        predictor.set_vocabulary("cat")
    assert predictor.metadata.thing_classes == CLASSES
    with pytest.raises(ConfigError, match=expected):  # before the weights are read
        Predictor(config, tmp_path / "none.pth", vocabulary="cat")


@pytest.mark.parametrize(
    "words, error, message",
    [
        ("", ValueError, "at least one class"),
        ("cat, Cat", ValueError, "classes 0 and 1 are the same"),
        ("none.txt", FileNotFoundError, "no class-list file 'none.txt'"),
    ],
)
def test_words_that_are_no_vocabulary(
    tmp_path: Path, words: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Predictor(write_model(tmp_path, "none", "OpenBrightBox"), vocabulary=words)


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
    check(predictor(scene()), 0)  # BGR: blue comes first
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


# ---- real models


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
