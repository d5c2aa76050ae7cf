"""OpenAI's CLIP, every intermediate and the token ids, through `load_clip` of a local file."""

from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from clipdense.checkpoint import account, detect_layout
from clipdense.clip import ClipModel, TowerRequest, load_clip
from clipdense.clip.layouts import config_from_tensors
from clipdense.clip.model import build_clip
from clipdense.clip.towers import TransformerTower

FULL_VOCABULARY = 49408


def _load(golden, folder: Path, **settings: object) -> ClipModel:
    """The file's state as a nameless local weight file, its token table scattered to the full vocabulary."""
    state, ids = golden.part("state"), golden.part("in")["vocab_ids"]
    if len(ids):
        table = torch.zeros(FULL_VOCABULARY, state["token_embedding.weight"].shape[1])
        table[ids] = state["token_embedding.weight"]
        state["token_embedding.weight"] = table
    path = folder / "clip.safetensors"
    save_file(state, path)
    heads = golden.args["transformer_heads"]
    return load_clip(path, **{"quick_gelu": True, "text_heads": heads, "head_width": 64, **settings})


def _images(clip: ClipModel, images: Tensor) -> dict[str, Tensor]:
    results: dict[str, Tensor] = {}
    tower = clip.visual
    if not isinstance(tower, TransformerTower):
        out = tower(images, TowerRequest(taps=(2, 3, 4, 5), pooled=True))
        results = {f"visual_layer{i}": tap for i, (tap, _) in enumerate(out.taps, start=1)}
        return {**results, "image_features": out.pooled}

    def keep(index, stream):
        if index > 0:
            results[f"visual_block_{index - 1}"] = stream.x
        return stream

    def keep_input(module, inputs):
        results["visual_tokens_before_ln_pre"] = inputs[0]

    handle = tower.ln_pre.register_forward_pre_hook(keep_input)
    results["image_features"] = tower(images, TowerRequest(pooled=True), hook=keep).pooled
    handle.remove()
    return results


@pytest.mark.golden(case="openai_clip")
@torch.no_grad()
def test_every_output(golden, tmp_path):
    clip, inputs = _load(golden, tmp_path), golden.part("in")
    assert clip.visual.grid == (golden.args["image_resolution"] // clip.visual.stride,) * 2
    assert clip.embed_dim == golden.args["embed_dim"]

    tokens = clip.tokenize(golden.args["texts"])
    assert torch.equal(tokens, inputs["token_ids_bpe"])
    results = _images(clip, inputs["image"])
    for i, state in enumerate(clip.text.states(clip.text.token_embedding(tokens))):
        results[f"text_block_{i}"] = state
    results["text_features"] = clip.encode_text(tokens)
    image, text = F.normalize(results["image_features"], dim=1), F.normalize(results["text_features"], dim=1)
    results["logit_scale_exp"] = clip.logit_scale.exp()
    results["logits_per_image"] = results["logit_scale_exp"] * image @ text.T
    results["logits_per_text"] = results["logits_per_image"].T
    golden.check(results)


@pytest.mark.golden(case="openai_clip")
@torch.no_grad()
def test_negative_controls(golden, tmp_path):
    """Another activation, and other head counts, are seen."""
    inputs = golden.part("in")
    exact = _load(golden, tmp_path, quick_gelu=False)
    assert golden.differs("text_features", exact.encode_text(inputs["token_ids_bpe"]))
    if isinstance(exact.visual, TransformerTower):
        assert golden.differs("image_features", exact.encode_image(inputs["image"]))
    other = _load(golden, tmp_path, head_width=32, text_heads=2 * golden.args["transformer_heads"])
    assert golden.differs("text_features", other.encode_text(inputs["token_ids_bpe"]))
    assert golden.differs("image_features", other.encode_image(inputs["image"]))


@pytest.mark.golden(case="openai_clip")
def test_heads_and_activation_are_asked_for(golden, tmp_path, caplog):
    with pytest.raises(ValueError, match="does not tell its activation: pass quick_gelu"):
        _load(golden, tmp_path, quick_gelu=None)
    _load(golden, tmp_path)
    assert "heads of width 64" not in caplog.text and not caplog.records
    _load(golden, tmp_path, head_width=None)
    assert "heads of width 64" in caplog.text


@pytest.mark.golden(manifest="openai_clip_*")
def test_full_size_files_map_without_rest(golden):
    state = {key: torch.empty(shape, device="meta") for key, shape in golden.shapes.items()}
    layout = detect_layout(state, golden.id)
    assert layout.name == "openai_clip"
    converted = layout.convert(state)
    model_cfg = config_from_tensors(converted, head_width=64, text_heads=None)
    pixels = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    with torch.device("meta"):
        clip = build_clip(golden.id, {"model_cfg": model_cfg, "preprocess_cfg": pixels})
    report = account(clip.state_dict(), converted, drops=layout.drops, optional=layout.optional)
    assert report.complete, str(report)
    assert report.dropped == {"torchscript scalars": ["input_resolution", "context_length", "vocab_size"]}
    assert len(report.loaded) == len(state) - 3 == len(clip.state_dict())

    named = open_clip.get_model_config(golden.id.removeprefix("manifests/openai_clip_") + "-quickgelu")
    for part in ("vision_cfg", "text_cfg"):
        theirs = {k: tuple(v) if isinstance(v, list) else v for k, v in named[part].items() if v is not None}
        ours = {k: tuple(v) if isinstance(v, list) else v for k, v in model_cfg[part].items() if k in theirs}
        assert ours == theirs
    assert model_cfg["embed_dim"] == named["embed_dim"]


@pytest.mark.golden(manifest="openai_clip_*")
def test_full_size_files_that_do_not_fit(golden):
    """A lost key, an extra key and another shape are each named."""
    state = {key: torch.empty(shape, device="meta") for key, shape in golden.shapes.items()}
    layout = detect_layout(state, golden.id)
    whole = layout.convert(state)
    broken = {k: v for k, v in whole.items() if k != "text.ln_final.bias"}
    broken["visual.extra"] = torch.empty(1, device="meta")
    broken["text.text_projection"] = torch.empty(3, 5, device="meta")
    model = {k: v for k, v in whole.items() if "text." in k or "visual." in k or k == "logit_scale"}
    report = account(model, broken, drops=layout.drops, optional=layout.optional)
    assert (report.missing, report.unexpected) == (["text.ln_final.bias"], ["visual.extra"])
    assert list(report.mismatched) == ["text.text_projection"] and not report.complete
    counters = {k: v for k, v in whole.items() if not k.endswith("num_batches_tracked")}
    assert account(model, counters, drops=layout.drops, optional=layout.optional).complete
