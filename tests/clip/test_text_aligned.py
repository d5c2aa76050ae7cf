"""Text-aligned DINO behind `load_clip`: published files, own files, dense maps, and texts."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from clipdense.checkpoint import CheckpointError
from clipdense.clip import TowerRequest, load_clip
from clipdense.clip.aligned_configs import ALIGNED_MODELS
from clipdense.clip.dinotxt import DinoTxtHead, patch_text
from clipdense.clip.model import build_clip
from clipdense.clip.text import TextBank

SIZES = {"embed_dim": 48, "depth": 2, "num_heads": 3}
TEMPLATES = ("a {}.", "the {} in a photo.")


def tiny(name: str) -> dict[str, Any]:
    config = deepcopy(ALIGNED_MODELS[name])
    model = config["model_cfg"]
    text = {"width": 32, "heads": 2, "layers": 2}
    if model["vision_cfg"]["head_layers"]:
        text["embed_dim"] = 96
        model["vision_cfg"]["head_hidden"] = 64
    model["embed_dim"] = 96 if model["vision_cfg"]["part"] == "image" else 48
    model["vision_cfg"] |= {"trunk_sizes": SIZES, "image_size": 8 * (14 if "14" in name else 16)}
    model["text_cfg"] |= text
    return config


@pytest.fixture(autouse=True)
def configs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CLIPDENSE_CACHE", str(tmp_path / "cache"))
    for name in list(ALIGNED_MODELS):
        monkeypatch.setitem(ALIGNED_MODELS, name, tiny(name))


def random_model(name: str) -> Any:
    """Random weights, also of what is built as 0 or 1."""
    torch.manual_seed(0)
    clip = load_clip(name, "random")
    with torch.no_grad():
        for key, p in clip.named_parameters():
            if key != "logit_scale":
                p.add_(0.05 * torch.randn_like(p))
    return clip


def published_files(clip: Any, folder: Path, together: bool) -> Path:
    """Write the files of a dino.txt under published names; its text attention has no biases."""
    state = clip.state_dict()
    head: dict[str, Tensor] = {}
    text: dict[str, Tensor] = {}
    renames = (("fc1_g", "w1"), ("fc1_x", "w2"), ("mlp.fc2", "mlp.w3"), ("blocks.", "block_list."))
    for key, value in state.items():
        name = key.removeprefix("visual.head.").removeprefix("text.")
        if key.startswith("visual.head."):
            for ours, theirs in renames:
                name = name.replace(ours, theirs)
            head[name] = value
        elif key.endswith("in_proj_bias"):
            assert (value == 0).all()
        elif key == "text.text_projection":
            text["head.linear_projection.weight"] = value.T.contiguous()
        elif key.startswith("text."):
            for ours, theirs in (
                ("transformer.resblocks.", "blocks."),
                ("ln_1.", "attention_norm."),
                ("ln_2.", "ffn_norm."),
                ("attn.in_proj_weight", "attention.qkv.weight"),
                ("attn.out_proj.", "attention.proj."),
                ("mlp.c_", "feed_forward.c_"),
                ("c_fc", "fc1"),
                ("c_proj", "fc2"),
            ):
                name = name.replace(ours, theirs)
            text[f"backbone.{name}"] = value
    folder.mkdir()
    trunk = {k.removeprefix("visual.trunk."): v for k, v in state.items() if k.startswith("visual.trunk.")}
    save_file({k: v.contiguous() for k, v in trunk.items()}, folder / "trunk.safetensors")
    if together:
        whole = {
            f"visual_model.head.{k.replace('block_list.', 'blocks.')}": v.contiguous()
            for k, v in head.items()
        }
        whole |= {f"text_model.{k}": v.clone() for k, v in text.items()}
        save_file(whole | {"logit_scale": state["logit_scale"].reshape(1)}, folder / "dinotxt.safetensors")
    else:
        save_file(head, folder / "head.safetensors")
        save_file(text, folder / "text.safetensors")
    return folder


@pytest.mark.parametrize("name", [name for name in ALIGNED_MODELS if name.startswith("dinotxt")])
def test_published_files_of_dinotxt(name: str, tmp_path: Path) -> None:
    clip = random_model(name)
    with torch.no_grad():
        for key, p in clip.named_parameters():
            if key.endswith("in_proj_bias"):
                p.zero_()
    folder = published_files(clip, tmp_path / "published", together="dinov3" in name)
    loaded = load_clip(name, str(folder))
    assert all(torch.equal(value, clip.state_dict()[key]) for key, value in loaded.state_dict().items())
    (folder / "trunk.safetensors").unlink()
    with pytest.raises(CheckpointError, match="give the folder with all files: DINO's weights"):
        load_clip(name, str(folder))


@pytest.mark.parametrize("name", list(ALIGNED_MODELS))
def test_saved_file_needs_no_name(name: str, tmp_path: Path) -> None:
    clip = random_model(name)
    clip.save(tmp_path / "model.safetensors")
    images, tokens = torch.rand(2, 3, 56, 70), clip.tokenize(["a cat", "a red star"])
    for loaded in (
        load_clip(tmp_path / "model.safetensors"),
        load_clip(name, str(tmp_path / "model.safetensors")),
    ):
        assert torch.equal(loaded.encode_text(tokens), clip.encode_text(tokens))
        if not name.startswith("talk"):
            assert torch.equal(loaded.encode_image(images), clip.encode_image(images))
        assert loaded.pixel_mean == (0.485, 0.456, 0.406)
    assert load_clip(tmp_path / "model.safetensors", text=False).text is None


@torch.no_grad()
def test_parts_of_dinotxt() -> None:
    """Patches and their half of the text, or whole images and the whole text, in the same weights."""
    patches, image = random_model("dinotxt-vitl14-reg4"), random_model("dinotxt-vitl14-reg4-image")
    image.load_state_dict(patches.state_dict())
    pixels = torch.rand(1, 3, 60, 70)  # 60 is stretched to 70
    stretched = F.interpolate(pixels, (70, 70), mode="bicubic")
    tokens = patches.visual.trunk.forward_features(stretched)
    aligned = patches.visual.head(tokens)
    output = patches.visual(pixels, TowerRequest(dense="plain", pre=True, pooled=True))
    expected = aligned[:, 5:].transpose(1, 2).reshape(1, 48, 5, 5)
    torch.testing.assert_close(output.dense, expected)
    torch.testing.assert_close(output.pre, tokens[:, 5:].transpose(1, 2).reshape(1, 48, 5, 5))
    assert not torch.allclose(output.pre, output.dense)
    torch.testing.assert_close(image.encode_image(pixels), DinoTxtHead.image_features(aligned, 5))
    torch.testing.assert_close(output.pooled, image.encode_image(pixels)[:, 48:])
    ids = patches.tokenize([t.format(n) for n in ("cat", "dog") for t in TEMPLATES])
    whole = image.encode_text(ids)
    torch.testing.assert_close(patches.encode_text(ids), whole[:, 48:])
    bank = TextBank(patches, TEMPLATES, cache_dir=None)
    torch.testing.assert_close(bank(["cat", "dog"]), patch_text(whole.reshape(2, 2, 96)))
    with pytest.raises(ValueError, match="use the model without -image in its name"):
        image.visual(pixels, TowerRequest(dense="plain"))


@torch.no_grad()
def test_talk2dino_averages_prompts_before_its_projection(tmp_path: Path) -> None:
    clip = random_model("talk2dino-vitb14-reg4")
    text: Any = clip.text
    ids = clip.tokenize([t.format(n) for n in ("cat", "dog") for t in TEMPLATES])
    raw = text.unfinished(ids)
    published = text.projection.embed_classes(raw.reshape(2, 2, -1))
    bank = TextBank(clip, TEMPLATES, cache_dir=None)
    torch.testing.assert_close(bank(["cat", "dog"]), published)
    each = F.normalize(clip.encode_text(ids), dim=-1).reshape(2, 2, -1).mean(1)
    assert not torch.allclose(F.normalize(each, dim=-1), published, atol=1e-4)
    pixels = torch.rand(1, 3, 56, 70)
    tokens = clip.visual.trunk.forward_features(pixels)
    dense = clip.visual(pixels, TowerRequest(dense="plain")).dense
    torch.testing.assert_close(dense, tokens[:, 5:].transpose(1, 2).reshape(1, 48, 4, 5))

    state = clip.state_dict()
    folder = tmp_path / "published"
    folder.mkdir()
    parts: dict[str, dict[str, Tensor]] = {"projection": {}, "clip": {}, "dino": {}}
    for key, value in state.items():
        if key.startswith("text.projection."):
            older = key.removeprefix("text.projection.").replace("hidden_layers.0", "linear_layer2")
            parts["projection"][older] = value
        elif key.startswith("visual.trunk."):
            parts["dino"][key.removeprefix("visual.trunk.")] = value
        else:
            parts["clip"][key.removeprefix("text.")] = value
    parts["clip"]["visual.conv1.weight"] = torch.zeros(2)  # CLIP's image tower is not used
    for part, tensors in parts.items():
        save_file({k: v.contiguous() for k, v in tensors.items()}, folder / f"{part}.safetensors")
    loaded = load_clip("talk2dino-vitb14-reg4", str(folder))
    assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())


@torch.no_grad()
def test_zero_shot_segmentation_takes_them() -> None:
    from clipdense.clip.vocabulary import Vocabulary
    from clipdense.systems.training_free import DenseEncoder, WindowSettings, ZeroShotSegmentor

    clip = random_model("dinotxt-dinov3-vitl16")
    encoder = DenseEncoder(clip, "clip", windows=WindowSettings(window=64, stride=32))
    model = ZeroShotSegmentor(encoder=encoder, templates="single").eval()
    model.set_vocabulary(Vocabulary.from_names(["cat", "sofa"]))
    image = torch.randint(0, 256, (3, 70, 90), dtype=torch.uint8)
    (output,) = model([{"image": image, "height": 35, "width": 45}])
    assert output["sem_seg"].shape == (2, 35, 45) and output["sem_seg"].isfinite().all()
    with pytest.raises(ValueError, match="method 'sclip' needs a ViT"):
        DenseEncoder(clip, "sclip")


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no weights named for 'talk2dino-vitb14-reg4': pass a folder"):
        load_clip("talk2dino-vitb14-reg4")
    with pytest.raises(FileNotFoundError, match="no weight file in"):
        load_clip("talk2dino-vitb14-reg4", str(tmp_path))
    assert build_clip("x", tiny("talk2dino-vitb14-reg4"), text=False).text is None
