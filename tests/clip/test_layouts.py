"""EVA-CLIP's layout: originals and CLIPSelf's students, with and without a name."""

import json

import pytest
import torch
from safetensors.torch import save_file
from timm.models.eva import Eva
from torch import Tensor

from clipdense.checkpoint import CheckpointMismatch, detect_layout
from clipdense.clip import ClipModel, TowerRequest, load_clip
from tests.helpers import eva_files as files

IMAGES = torch.randn(2, 3, 40, 24, generator=torch.Generator().manual_seed(0))
HEADS = {"head_width": 88, "text_heads": 2}


def _same(a: ClipModel, b: ClipModel) -> None:
    want = TowerRequest(dense="clipself", pooled=True)
    with torch.no_grad():
        ours, theirs = a.visual(IMAGES, want), b.visual(IMAGES, want)
    assert torch.equal(ours.dense, theirs.dense) and torch.equal(ours.pooled, theirs.pooled)
    assert a.state_dict().keys() == b.state_dict().keys()
    assert all(torch.equal(value, b.state_dict()[key]) for key, value in a.state_dict().items())


def test_a_nameless_file_and_what_is_saved_of_it(tmp_path, caplog):
    model = files.clip()
    torch.save({"epoch": 6, "state_dict": files.state(model)}, tmp_path / "student.pt")
    with caplog.at_level("INFO"):
        clip = load_clip(tmp_path / "student.pt", **HEADS)
    _same(clip, model)
    assert "ignored 2 keys (RoPE tables)" in caplog.text
    assert clip.config["model_cfg"]["quick_gelu"] is False
    assert clip.visual.image_size == (32, 32)
    clip.save(tmp_path / "ours.safetensors")
    _same(load_clip(tmp_path / "ours.safetensors"), model)


def test_heads_are_64_wide_unless_told(tmp_path):
    torch.save(files.state(files.clip()), tmp_path / "student.pt")
    with pytest.raises(ValueError, match="width 32 of the text attention cannot be split into heads"):
        load_clip(tmp_path / "student.pt")


def test_an_image_tower_alone_needs_a_name(tmp_path):
    model = files.clip()
    state = {k: v for k, v in files.state(model).items() if not k.startswith("text.")}
    torch.save(state, tmp_path / "visual.pt")
    with pytest.raises(ValueError, match="do not determine the text tower: name the model"):
        load_clip(tmp_path / "visual.pt", **HEADS)
    config = {"model_cfg": {**files.CONFIG, "quick_gelu": False}, "preprocess_cfg": files.PIXELS}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    clip = load_clip(f"local-dir:{tmp_path}", tmp_path / "visual.pt", text=False)
    expected = files.clip()
    expected.text = None
    _same(clip, expected)


def test_no_other_key_is_left_out(tmp_path):
    state = {**files.state(files.clip()), "visual.rope.freqs": torch.zeros(1), "visual.mask": torch.zeros(1)}
    del state["visual.blocks.1.attn.inner_attn_ln.weight"]
    torch.save(state, tmp_path / "student.pt")
    with pytest.raises(CheckpointMismatch) as error:
        load_clip(tmp_path / "student.pt", **HEADS)
    assert error.value.report.unexpected == ["visual.trunk.rope.freqs", "visual.trunk.mask"]
    assert error.value.report.missing == ["visual.trunk.blocks.1.attn.norm.weight"]


def test_logit_scale_of_the_text_tower():
    state = files.state(files.clip())
    layout = detect_layout(state, "a file")
    renamed = {("text.logit_scale" if k == "logit_scale" else k): v for k, v in state.items()}
    assert layout.convert(renamed).keys() == layout.convert(state).keys()
    both = layout.convert({**state, "text.logit_scale": state["logit_scale"]})
    assert {"logit_scale", "text.logit_scale"} <= both.keys()  # the second is then unknown to the model


def test_blocks_of_one_fused_projection():
    """EVA01's and the largest EVA02's: biases of queries and values stay apart from the projection."""
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
    trunk = Eva(**sizes, num_classes=24, global_pool="token")
    state = {f"visual.{key}": value for key, value in trunk.state_dict().items()}
    state["text.ln_final.weight"] = torch.ones(8)
    layout = detect_layout(state, "a file")
    converted = layout.convert(state)
    assert layout.name == "eva_clip" and "visual.trunk.blocks.0.attn.q_bias" in converted
    ours = {key.removeprefix("visual.trunk."): value for key, value in converted.items() if "trunk" in key}
    trunk.load_state_dict(ours)


def _student_of_openai(custom_text: bool) -> dict[str, Tensor]:
    """A ViT of OpenAI's as CLIPSelf trains it, with or without open_clip's `text.`."""
    state = load_clip("shapes-vit").state_dict()
    return {
        f"module.{k if custom_text or not k.startswith('text.') else k.removeprefix('text.')}": v
        for k, v in state.items()
    }


@pytest.mark.parametrize(("custom_text", "name"), [(True, "open_clip"), (False, "openai_clip")])
def test_students_with_openai_towers(tmp_path, custom_text, name):
    state = _student_of_openai(custom_text)
    assert detect_layout({k.removeprefix("module."): v for k, v in state.items()}, "").name == name
    torch.save({"epoch": 6, "name": "x", "state_dict": state, "optimizer": {}}, tmp_path / "student.pt")
    expected = load_clip("shapes-vit")
    _same(load_clip("shapes-vit", tmp_path / "student.pt"), expected)
    save_file({k.removeprefix("module."): v for k, v in state.items()}, tmp_path / "s.safetensors")
    settings = {
        "head_width": 128 // expected.visual.block(0).heads,
        "text_heads": expected.text.transformer.resblocks[0].attn.num_heads,
    }
    quick = expected.config["model_cfg"].get("quick_gelu", False)
    _same(load_clip(tmp_path / "s.safetensors", quick_gelu=quick, **settings), expected)
