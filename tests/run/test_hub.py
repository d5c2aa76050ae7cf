"""Model folders: packed, pushed, pulled and used, with a stand-in for the hub; nothing pulled is trusted."""

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

from clipdense.checkpoint import Checkpoint, CheckpointError, read_checkpoint, save_checkpoint
from clipdense.data.classes import class_names
from clipdense.engine.options import ConfigError
from clipdense.engine.run_config import run_config
from clipdense.run.config import add_clipdense_config
from clipdense.run.hub import fetch
from clipdense.run.hub_config import portable_keys
from clipdense.run.hub_transfer import Push, pull_model, push_model
from clipdense.run.prediction import Prediction
from clipdense.run.predictor import Predictor
from clipdense.run.predictor_classes import register_stored_classes
from clipdense.run.setup import load_config
from tests.helpers.bright_box import CLASSES, check_box, dataset, scene, write_model
from tests.helpers.hub_server import StubHub, stub_hub

from detectron2.config import get_cfg

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Push]:
    """The output folder of a training, whose dataset nobody else has."""
    folder = tmp_path / "run"
    folder.mkdir()
    with dataset(classes=CLASSES) as name:
        config = write_model(folder, name, thing_classes=CLASSES)
        config.rename(folder / "config.yaml")
        (folder / "model.pth").rename(folder / "model_final.pth")
    (folder / "results.json").write_text(
        '{"bbox/AP": 64.6, "bbox/AP-red box": 7, "ended_by": "SOLVER.MAX_ITER"}'
    )
    log = (
        "Command line: /home/anna/tools/train_net.py --config-file configs/x.yaml OUTPUT_DIR /data/secret/run"
    )
    (folder / "log.txt").write_text(f"[11/30 05:00:00 clipdense]: {log}\n")
    yield Push(folder, "apache-2.0")


@pytest.fixture
def model(run: Push, tmp_path: Path) -> Path:
    """A model folder."""
    return Path(push_model(run, str(tmp_path / "model")))


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[StubHub]:
    with stub_hub(str(tmp_path / "cache")) as server:
        yield server


def edit(folder: Path, **keys: object) -> None:
    content = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump({**content, **keys}))


def check_model(folder: str | Path) -> None:
    predictor = Predictor.from_pretrained(folder)
    assert predictor.metadata.thing_classes == CLASSES
    check_box(predictor(scene()))


def test_a_folder_holds_model_config_and_card(model: Path) -> None:
    assert sorted(p.name for p in model.iterdir()) == ["README.md", "config.yaml", "model.safetensors"]
    check_model(model)
    config = yaml.safe_load((model / "config.yaml").read_text())
    assert config.keys() == {"VERSION", "MODEL", "INPUT"} and "WEIGHTS" not in config["MODEL"]
    card = (model / "README.md").read_text()
    header = yaml.safe_load(card.split("---")[1])
    assert header["license"] == "apache-2.0" and header["pipeline_tag"] == "object-detection"
    assert "| bbox/AP | 64.60 |" in card and "7.00" not in card and "red box, green/box, blue box" in card
    assert "python train_net.py --config-file configs/x.yaml OUTPUT_DIR run" in card
    assert "anna" not in card and "secret" not in card


def test_push_to_the_hub_and_back(
    run: Push, hub: StubHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", hub.token)
    assert push_model(run, "anna/boxes", private=True).startswith(f"{hub.url}/anna/boxes")
    assert sorted(hub.repositories["anna/boxes"]) == ["README.md", "config.yaml", "model.safetensors"]
    check_model("anna/boxes")
    hub.repositories["anna/boxes"]["run_me.py"] = b"raise SystemExit"
    pulled = pull_model("anna/boxes", tmp_path / "copy")
    found = Predictor.from_pretrained(pulled.path).predict(scene())
    assert isinstance(found, Prediction) and found.describe() == "1 blue box"
    assert sorted(p.name for p in pulled.path.iterdir()) == ["README.md", "config.yaml", "model.safetensors"]
    check_model(pulled.path)
    assert not any("run_me" in request for request in hub.asked)


def test_a_private_model_needs_the_token(run: Push, hub: StubHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "/nonexistent")
    with pytest.raises(ConnectionError, match="anna/boxes: the hub does not answer as expected"):
        push_model(run, "anna/boxes")
    assert hub.repositories == {}
    hub.repositories["anna/boxes"] = {"config.yaml": b"VERSION: 2\n"}
    hub.private.add("anna/boxes")
    with pytest.raises(ConnectionError, match="hf auth login") as caught:
        fetch("anna/boxes")
    assert hub.token not in str(caught.value) and "\n" not in str(caught.value)


def test_the_cache_serves_without_the_hub(run: Push, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with stub_hub(str(tmp_path / "cache")) as hub:
        monkeypatch.setenv("HF_TOKEN", hub.token)
        push_model(run, "anna/boxes")
        fetch("anna/boxes")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        asked = len(hub.asked)
        check_model("anna/boxes")
        assert len(hub.asked) == asked
    with pytest.raises(ConnectionError, match="carl/other"):
        fetch("carl/other")


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"_BASE_": "/etc/other.yaml"}, "_BASE_ names another file"),
        (
            {"OUTPUT_DIR": "/tmp/x"},
            "sets OUTPUT_DIR; a model folder may only set keys of MODEL, INPUT and TEST",
        ),
        ({"DATASETS": {"COCO_JSON": ["a:/etc/passwd:b"]}}, "sets DATASETS.COCO_JSON"),
        ({"MODEL": {"ALLOW_PICKLE": True}}, "MODEL.ALLOW_PICKLE, which only the user may set"),
        ({"MODEL": {"WEIGHTS": "other.pth"}}, "MODEL.WEIGHTS, which only the user may set"),
        ({"MODEL": {"CLIP": {"PRETRAINED": "/home/anna/clip.pt"}}}, "not a path, a URL or a hub id"),
        ({"MODEL": {"CLIP": {"PRETRAINED": "hf-hub:evil/clip"}}}, "not a path, a URL or a hub id"),
        ({"MODEL": {"CLIP": {"NAME": "../clip.safetensors"}}}, "not a path, a URL or a hub id"),
        ({"MODEL": {"TIMM": {"PRETRAINED": "../timm.pth"}}}, "not a path, a URL or a hub id"),
        ({"MODEL": {"TEXT_RCNN": {"TABLE": "/data/table.npy"}}}, "not a path, a URL or a hub id"),
        ({"MODEL": {"ROI_HEADS": {"NAME": "http://x.y/z"}}}, "not a path, a URL or a hub id"),
        ({"INPUT": {"CAPTIONS": "/data/captions.json"}}, "not a path, a URL or a hub id"),
        ({"MODEL": {"MASK_FORMER": {"TEST": {"MASK_SOURCE": "/data"}}}}, "not a path, a URL or a hub id"),
    ],
)
def test_configs_of_others_stay_in_their_folder(model: Path, keys: dict[str, object], message: str) -> None:
    edit(model, **keys)
    with pytest.raises(ConfigError, match=message):
        fetch(model)


def test_yaml_tags_run_nothing(model: Path, tmp_path: Path) -> None:
    bad = f"MODEL: !!python/object/apply:os.system ['touch {tmp_path}/ran']\n"
    (model / "config.yaml").write_text(bad)
    with pytest.raises(ConfigError, match="tags that build objects are refused"):
        fetch(model)
    assert not (tmp_path / "ran").exists()


def test_weights_of_others_are_safetensors(model: Path) -> None:
    torch.save({"level": torch.tensor(1.0)}, model / "model.safetensors")
    with pytest.raises(CheckpointError, match="is not a safetensors file"):
        fetch(model)


def test_only_files_of_the_config_are_named(model: Path) -> None:
    """A further weight file lies in the folder, and the config names it without a path."""
    edit(model, MODEL={"CLIP": {"PRETRAINED": "clip.safetensors"}})
    with pytest.raises(FileNotFoundError, match="MODEL.CLIP.PRETRAINED names clip.safetensors"):
        fetch(model)
    save_checkpoint(model / "clip.safetensors", {"a": torch.zeros(1)}, {"layout": "x"})
    expected = ("MODEL.CLIP.PRETRAINED", str(model / "clip.safetensors"))
    assert fetch(model).overrides == expected


def test_names_that_are_neither(tmp_path: Path) -> None:
    for name in ("no_such_folder", "../a/b", "a/b/c"):
        with pytest.raises(FileNotFoundError, match="there is no such folder, and it is not a hub id"):
            fetch(name)
    with pytest.raises(FileNotFoundError, match="there is no config.yaml"):
        fetch(tmp_path)


def test_push_refuses(run: Push, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not an identifier in lower case"):
        push_model(Push(run.run, "Apache 2.0"), str(tmp_path / "x"))
    with pytest.raises(FileNotFoundError, match=r"none\.pth does not exist.*--weights"):
        push_model(Push(run.run, "mit", weights=tmp_path / "none.pth"), str(tmp_path / "x"))
    torch.save({"model": {"other": torch.zeros(1)}}, run.run / "model_final.pth")
    with pytest.raises(CheckpointError, match="does not fit the model"):
        push_model(run, str(tmp_path / "x"))
    assert not (tmp_path / "x").exists()


def test_pull_leaves_other_files_alone(model: Path, tmp_path: Path) -> None:
    target = tmp_path / "mine"
    target.mkdir()
    (target / "thesis.tex").write_text("")
    with pytest.raises(ConfigError, match="holds other files \\(thesis.tex\\)"):
        pull_model(str(model), target)
    (target / "thesis.tex").unlink()
    pull_model(str(model), target)
    check_model(target)
    pull_model(str(model), target)  # replaces the earlier copy


def test_files_that_the_config_names_travel(tmp_path: Path) -> None:
    cfg = load_config(str(ROOT / "configs/shapes/fvlm_vit.yaml"))
    clip = tmp_path / "adapted.safetensors"
    save_checkpoint(clip, {"a": torch.zeros(1)}, {"layout": "x"})
    cfg = copy.deepcopy(cfg)
    cfg.MODEL.CLIP.PRETRAINED = str(clip)
    keys, files = portable_keys(cfg)
    assert keys["MODEL.CLIP.PRETRAINED"] == "clip_pretrained.safetensors" and "OUTPUT_DIR" not in keys
    assert files == {"MODEL.CLIP.PRETRAINED": clip}
    clip.rename(tmp_path / "adapted.pt")
    cfg.MODEL.CLIP.PRETRAINED = str(tmp_path / "adapted.pt")
    with pytest.raises(ConfigError, match=r"convert it with tools/convert_checkpoint\.py"):
        portable_keys(cfg)


def test_a_language_model_travels_with_its_classes_and_without_its_text_tower(tmp_path: Path) -> None:
    """As its datasets, which name the classes, stay behind."""
    from clipdense.engine.build import build_model

    config = str(ROOT / "configs/shapes/denseclip_semantic_fpn_rn.yaml")
    cfg = load_config(config, ["MODEL.DEVICE", "cpu"])
    network = build_model(cfg)
    (tmp_path / "config.yaml").write_text(cfg.dump())
    torch.save({"model": network.state_dict()}, tmp_path / "model_final.pth")
    pushed = fetch(push_model(Push(tmp_path, "mit"), str(tmp_path / "shared")))
    trained = Predictor(str(tmp_path / "config.yaml"), tmp_path / "model_final.pth", device="cpu")
    predictor = Predictor(pushed.config, pushed.weights, pushed.overrides, device="cpu")
    image = torch.randint(0, 255, (64, 64, 3), dtype=torch.uint8).numpy()
    torch.testing.assert_close(predictor(image)["sem_seg"], trained(image)["sem_seg"])
    assert list(predictor.metadata.stuff_classes) == list(trained.metadata.stuff_classes)
    keys = read_checkpoint(pushed.weights).state
    assert len(keys) < len(network.state_dict()) and not any(".text.tower." in key for key in keys)


def test_classes_of_weights_stand_in_for_a_dataset() -> None:
    """A shared folder names no dataset, but a text classifier is built from class names."""
    cfg = get_cfg()
    add_clipdense_config(cfg)
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ()
    run = run_config(cfg)
    register_stored_classes(run, None)
    assert not cfg.DATASETS.TEST
    weights = Checkpoint(Path("a"), {}, "safetensors", {"thing_classes": ["red ball", "blue box"]})
    register_stored_classes(run, weights)
    assert class_names(cfg) == ["red ball", "blue box"]
    (name,) = cfg.DATASETS.TEST
    register_stored_classes(run, Checkpoint(Path("b"), {}, "safetensors", {"thing_classes": ["cat"]}))
    assert (name,) == cfg.DATASETS.TEST  # a dataset that is named stays
