"""CLIPSelf's EVA02 and OpenAI-style ViTs: files, dense maps, RoPE, regions and mask tokens."""

import json
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from clipdense.checkpoint import CheckpointMismatch, account, detect_layout
from clipdense.clip import ClipModel, TowerRequest, load_clip
from clipdense.clip.attention import TokenStream, get_mode
from clipdense.clip.layouts import config_from_tensors
from clipdense.clip.mask_tokens import embed_mask_tokens
from clipdense.clip.model import build_clip
from clipdense.clip.position import POSITION_RULES, rope_table
from clipdense.regions import pool_boxes, pool_masks

FEATURES = (1e-5, 0.0)
ROPE = (1e-6, 0.0)
FULL_SIZE = {
    "clipself_eva02_b16_student": "EVA02-B-16",
    "clipself_eva02_l14_336_student": "EVA02-L-14-336",
}


def _check(golden, results: dict[str, Tensor]) -> None:
    """Every output but the negative controls."""
    expected = {k: v for k, v in golden.part("out").items() if not k.startswith("NEG_")}
    assert expected and set(expected) == set(results)
    for name, value in expected.items():
        atol, rtol = ROPE if name.startswith("rope_") else FEATURES
        torch.testing.assert_close(
            results[name], value, atol=atol, rtol=rtol, msg=lambda m, n=name: f"{n}: {m}"
        )


def _differs(golden, name: str, value: Tensor) -> bool:
    golden.tolerance = FEATURES
    return golden.differs(name, value)


def _eva(golden, path: Path) -> ClipModel:
    """The file's EVA02-CLIP, without a name, so of the sizes that its tensors show."""
    vision, heads = golden.config["vision"], golden.config["text"]["heads"]
    clip = load_clip(path, head_width=vision["head_width"], text_heads=heads)
    clip.visual.trunk.rope.ref_feat_shape = (vision["pt_hw_seq_len"],) * 2  # 16 in every published model
    return clip


def _saved(golden, folder: Path) -> Path:
    save_file(golden.part("state"), folder / "clip.safetensors")
    return folder / "clip.safetensors"


def _dense(clip: ClipModel, image: Tensor, mode: str = "clipself") -> Tensor:
    return F.normalize(clip.visual(image, TowerRequest(dense=mode)).dense, dim=1)


def _antialiased(table, old, new, prefix):
    body = table[prefix:].reshape(1, *old, -1).permute(0, 3, 1, 2)
    body = F.interpolate(body, size=new, mode="bicubic", antialias=True)
    return torch.cat([table[:prefix], body[0].flatten(1).T])


def _check_antialiasing(golden, clip: ClipModel, monkeypatch) -> None:
    """The stored maps of antialiased positions are what antialiasing gives, and not what we give."""
    monkeypatch.setitem(POSITION_RULES, "antialiased", _antialiased)
    names = [k for k in golden.part("out") if k.startswith("NEG_dense_")]
    assert names
    for name in names:
        image = golden.part("in")["image_" + name.split("_")[2]]
        assert _differs(golden, name, _dense(clip, image))
        clip.visual.position_rule = "antialiased"
        assert not _differs(golden, name, _dense(clip, image))
        clip.visual.position_rule = "bicubic"


@pytest.mark.golden(name="cs_eva_dense")
@torch.no_grad()
def test_eva(golden, tmp_path, monkeypatch):
    clip, vision = _eva(golden, _saved(golden, tmp_path)), golden.config["vision"]
    tower, inputs = clip.visual, golden.part("in")
    results: dict[str, Tensor] = {}
    for size in golden.config["sizes"]:
        image, grid = inputs[f"image_{size}"], (size // vision["patch_size"],) * 2
        ropes = []

        def keep_rope(index: int, stream: TokenStream, ropes=ropes) -> TokenStream:
            ropes.append(stream.rope)
            return stream

        out = tower(image, TowerRequest(dense="clipself", pooled=True), hook=keep_rope)
        results[f"cls_{size}"] = out.pooled
        results[f"cls_norm_{size}"] = F.normalize(out.pooled, dim=1)
        results[f"dense_{size}"] = F.normalize(out.dense, dim=1)
        results[f"rope_sin_{size}"], results[f"rope_cos_{size}"] = ropes[-1]
        reference = (vision["pt_hw_seq_len"],) * 2
        assert all(map(torch.equal, ropes[-1], rope_table(grid, vision["head_width"], reference)))
        assert _differs(
            golden, f"rope_cos_{size}", rope_table(grid, vision["head_width"], reference, offset=1)[1]
        )

    last = len(tower.blocks) - 1

    def keep(index: int, stream: TokenStream) -> TokenStream:
        if index > 0:
            results[f"native_tokens_after_block{index - 1}"] = stream.x
        if index == last:
            value = get_mode("clipself")(tower.block(last), stream).x
            results["native_tokens_value_path_last_block"] = value
        return stream

    tower(inputs[f"image_{vision['image_size']}"], TowerRequest(pooled=True), hook=keep)
    del results[f"native_tokens_after_block{last}"]
    results["text"] = clip.encode_text(inputs["tokens"])
    results["text_norm"] = F.normalize(results["text"], dim=1)
    _check(golden, results)
    _check_antialiasing(golden, clip, monkeypatch)
    for size in golden.config["sizes"]:
        for mode in ("plain", "catseg"):
            assert _differs(golden, f"dense_{size}", _dense(clip, inputs[f"image_{size}"], mode))


@pytest.mark.golden(name="cs_eva_roi_mask")
@torch.no_grad()
def test_eva_regions(golden, tmp_path):
    clip, inputs = _eva(golden, _saved(golden, tmp_path)), golden.part("in")
    out = clip.visual(inputs["image"], TowerRequest(dense="clipself", pooled=True))
    grid = out.dense.shape[-2:]
    results = {"dense": F.normalize(out.dense, dim=1)}
    for pooling, suffix in (("clipself_raw", "raw"), ("clipself", "norm")):
        rois = pool_boxes(out.dense, inputs["normed_boxes"], scale=(grid[1], grid[0]), pooling=pooling)
        results[f"roi_{suffix}"] = rois
        results[f"mask_{suffix}"] = pool_masks(out.dense, inputs["masks"], pooling=pooling)
    results["rois_and_image.rois"] = results["roi_norm"]
    results["rois_and_image.image"] = F.normalize(out.pooled, dim=1)
    _check(golden, results)
    plain = clip.visual(inputs["image"], TowerRequest(dense="plain")).dense
    rois = pool_boxes(plain, inputs["normed_boxes"], scale=(grid[1], grid[0]), pooling="clipself_raw")
    assert _differs(golden, "roi_raw", rois)
    assert _differs(golden, "mask_raw", pool_masks(plain, inputs["masks"], pooling="clipself_raw"))


def _released(golden, path: Path, wrapper: str = "state_dict", **changes: Tensor | None) -> Path:
    """The state as CLIPSelf's training saves it, with the stray keys of other released files."""
    state = golden.part("state")
    strays = {k.removeprefix("STRAY_"): v for k, v in golden.part("in").items() if k.startswith("STRAY_")}
    state = {k: v for k, v in {**state, **strays, **changes}.items() if v is not None}
    if wrapper == "module":
        state = {f"module.{k}": v for k, v in state.items()}
    optimizer = {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 1e-5, "params": [0]}]}
    torch.save({"epoch": 6, "name": "tiny", wrapper: state, "optimizer": optimizer, "scaler": {}}, path)
    return path


@pytest.mark.golden(name="ckpt_clipself_student")
@torch.no_grad()
def test_released_students(golden, tmp_path):
    inputs, alias = golden.part("in"), {"logit_scale": None}
    alias["text.logit_scale"] = golden.part("state")["logit_scale"]
    for wrapper, changes in (("state_dict", {}), ("model", {}), ("module", alias)):
        clip = _eva(golden, _released(golden, tmp_path / "student.pt", wrapper, **changes))
        results = {
            "logit_scale_exp": clip.logit_scale.exp(),
            "text_norm": F.normalize(clip.encode_text(inputs["tokens"]), dim=1),
        }
        for size in golden.config["sizes"]:
            out = clip.visual(inputs[f"image_{size}"], TowerRequest(dense="clipself", pooled=True))
            results[f"cls_norm_{size}"] = F.normalize(out.pooled, dim=1)
            results[f"dense_{size}"] = F.normalize(out.dense, dim=1)
        h, w = out.dense.shape[-2:]
        boxes = inputs["normed_boxes"]
        results["roi_norm"] = pool_boxes(out.dense, boxes, scale=(w, h), pooling="clipself")
        _check(golden, results)

    state = golden.part("state")
    swapped = {k: state[k.replace("mlp.w1", "mlp.w2")] for k in state if ".mlp.w1." in k}
    swapped.update({k: state[k.replace("mlp.w2", "mlp.w1")] for k in state if ".mlp.w2." in k})
    clip = _eva(golden, _released(golden, tmp_path / "student.pt", **swapped))
    size = golden.config["sizes"][0]
    assert _differs(golden, f"dense_{size}", _dense(clip, inputs[f"image_{size}"]))


@pytest.mark.golden(name="ckpt_clipself_student")
def test_students_that_do_not_fit(golden, tmp_path):
    """RoPE tables are left out by name; nothing else is."""
    changes = {"visual.rope.other": torch.zeros(1), "visual.norm.bias": None}
    with pytest.raises(CheckpointMismatch) as error:
        _eva(golden, _released(golden, tmp_path / "student.pt", **changes))
    report = error.value.report
    assert report.unexpected == ["visual.trunk.rope.other"] and report.missing == ["visual.trunk.norm.bias"]
    given = [k for k in {**golden.part("state"), **golden.part("in")} if "rope." in k]
    assert list(report.dropped) == ["RoPE tables"] and len(report.dropped["RoPE tables"]) == len(given)


@pytest.mark.golden(manifest="clipself_eva02_*")
def test_full_size_students_map_without_rest(golden):
    """Onto open_clip's model of that name, and onto the one that the tensors show."""
    state = {key: torch.empty(shape, device="meta") for key, shape in golden.shapes.items()}
    layout = detect_layout(state, golden.id)
    assert layout.name == "eva_clip"
    converted = layout.convert(state)
    name = FULL_SIZE[golden.path.stem]
    shown = config_from_tensors(converted, head_width=64, text_heads=None)
    pixels = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    for model_cfg in (open_clip.get_model_config(name), shown):
        with torch.device("meta"):
            clip = build_clip(golden.id, {"model_cfg": model_cfg, "preprocess_cfg": pixels})
        report = account(clip.state_dict(), converted, drops=layout.drops, optional=layout.optional)
        assert report.complete, str(report)
        rope = [k for k in state if ".rope." in k]
        assert {k: len(v) for k, v in report.dropped.items()} == ({"RoPE tables": len(rope)} if rope else {})
        assert len(report.loaded) == len(state) - len(rope) == len(clip.state_dict())
        lost = {k: v for k, v in converted.items() if k != "visual.trunk.blocks.0.attn.v_proj.bias"}
        report = account(clip.state_dict(), lost, drops=layout.drops)
        assert report.missing == ["visual.trunk.blocks.0.attn.v_proj.bias"]
    named = open_clip.get_model_config(name)
    assert shown["text_cfg"].items() >= named["text_cfg"].items()
    assert shown["embed_dim"] == named["embed_dim"]


def _openclip(golden, folder: Path, **settings: object) -> ClipModel:
    """The image tower alone, from a folder with open_clip's config."""
    vision = dict(golden.config["vision"])
    vision["head_width"] = vision["width"] // vision.pop("heads")
    vision["ls_init_value"] = vision.pop("ls_init", None)
    model_cfg = {
        "embed_dim": golden.config["embed_dim"],
        "quick_gelu": golden.config["quick_gelu"],
        "vision_cfg": vision,
        "text_cfg": {},
        **settings,
    }
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model_cfg}))
    state = {"logit_scale": torch.zeros(()), **golden.part("state")}
    save_file(state, folder / "open_clip_model.safetensors")
    return load_clip(f"local-dir:{folder}", text=False)


@pytest.mark.golden(name="cs_openclip_dense_*")
@torch.no_grad()
def test_openclip_vit(golden, tmp_path, monkeypatch):
    clip, inputs, results = _openclip(golden, tmp_path), golden.part("in"), {}
    for h, w in golden.config["sizes"]:
        out = clip.visual(inputs[f"image_{h}x{w}"], TowerRequest(dense="clipself", pooled=True))
        results[f"cls_{h}x{w}"] = out.pooled
        results[f"dense_{h}x{w}"] = F.normalize(out.dense, dim=1)
    boxes, masks, image = inputs["normed_boxes"], inputs["masks"], inputs[f"image_{h}x{w}"]
    scale = (out.dense.shape[3], out.dense.shape[2])
    results["roi_raw"] = pool_boxes(out.dense, boxes, scale=scale, pooling="clipself_raw")
    results["roi_norm"] = pool_boxes(out.dense, boxes, scale=scale, pooling="clipself")
    results["mask_pool_raw"] = pool_masks(out.dense, masks, pooling="clipself_raw")
    results["mask_token_v1_raw"] = embed_mask_tokens(clip.visual, image, masks).flatten(0, 1)
    _check(golden, results)

    _check_antialiasing(golden, clip, monkeypatch)
    whole = embed_mask_tokens(clip.visual, image, torch.ones_like(masks)).flatten(0, 1)
    assert _differs(golden, "mask_token_v1_raw", whole)
    other = _openclip(golden, tmp_path, quick_gelu=not golden.config["quick_gelu"])
    for h, w in golden.config["sizes"]:
        image, name = inputs[f"image_{h}x{w}"], f"dense_{h}x{w}"
        assert _differs(golden, name, _dense(other, image))
        assert _differs(golden, name, _dense(clip, image, "plain"))
        assert _differs(golden, name, _dense(clip, image, "catseg"))
