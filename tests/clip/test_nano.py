"""The nano CLIPs: configs in the package, weights beside them."""

import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from open_clip.model import CustomTextCLIP
from safetensors.torch import save_file

from clipdense.checkpoint import CheckpointMismatch, save_checkpoint
from clipdense.clip import TowerRequest, load_clip, nano
from clipdense.clip.nano import NANO_MODELS, nano_config
from clipdense.clip.text import TextBank
from clipdense.data.shapes import world
from clipdense.data.shapes.draw import Rng
from clipdense.data.shapes.pretraining.crops import AnnotatedThing, CropSampler
from clipdense.data.shapes.world import CLASSES

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def room(tmp_path, monkeypatch):
    """A package room without weights."""
    for name in NANO_MODELS:
        shutil.copy(nano._ROOM / f"{name}.json", tmp_path)
    monkeypatch.setattr(nano, "_ROOM", tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", NANO_MODELS)
def test_random_model(name):
    clip = load_clip(name, "random")
    side = 128 if name == "shapes-rn" else 64
    assert (clip.name, clip.embed_dim, clip.image_size) == (name, 128, (side, side))
    assert clip.pixel_mean == clip.pixel_std == (0.5, 0.5, 0.5)
    assert not clip.training and all(p.requires_grad for p in clip.parameters())
    images, tokens = torch.randn(2, 3, side, side), clip.tokenize(["a red star", "blue rings on sand"])
    logits = clip.logit_scale.exp() * clip.encode_image(images) @ clip.encode_text(tokens).T
    assert (clip.logit_bias is not None) == (name == "shapes-siglip")
    logits = logits if clip.logit_bias is None else logits + clip.logit_bias
    logits.square().mean().backward()
    still = [n for n, p in clip.named_parameters() if p.grad is None]
    assert still == []
    out = clip.visual(torch.randn(1, 3, 256, 256), TowerRequest(dense="value"))
    assert out.dense.shape == (1, 128, 256 // clip.visual.stride, 256 // clip.visual.stride)


@pytest.mark.parametrize("name", NANO_MODELS)
def test_the_state_dict_is_open_clips(name):
    config = nano_config(name)["model_cfg"]
    theirs = CustomTextCLIP(**{k: v for k, v in config.items() if k != "custom_text"}).state_dict()
    ours = load_clip(name, "random").state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    assert (config["custom_text"], config["quick_gelu"]) == (True, False)


def test_the_text_towers_are_equal():
    first, *others = (nano_config(name)["model_cfg"]["text_cfg"] for name in NANO_MODELS)
    assert all(other == first for other in others)


@pytest.mark.parametrize("pretrained", [None, ""])
def test_missing_weights_are_named(room, pretrained):
    with pytest.raises(
        FileNotFoundError, match=r"weights of 'shapes-vit' are missing: .*pretrained='random'"
    ):
        load_clip("shapes-vit", pretrained)


def test_shipped_weights(room):
    """One file a tower, in half precision."""
    source = load_clip("shapes-vit", "random")
    state = {k: v.half() if v.is_floating_point() else v for k, v in source.state_dict().items()}
    save_file({k: v for k, v in state.items() if not k.startswith("text.")}, room / "shapes-vit.safetensors")
    save_file({k: v for k, v in state.items() if k.startswith("text.")}, room / "shapes-text.safetensors")
    clip = load_clip("shapes-vit")
    assert all(torch.equal(v, state[k].float()) for k, v in clip.state_dict().items())
    assert torch.equal(load_clip("shapes-vit", text=False).visual.proj, clip.visual.proj)
    with pytest.raises(CheckpointMismatch, match=r"unknown to the model: visual.class_embedding"):
        shutil.copy(room / "shapes-vit.safetensors", room / "shapes-rn.safetensors")
        load_clip("shapes-rn")


def test_class_texts_are_no_narrow_cone():
    clip = load_clip("shapes-vit")
    texts = TextBank(clip, cache_dir=None)(list(CLASSES))
    cosines = (texts @ texts.T)[~torch.eye(len(CLASSES), dtype=torch.bool)]
    assert cosines.mean() < 0.2 and cosines.max() < 0.85
    # first edition: 0.51 and 0.93


@pytest.mark.parametrize("name", NANO_MODELS)
def test_weights_in_the_package_load(name):
    if not nano.nano_path(name).is_file() or not nano.nano_path("shapes-text").is_file():
        pytest.skip(f"{name} has no weights yet")
    clip = load_clip(name)
    assert clip.encode_text(clip.tokenize(["a red star"])).isfinite().all()
    assert sum(nano.nano_path(n).stat().st_size for n in NANO_MODELS if nano.nano_path(n).is_file()) < 25e6


@pytest.mark.parametrize("name", NANO_MODELS)
def test_weights_in_the_package_classify_things(name):
    clip = load_clip(name)
    sampler, rng = CropSampler(clip.image_size[0], 1.0, 0.0), Rng(0, 0)
    crops = []
    for i in range(40):
        scene = world.render(7, i)
        things = [AnnotatedThing(t.category, t.box, t.visible) for t in scene.things]
        crops.append(sampler(scene.image, scene.ground, things, rng))
    pixels = torch.from_numpy(np.stack([c.image for c in crops])).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        scores = clip.encode_image(pixels) @ TextBank(clip, cache_dir=None)(list(CLASSES)).T
    found, true = scores.argmax(1), torch.tensor([c.content[: len(CLASSES)].argmax() for c in crops])
    assert (found == true).float().mean() > 0.6


def test_exports_are_packed_into_the_room(room, tmp_path_factory, monkeypatch):
    torch.manual_seed(0)
    clip, export = load_clip("shapes-rn", "random"), tmp_path_factory.mktemp("run") / "export.safetensors"
    save_checkpoint(export, clip.state_dict(), {"layout": "open_clip", "options": {"name": "shapes-rn"}})
    for words in ([], ["--text"]):
        monkeypatch.setattr(sys, "argv", ["pack_nano.py", str(export), *words])
        runpy.run_path(str(ROOT / "tools/pack_nano.py"), run_name="__main__")
    assert {path.name for path in room.glob("*.safetensors")} == {
        "shapes-rn.safetensors",
        "shapes-text.safetensors",
    }
    packed, state = load_clip("shapes-rn").state_dict(), clip.state_dict()
    assert packed.keys() == state.keys() and all(torch.equal(packed[k], state[k]) for k in state)

    save_checkpoint(export, clip.state_dict(), {"layout": "open_clip", "options": {"name": "RN50"}})
    monkeypatch.setattr(sys, "argv", ["pack_nano.py", str(export)])
    with pytest.raises(SystemExit, match="1"):
        runpy.run_path(str(ROOT / "tools/pack_nano.py"), run_name="__main__")
