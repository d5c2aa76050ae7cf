"""A weight file may describe its model, and nothing else."""

from pathlib import Path

import pytest
import torch

from clipdense.checkpoint import Checkpoint, CheckpointError, config_options
from clipdense.checkpoint.allowed import ALLOWED_KEYS, check_options
from clipdense.run.config import add_clipdense_config
from clipdense.run.keys import config_keys

from detectron2.config import get_cfg


def test_a_description_of_a_model_is_allowed():
    check_options(
        {
            "MODEL.META_ARCHITECTURE": "DenseCLIPRCNN",
            "MODEL.PIXEL_MEAN": [122.7, 116.7, 104.0],
            "MODEL.CLIP.NAME": "ViT-B-16-quickgelu",
            "MODEL.CLIP.PRETRAINED": "random",
            "MODEL.TIMM.PRETRAINED": "",
            "MODEL.CLIP.CONFIG.vision_cfg.timm_model_name": "eva02_base_patch16_clip_224.merged2b",
            "MODEL.LANGUAGE.CLASSES": ["tie / bow tie", "c:d"],
            "MODEL.TWO_STAGE.TEMPLATES": "{}.",
            "MODEL.ANCHOR_GENERATOR.SIZES": [[32, 64], [128.0]],
            "MODEL.CLIP.CONFIG.vision_cfg.patch_size": None,
        },
        "x.safetensors",
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("MODEL.ALLOW_PICKLE", True),
        ("MODEL.CLIP.ALLOW_PICKLE", True),
        ("MODEL.WEIGHTS", "other.pth"),
        ("MODEL.DEVICE", "cuda:1"),
        ("MODEL.WEIGHTS_SKIP", ["*"]),
        ("MODEL.LOAD_PROPOSALS", True),
        ("MODEL.FVLM.TEXT_TABLE", "table.pkl"),
        ("MODEL.FVLM.TEXT_ENCODER.NAME", "hf-hub:evil/evil"),
        ("MODEL.TEXT_RCNN.TABLE", "table.npy"),
        ("MODEL.TWO_STAGE.ADAPTED_CLIP", "clip.pt"),
        ("MODEL.TIMM.KWARGS.checkpoint_path", "evil.pt"),
        ("MODEL.TIMM.KWARGS.pretrained_cfg", "hf-hub:evil/evil"),
        ("OUTPUT_DIR", "elsewhere"),
        ("DATASETS.COCO_JSON", ["a:b:c"]),
        ("SOLVER.MAX_ITER", 1),
        ("INPUT.MIN_SIZE_TEST", 64),
        ("NO.SUCH", 1),
        ("MODEL", {"ALLOW_PICKLE": True}),
        ("MODEL.CLIP", {"PRETRAINED": "evil.pt"}),
    ],
)
def test_other_keys_are_refused(key, value):
    with pytest.raises(
        ValueError, match=f"x.safetensors: its metadata sets {key}, which a weight file may not"
    ):
        check_options({"MODEL.META_ARCHITECTURE": "OVSeg", key: value}, "x.safetensors")


@pytest.mark.parametrize("key", ["MODEL.CLIP.PRETRAINED", "MODEL.TIMM.PRETRAINED"])
@pytest.mark.parametrize("value", ["openai", "evil.pt", "hf-hub:evil/evil", None, ["random"]])
def test_initial_weights_are_random_or_none(key, value):
    with pytest.raises(ValueError, match=rf'x.safetensors: its metadata sets {key} .*may only set "random"'):
        check_options({key: value}, "x.safetensors")


@pytest.mark.parametrize(
    "key", ["MODEL.CLIP.NAME", "MODEL.TIMM.NAME", "MODEL.CLIP.CONFIG.text_cfg.hf_model_name"]
)
@pytest.mark.parametrize(
    "value",
    [
        "hf-hub:evil/evil",
        "evil/evil",
        "local-dir:folder",
        "../evil",
        "evil.pt",
        "EVIL.PT",
        "~evil",
        "c:\\evil",
    ],
)
def test_names_are_not_places(key, value):
    with pytest.raises(ValueError, match=f"x.safetensors: its metadata sets {key} to .*expected a name"):
        check_options({key: value}, "x.safetensors")


@pytest.mark.parametrize("value", [10**9, -(10**9), float("inf"), float("nan")])
def test_numbers_are_bounded(value):
    with pytest.raises(ValueError, match="x.safetensors: .*OUT_CHANNELS.*expected at most"):
        check_options({"MODEL.FPN.OUT_CHANNELS": value}, "x.safetensors")


def test_a_nested_value_is_refused():
    with pytest.raises(ValueError, match="expected a plain value"):
        check_options({"MODEL.CLIP.CONFIG.vision_cfg.timm": {"a": 1}}, "x.safetensors")


def test_the_options_of_a_file_are_checked():
    metadata = {"layout": "clipdense", "options": {"config": {"MODEL.ALLOW_PICKLE": True}}}
    file = Checkpoint(Path("x.safetensors"), {"a": torch.ones(1)}, "safetensors", metadata)
    with pytest.raises(CheckpointError, match="x.safetensors: its metadata sets MODEL.ALLOW_PICKLE"):
        config_options(file)


def test_every_allowed_key_exists():
    cfg = get_cfg()
    add_clipdense_config(cfg)
    known = [*config_keys(cfg), "MODEL.CLIP.CONFIG.", "MODEL.TIMM.KWARGS."]  # nodes that take new keys
    for pattern in ALLOWED_KEYS:
        prefix = pattern.removesuffix("*")
        open_node = prefix.startswith(("MODEL.CLIP.CONFIG.", "MODEL.TIMM.KWARGS."))
        assert open_node or any(
            key == pattern or (prefix != pattern and key.startswith(prefix)) for key in known
        )
