"""Published DenseCLIP detectors as our models, converted or by themselves; what does not fit is refused."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from clipdense.checkpoint import CheckpointError, convert_model, read_checkpoint
from clipdense.clip import load_clip
from clipdense.engine.build import build_model
from clipdense.engine.checkpoint import TrainingCheckpointer
from clipdense.engine.options import ConfigError
from clipdense.engine.run_config import run_config
from clipdense.run.conversion import convert_weights
from clipdense.run.setup import load_config, read_config, setup
from clipdense.run.weights import check_weight_classes
from tests.helpers import denseclip_files as files

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

OPTIONS = {"MODEL.CLIP.CONFIG.text_cfg.heads": 2, "MODEL.LANGUAGE.CONTEXT_DECODER.HEADS": 2}


def write(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def config(folder: Path, weights: Path, **model: Any) -> str:
    """A config file whose MODEL has these keys, and heads as the tiny files have them."""
    tiny = {
        "CLIP": {"CONFIG": {"text_cfg": {"heads": 2}}},
        "LANGUAGE": {"CONTEXT_DECODER": {"HEADS": 2}},
        "DEVICE": "cpu",
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({"VERSION": 2, "MODEL": {"WEIGHTS": str(weights), **tiny, **model}}))
    return str(path)


# ---- conversion


def test_retinanet(tmp_path: Path) -> None:
    content = files.retinanet()
    done = convert_weights(write(tmp_path / "r.pth", content), tmp_path / "r.safetensors", options=OPTIONS)
    assert (done.layout, done.num_tensors) == ("denseclip_retinanet", len(content["state_dict"]))
    assert done.classes == list(files.CLASSES)
    assert done.dropped == {"not part of the model": ["meta", "optimizer"]}
    read = read_checkpoint(tmp_path / "r.safetensors")
    assert read.metadata["layout"] == "clipdense" and read.metadata["source"] == "denseclip_retinanet"
    assert read.metadata["options"] == {"config": done.options}
    assert read.metadata["thing_classes"] == list(files.CLASSES)
    state, theirs = read.state, content["state_dict"]
    # anchor 1 of ours is scale 0, ratio 1, which is anchor 3 of theirs (ratio 1, scale 0)
    ours = state["head.cls_score.weight"].unflatten(0, (9, 3))
    assert torch.equal(ours[1], theirs["bbox_head.retina_cls.weight"].unflatten(0, (9, 3))[3])
    assert torch.equal(state["head.bbox_pred.bias"][4:8], theirs["bbox_head.retina_reg.bias"][12:16])
    assert torch.equal(state["backbone.top_block.p6.weight"], theirs["neck.fpn_convs.3.conv.weight"])
    assert torch.equal(state["backbone.fpn_output5.bias"], theirs["neck.fpn_convs.2.conv.bias"])
    assert torch.equal(state["backbone.bottom_up.text.prompts.contexts"], theirs["contexts"])


def test_options_are_read_from_the_tensors(tmp_path: Path) -> None:
    retinanet = convert_weights(
        write(tmp_path / "r.pth", files.retinanet()), tmp_path / "r.safetensors", options=OPTIONS
    ).options
    expected = {
        "MODEL.META_ARCHITECTURE": "DenseCLIPRetinaNet",
        "MODEL.CLIP.POSITION_RULE": "crop",
        "MODEL.CLIP.POSITION_GRID": files.GRID,
        "MODEL.CLIP.CONFIG.embed_dim": files.JOINT,
        "MODEL.CLIP.CONFIG.vision_cfg.layers": [1, 1, 1, 1],
        "MODEL.CLIP.CONFIG.text_cfg.context_length": files.CONTEXTS + 5,
        "MODEL.CLIP.CONFIG.text_cfg.heads": 2,
        "MODEL.LANGUAGE.N_CONTEXTS": files.CONTEXTS,
        "MODEL.LANGUAGE.CLASSES": list(files.CLASSES),
        "MODEL.LANGUAGE.SCORE": "scaled",
        "MODEL.LANGUAGE.LAST_MAP": "trunk",
        "MODEL.LANGUAGE.TAU": 0.07,
        "MODEL.PIXEL_TEXT.WEIGHT": 1.0,
        "MODEL.FPN.TOP_BLOCK": "LastLevelP6P7NoReLU",
        "MODEL.RETINANET.NUM_CLASSES": 3,
        "MODEL.RETINANET.NUM_CONVS": 2,
        "MODEL.RETINANET.RULES": "mmdetection",
        "MODEL.RETINANET.SMOOTH_L1_LOSS_BETA": 0.0,
    }
    assert {key: retinanet[key] for key in expected} == expected
    rcnn = convert_weights(
        write(tmp_path / "m.pth", files.mask_rcnn()), tmp_path / "m.safetensors", options=OPTIONS
    ).options
    expected = {
        "MODEL.META_ARCHITECTURE": "DenseCLIPRCNN",
        "MODEL.FPN.TOP_BLOCK": "LastLevelMaxPool",
        "MODEL.ROI_HEADS.NUM_CLASSES": 3,
        "MODEL.ROI_BOX_HEAD.FC_DIM": 12,
        "MODEL.ROI_BOX_HEAD.NUM_FC": 2,
        "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 7,
        "MODEL.ROI_MASK_HEAD.NUM_CONV": 4,
    }
    assert {key: rcnn[key] for key in expected} == expected


def test_the_dense_map_in_place_of_the_last_is_read_from_the_neck(tmp_path: Path) -> None:
    content = files.mask_rcnn()
    state = content["state_dict"]
    state["neck.lateral_convs.3.conv.weight"] = torch.zeros(files.NECK, files.JOINT + 3, 1, 1)
    done = convert_weights(write(tmp_path / "m.pth", content), tmp_path / "m.safetensors", options=OPTIONS)
    assert done.options["MODEL.LANGUAGE.LAST_MAP"] == "dense"


BREAKS: dict[str, tuple[Callable[[dict[str, Any]], Any], list[str]]] = {
    "lacks two": (
        lambda s: [s.pop("gamma"), s.pop("neck.lateral_convs.1.conv.bias")],
        ["lacks gamma", "lacks neck.lateral_convs.1.conv.bias"],
    ),
    "lacks what sizes are read from": (
        lambda s: [s.pop("text_encoder.text_projection"), s.pop("bbox_head.retina_cls.weight")],
        ["lacks text_encoder.text_projection", "lacks bbox_head.retina_cls.weight"],
    ),
    "lacks the only one that shows a size": (lambda s: s.pop("contexts"), ["it lacks contexts"]),
    "other shapes": (
        lambda s: s.update(
            {
                "context_decoder.out_proj.1.weight": torch.zeros(5, 8),
                "text_encoder.text_projection": torch.zeros(3, 5),
                "backbone.layer1.0.conv1.weight": torch.zeros(4, 2, 1, 1),
            }
        ),
        [
            "has context_decoder.out_proj.1.weight (5, 8), not (16, 8)",
            "has text_encoder.text_projection (3, 5), not (16, 16)",
            "has backbone.layer1.0.conv1.weight (4, 2, 1, 1), not (2, 2, 1, 1)",
        ],
    ),
    "no square grid": (
        lambda s: s.update({"backbone.attnpool.positional_embedding": torch.zeros(12, 64)}),
        ["has backbone.attnpool.positional_embedding (12, 64), not (10, 64)"],
    ),
    "other channels": (
        lambda s: s.update({"bbox_head.retina_reg.bias": torch.zeros(35)}),
        ["bbox_head.retina_reg.bias (35,): channels are not a multiple of 9 anchors"],
    ),
    "one key more": (
        lambda s: s.update({"backbone.extra": torch.zeros(2), "neck.extra": torch.zeros(1)}),
        ["has backbone.extra, which is unknown", "has neck.extra, which is unknown"],
    ),
}


@pytest.mark.parametrize("case", BREAKS)
def test_what_does_not_fit_is_refused(tmp_path: Path, case: str) -> None:
    change, messages = BREAKS[case]
    content = files.retinanet()
    change(content["state_dict"])
    source = write(tmp_path / "r.pth", content)
    with pytest.raises(CheckpointError) as caught:
        convert_weights(source, tmp_path / "r.safetensors", options=OPTIONS)
    for message in (str(source), *messages):
        assert message in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["r.pth"]


def test_other_classes_are_refused(tmp_path: Path) -> None:
    source, target = write(tmp_path / "r.pth", files.retinanet()), tmp_path / "r.safetensors"
    with pytest.raises(CheckpointError, match="class 1: 'traffic light' in the file, 'car' expected"):
        convert_weights(source, target, classes=["person", "car", "cell phone"], options=OPTIONS)
    with pytest.raises(CheckpointError, match="3 classes in the file, 2 expected"):
        convert_weights(source, target, classes=["person", "traffic light"], options=OPTIONS)
    assert not target.exists()
    convert_weights(source, target, classes=["Person", "traffic light ", "cell phone"], options=OPTIONS)


def test_a_bare_file_lists_no_classes(tmp_path: Path) -> None:
    source, target = write(tmp_path / "r.pth", files.retinanet(classes=None)), tmp_path / "r.safetensors"
    done = convert_weights(source, target, options=OPTIONS)
    assert done.classes is None and "MODEL.LANGUAGE.CLASSES" not in done.options and not done.dropped
    done = convert_weights(source, target, classes=["a", "b", "c"], options=OPTIONS)
    assert done.classes == done.options["MODEL.LANGUAGE.CLASSES"] == ["a", "b", "c"]
    with pytest.raises(CheckpointError, match="heads have 3 classes, but 2 class names"):
        convert_weights(source, target, classes=["a", "b"], options=OPTIONS)


@pytest.mark.parametrize(
    "key, value, message",
    [
        (
            "MODEL.LANGUAGE.TAUU",
            1.0,
            "unknown config key MODEL.LANGUAGE.TAUU. Did you mean MODEL",
        ),
        ("MODEL.LANGUAGE.TAU", "hot", "MODEL.LANGUAGE.TAU must be of type float, got 'hot'"),
    ],
)
def test_wrong_options_are_named(tmp_path: Path, key: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        convert_weights(
            write(tmp_path / "r.pth", files.retinanet()), tmp_path / "r.safetensors", options={key: value}
        )


def test_heads_that_do_not_divide_the_widths(tmp_path: Path) -> None:
    options = {"MODEL.CLIP.CONFIG.text_cfg.heads": 3, "MODEL.LANGUAGE.CONTEXT_DECODER.HEADS": 2}
    with pytest.raises(CheckpointError, match="the model cannot be built"):
        convert_weights(
            write(tmp_path / "r.pth", files.retinanet()), tmp_path / "r.safetensors", options=options
        )


def test_files_of_other_layouts(tmp_path: Path) -> None:
    own = write(tmp_path / "own.pth", {"head.weight": torch.zeros(1)})
    assert convert_model(read_checkpoint(own)).state.keys() == {"head.weight"}
    with pytest.raises(CheckpointError, match="is of no known layout. Known: .*denseclip_retinanet"):
        convert_weights(own, tmp_path / "x.safetensors")
    published = write(tmp_path / "r.pth", files.retinanet())
    with pytest.raises(CheckpointError, match="r.pth is not a CLIP but DenseCLIP's RetinaNet.*MODEL.WEIGHTS"):
        load_clip(published, quick_gelu=True)


# ---- MODEL.WEIGHTS


@pytest.mark.parametrize("kind", ["retinanet", "mask_rcnn"])
def test_a_published_file_loads_by_itself(tmp_path: Path, kind: str) -> None:
    """As its conversion does, to the bit; and it can be trained on."""
    source = write(tmp_path / "r.pth", getattr(files, kind)())
    target = tmp_path / "r.safetensors"
    convert_weights(source, target, options=OPTIONS)
    models = []
    for weights in (source, target):
        cfg = load_config(config(tmp_path, weights))
        models.append(build_model(cfg).eval())
        TrainingCheckpointer(models[-1]).load_weights(str(weights))
    states = [model.state_dict() for model in models]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    image = torch.randint(0, 255, (3, 75, 93), dtype=torch.uint8)
    with torch.no_grad():
        found = [model([{"image": image}])[0]["instances"] for model in models]
    assert torch.equal(found[0].scores, found[1].scores)
    if kind == "retinanet":
        empty, one = Instances((75, 93)), Instances((75, 93))
        empty.gt_boxes, empty.gt_classes = Boxes(torch.zeros(0, 4)), torch.zeros(0, dtype=torch.long)
        one.gt_boxes, one.gt_classes = Boxes(torch.tensor([[3.0, 4.0, 60.0, 50.0]])), torch.tensor([2])
        with EventStorage():
            losses = models[0].train()([{"image": image, "instances": x} for x in (empty, one)])
        assert set(losses) == {"loss_cls", "loss_box_reg", "loss_pixel_text"}
        assert all(torch.isfinite(loss) and loss > 0 for loss in losses.values())


def test_what_the_config_says_wins_and_a_conflict_is_printed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = write(tmp_path / "r.pth", files.retinanet())
    path = config(
        tmp_path,
        source,
        CLIP={"PRETRAINED": "openai", "POSITION_RULE": "bilinear", "CONFIG": {"text_cfg": {"heads": 2}}},
        PIXEL_MEAN=[122.771, 116.746, 104.094],  # rounded: no conflict
    )
    cfg = load_config(path, ["MODEL.LANGUAGE.TAU", "0.1"])
    assert cfg.MODEL.CLIP.POSITION_RULE == "bilinear" and cfg.MODEL.LANGUAGE.TAU == 0.1
    assert cfg.MODEL.CLIP.CONFIG.text_cfg.heads == 2 and cfg.MODEL.CLIP.CONFIG.text_cfg.width == files.TEXT
    assert cfg.MODEL.META_ARCHITECTURE == "DenseCLIPRetinaNet" and cfg.MODEL.PIXEL_MEAN[0] == 122.771
    assert cfg.MODEL.CLIP.PRETRAINED == "random"  # everything is in the file
    printed = [r.getMessage() for r in caplog.records if r.name == "clipdense.run.weights"]
    assert len(printed) == 4
    for start in (
        f"MODEL.CLIP.POSITION_RULE keeps bilinear from the config, but {source} needs crop",
        "MODEL.LANGUAGE.TAU keeps 0.1",
        "MODEL.CLIP.CONFIG.text_cfg.heads keeps 2",
        "MODEL.LANGUAGE.CONTEXT_DECODER.HEADS keeps 2",
    ):
        assert any(line.startswith(start) for line in printed), printed


def test_a_published_file_is_there_whole(tmp_path: Path) -> None:
    """Also for training, which files of our own may begin from in parts."""
    content = files.retinanet()
    del content["state_dict"]["bbox_head.retina_cls.bias"]
    source = write(tmp_path / "r.pth", content)
    model = build_model(load_config(config(tmp_path, source)))
    with pytest.raises(CheckpointError, match="head.cls_score.bias: not in the file"):
        TrainingCheckpointer(model).load_weights(str(source))
    TrainingCheckpointer(model, skip=["head.cls_score.*"]).load_weights(str(source))


@pytest.fixture
def dataset(request: pytest.FixtureRequest) -> str:
    name = f"denseclip_convert_{request.node.name}"
    DatasetCatalog.register(name, list)
    MetadataCatalog.get(name).set(evaluator_type="coco", thing_classes=list(files.CLASSES))
    yield name
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


def check(*arguments: Any) -> None:
    loaded = read_config(*arguments)
    check_weight_classes(run_config(loaded.cfg), loaded.weights)


def test_classes_of_weights_and_data(tmp_path: Path, dataset: str) -> None:
    path = config(tmp_path, write(tmp_path / "r.pth", files.retinanet()))
    data = ["DATASETS.TRAIN", "()", "DATASETS.TEST", f"('{dataset}',)"]
    check(path, data)
    check(path)  # no data, no question
    MetadataCatalog.remove(dataset)
    MetadataCatalog.get(dataset).set(evaluator_type="coco", thing_classes=["person", "bus"])
    with pytest.raises(ConfigError, match="3 classes in the file, 2 expected\n  class 1: 'traffic light'"):
        check(path, data)
    options = ["OUTPUT_DIR", str(tmp_path / "out"), *data]
    with pytest.raises(ConfigError, match="was trained on other classes.*(.|\n)*MODEL.WEIGHTS_SKIP"):
        setup(argparse.Namespace(config_file=path, opts=options, resume=False, eval_only=True))
    assert not (tmp_path / "out").exists()
    check(path, [*data, "MODEL.LANGUAGE.CLASSES", "('person', 'a bus')"])


def test_a_lazy_config_is_told_what_weights_need(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = write(tmp_path / "r.pth", files.retinanet())
    path = tmp_path / "lazy.py"
    path.write_text(f"train = dict(init_checkpoint={json.dumps(str(source))})\n")
    load_config(str(path))
    assert "needs these yacs keys" in caplog.text
    assert "MODEL.CLIP.POSITION_RULE: crop" in caplog.text
