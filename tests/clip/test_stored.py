"""Model configs that the file of a CLIP brings are checked before anything is built."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from clipdense.checkpoint import CheckpointError
from clipdense.clip import load_clip


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stored") / "good.safetensors"
    load_clip("shapes-vit").save(path)
    return path


def changed(good: Path, target: Path, keys: tuple[str, ...], value: Any) -> Path:
    """Copy a file with one entry of its config replaced; ``value`` KeyError removes it."""
    metadata = copy.deepcopy(load_clip(good).file_metadata())
    node = metadata["options"]
    for key in keys[:-1]:
        node = node[key]
    if value is KeyError:
        del node[keys[-1]]
    else:
        node[keys[-1]] = value
    save_file(load_file(good), target, {"clipdense": json.dumps(metadata)})
    return target


def test_a_saved_file_needs_no_name(good: Path) -> None:
    clip = load_clip(good)
    assert clip.text is not None and clip.config == load_clip("shapes-vit").config


MODEL = ("config", "model_cfg")


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("config",), {}),
        (MODEL, KeyError),
        (MODEL, [1]),
        ((*MODEL, "vision_cfg"), KeyError),
        ((*MODEL, "text_cfg"), 3),
        ((*MODEL, "vision_cfg"), {}),
        ((*MODEL, "text_cfg"), {}),
        ((*MODEL, "embed_dim"), 10**7),
        ((*MODEL, "embed_dim"), 10**12),
        ((*MODEL, "embed_dim"), "many"),
        ((*MODEL, "vision_cfg", "layers"), 10**6),
        ((*MODEL, "vision_cfg", "layers"), "x"),
        ((*MODEL, "vision_cfg", "image_size"), 0),
        ((*MODEL, "vision_cfg", "patch_size"), 0),
        ((*MODEL, "vision_cfg", "timm_model_name"), "hf-hub:evil/evil"),
        ((*MODEL, "vision_cfg", "timm_model_name"), "no_such_model"),
        ((*MODEL, "text_cfg", "hf_tokenizer_name"), "evil/evil"),
        ((*MODEL, "text_cfg", "hf_model_name"), "evil/evil"),
        ((*MODEL, "text_cfg", "tokenizer_kwargs"), {"trust": "https://evil"}),
        (("config", "preprocess_cfg"), {}),
        (("config", "preprocess_cfg", "mean"), [0.5]),
        (("config", "preprocess_cfg", "std"), ["a", "b", "c"]),
    ],
)
def test_damaged_configs_are_named(good: Path, tmp_path: Path, keys: tuple[str, ...], value: Any) -> None:
    path = changed(good, tmp_path / "odd.safetensors", keys, value)
    with pytest.raises(CheckpointError, match="odd.safetensors"):
        load_clip(path)


def test_tokenizers_that_open_clip_knows_may_be_named(good: Path, tmp_path: Path) -> None:
    name = "timm/ViT-B-16-SigLIP"
    path = changed(good, tmp_path / "x.safetensors", (*MODEL, "text_cfg", "hf_tokenizer_name"), name)
    assert load_clip(path).config["model_cfg"]["text_cfg"]["hf_tokenizer_name"] == name
