"""`load_clip`: names, tags, hub ids, local files; what it decides, says and refuses."""

import json
import logging
from pathlib import Path

import open_clip
import pytest
import torch
from open_clip.constants import OPENAI_DATASET_MEAN
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.transformer import QuickGELU
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from clipdense.checkpoint import CheckpointError, CheckpointMismatch
from clipdense.clip import ClipModel, load_clip, sources
from clipdense.clip.model import build_clip

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.:FutureWarning")

VISION = {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8}
TEXT = {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1}
TINY = {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": TEXT}
SIGLIP = {
    "embed_dim": 128,
    "init_logit_bias": -10,
    "custom_text": True,
    "vision_cfg": {
        "image_size": 64,
        "timm_model_name": "shapes_eva02_patch8_clip_64",
        "timm_pool": "token",
        "timm_proj": None,
    },
    "text_cfg": {**TEXT, "vocab_size": 64, "no_causal_mask": True, "pool_type": "last", "proj_bias": True},
}
MEAN, STD = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """Tiny models, and tags of them, among open_clip's."""
    tags = {
        "openai": {"hf_hub": "somewhere/tiny/", "quick_gelu": True},
        "laion400m_e32": {"url": "u", "mean": MEAN, "std": STD},
    }
    for name, config in {
        "Tiny-8": TINY,
        "Tiny-8-quickgelu": {**TINY, "quick_gelu": True},
        "Tiny-SigLIP": SIGLIP,
    }.items():
        monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, name, config)
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "Tiny-8", tags)
    pixels = {"a": {"mean": (0.5,) * 3, "std": (0.5,) * 3}, "b": {"mean": (0.5,) * 3, "std": (0.5,) * 3}}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "Tiny-SigLIP", pixels)


def _openai_state(seed: int = 0, **vision: object) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return dict(CLIP(24, {**VISION, **vision}, TEXT).state_dict())


def _torchscript(state: dict[str, Tensor], path: Path) -> Path:
    """The state as OpenAI ships it: an object tree with the three size entries."""
    root = nn.Module()
    sizes = {"input_resolution": 32, "context_length": 16, "vocab_size": 49408}
    for key, value in {**state, **{k: torch.tensor(v) for k, v in sizes.items()}}.items():
        *parents, leaf = key.split(".")
        owner = root
        for parent in parents:
            if not hasattr(owner, parent):
                owner.add_module(parent, nn.Module())
            owner = getattr(owner, parent)
        if value.is_floating_point():
            owner.register_parameter(leaf, nn.Parameter(value))
        else:
            owner.register_buffer(leaf, value)
    torch.jit.save(torch.jit.script(root), str(path))
    return path


def _quick(clip: ClipModel) -> bool:
    kinds = {type(b.mlp.gelu) for b in [*clip.visual.blocks, *clip.text.transformer.resblocks]}
    assert len(kinds) == 1
    return kinds == {QuickGELU}


@torch.no_grad()
def _same(clip: ClipModel, state: dict[str, Tensor], quick_gelu: bool) -> bool:
    module = CLIP(24, VISION, TEXT, quick_gelu=quick_gelu)
    module.load_state_dict(state)
    return torch.allclose(clip.encode_image(IMAGES), module.eval().encode_image(IMAGES), atol=1e-5)


# Names


@pytest.mark.parametrize(
    ("name", "near"), [("vit-b-16", "ViT-B-16"), ("RN50x5", "RN50x4"), ("shapes_rn", "shapes-rn")]
)
def test_unknown_names_have_near_matches(name, near):
    with pytest.raises(ValueError, match=rf"unknown CLIP model '{name}'; did you mean .*{near}"):
        load_clip(name, "random")


def test_unknown_tags_have_near_matches():
    with pytest.raises(ValueError, match="neither a file nor a tag of 'Tiny-8'; did you mean openai?"):
        load_clip("Tiny-8", "openia")
    with pytest.raises(ValueError, match="known: openai, laion400m_e32"):
        load_clip("Tiny-8", "xxxxxxxxxxx")


def test_random_weights_only_by_name():
    with pytest.raises(
        ValueError, match="no weights named for 'Tiny-8': pass a file, 'random', or .*: openai, laion"
    ):
        load_clip("Tiny-8")
    clip = load_clip("Tiny-8", "random")
    assert (clip.name, clip.embed_dim, clip.image_size) == ("Tiny-8", 24, (32, 32))
    with pytest.raises(ValueError, match="name a model, or a weight file"):
        load_clip()
    with pytest.raises(ValueError, match="name a model, or a weight file"):
        load_clip("", "random")


def test_openais_spelling_of_names():
    assert sources.resolve("ViT-B/32", "random").name == "ViT-B-32"


@pytest.mark.parametrize(
    "kwargs", [{"model": "a/b.pt"}, {"model": "x.safetensors"}, {"model": "Tiny-8", "pretrained": "a/b.pt"}]
)
def test_missing_files_are_named(kwargs):
    with pytest.raises(FileNotFoundError, match="no weight file"):
        load_clip(**kwargs)


FULL_SIZE = {
    "RN50": ("ResNetTower", 1024, (7, 7)),
    "ViT-B-16": ("ViTTower", 512, (14, 14)),
    "EVA02-B-16": ("TimmViTTower", 512, (14, 14)),
    "ViT-B-16-SigLIP-384": ("TimmViTTower", 768, (24, 24)),
    "convnext_base_w_320": ("ConvNeXtTower", 640, (10, 10)),
}
NO_TOWER = ("coca", "swin", "MobileCLIP", "ViTamin", "vit_relpos")


def _on_meta(name: str) -> ClipModel:
    source = sources.resolve(name, "random")
    text = "hf_model_name" not in source.config["model_cfg"]["text_cfg"]
    with torch.device("meta"):
        return build_clip(name, source.config, text=text)


@pytest.mark.parametrize("name", FULL_SIZE)
def test_full_size_models(name):
    clip = _on_meta(name)
    assert (type(clip.visual).__name__, clip.embed_dim, clip.visual.grid) == FULL_SIZE[name]


@pytest.mark.slow
def test_every_name_is_supported_or_refused():
    """All of open_clip's ResNets, ViTs, EVA-CLIPs, SigLIPs, Perception Encoders, ConvNeXts have a tower."""
    for name in open_clip.list_models():
        if name.startswith(NO_TOWER) and name != "MobileCLIP2-L-14":
            with pytest.raises(ValueError, match="no tower for|is a CoCa|without one square patch"):
                _on_meta(name)
        else:
            clip = _on_meta(name)
            assert clip.visual.grid == tuple(side // clip.visual.stride for side in clip.image_size)


def test_unsupported_models_are_refused():
    with pytest.raises(ValueError, match="'coca_ViT-B-32' is a CoCa"):
        load_clip("coca_ViT-B-32", "random")
    with pytest.raises(ValueError, match="'roberta-ViT-B-32' has a Hugging Face text tower.*text=False"):
        load_clip("roberta-ViT-B-32", "random")
    with pytest.raises(ValueError, match="unknown precision 'fp8'"):
        load_clip("Tiny-8", "random", precision="fp8")


# Tags and the hub


def test_an_unreachable_hub_says_what_to_do(monkeypatch):
    def fail(*args: object, **kwargs: object) -> str:
        raise OSError("name resolution failed")

    monkeypatch.setattr(sources, "download_pretrained", fail)
    monkeypatch.setattr(sources, "download_pretrained_from_hf", fail)
    with pytest.raises(
        ConnectionError,
        match=r"^tag 'openai' of 'Tiny-8' could not.*resolution.* Get https://huggingface.co/somewhere/tiny/"
        r"resolve/main/open_clip_model\.safetensors .* set MODEL\.CLIP\.PRETRAINED .* its path.*HF_HOME",
    ):
        load_clip("Tiny-8", "openai")
    for kwargs in (
        {"model": "hf-hub:someone/clip"},
        {"model": "Tiny-8", "pretrained": "hf-hub:someone/clip"},
    ):
        with pytest.raises(
            ConnectionError,
            match=r"'hf-hub:someone/clip' could not be downloaded .*co/someone/clip/resolve/main/"
            + ("open_clip_config" if "pretrained" not in kwargs else "open_clip_model"),
        ):
            load_clip(**kwargs)


@pytest.mark.parametrize("tag", ["openai", "laion400m_e32"])
def test_the_model_of_a_tag_without_its_weights(monkeypatch, tag):
    monkeypatch.delattr(sources, "download_pretrained")
    assert sources.without_weights("Tiny-8", tag) == f"random:{tag}"
    clip = load_clip("Tiny-8", f"random:{tag}")
    assert _quick(clip) == (tag == "openai")
    assert clip.pixel_mean == (MEAN if tag != "openai" else OPENAI_DATASET_MEAN)
    with pytest.raises(ValueError, match=r"'nope' is neither a file nor a tag"):
        load_clip("Tiny-8", "random:nope")


def test_only_downloads_are_replaced_by_random_weights(tmp_path):
    (tmp_path / "x.pt").touch()
    for model, pretrained in (("shapes-rn", ""), ("", str(tmp_path / "x.pt")), ("Tiny-8", "random")):
        assert sources.without_weights(model, pretrained) == pretrained
    assert sources.without_weights("Tiny-8", str(tmp_path / "x.pt")) == str(tmp_path / "x.pt")
    assert sources.without_weights("hf-hub:someone/clip", "") == "random"
    assert sources.without_weights("Tiny-8", "hf-hub:someone/clip") == "random"


@pytest.mark.parametrize("tag", ["openai", "laion400m_e32"])
def test_the_tag_decides_activation_and_pixels(monkeypatch, tmp_path, caplog, tag):
    state = _openai_state()
    torch.save(state, tmp_path / "x.pt")
    monkeypatch.setattr(sources, "download_pretrained", lambda tag, cache_dir=None: str(tmp_path / "x.pt"))
    caplog.set_level(logging.INFO)
    clip = load_clip("Tiny-8", tag)
    assert _quick(clip) == (tag == "openai") == _same(clip, state, True) != _same(clip, state, False)
    assert ("using QuickGELU, with which its weights were trained" in caplog.text) == (tag == "openai")
    assert clip.pixel_mean == (MEAN if tag != "openai" else OPENAI_DATASET_MEAN)
    assert clip.config["model_cfg"]["quick_gelu"] == (tag == "openai")
    assert not _quick(load_clip("Tiny-8", tag, quick_gelu=False))
    assert ("but its weights were trained with" in caplog.text) == (tag == "openai")


def test_hub_and_local_repositories(monkeypatch, tmp_path):
    config = {"model_cfg": TINY, "preprocess_cfg": {"mean": MEAN, "std": STD}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    state = _openai_state()
    save_file(state, tmp_path / "open_clip_model.safetensors")

    def download(
        identifier: str, filename: str = "open_clip_model.safetensors", cache_dir: str | None = None
    ) -> str:
        assert identifier == "someone/clip"
        return str(tmp_path / filename)

    monkeypatch.setattr(sources, "download_pretrained_from_hf", download)
    for model in ("hf-hub:someone/clip", f"local-dir:{tmp_path}"):
        clip = load_clip(model)
        assert _same(clip, state, False) and (clip.pixel_mean, clip.pixel_std) == (MEAN, STD)
        assert not _same(load_clip(model, "random"), state, False)
    assert _same(load_clip("Tiny-8", "hf-hub:someone/clip"), state, False)
    with pytest.raises(FileNotFoundError, match="no open_clip_config.json"):
        load_clip(f"local-dir:{tmp_path / 'x'}")


# Local files


def test_openais_torchscript_needs_nothing_else(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    state = _openai_state()
    path = _torchscript(state, tmp_path / "clip.pt")
    for args in ((path,), ("", path)):
        clip = load_clip(*args)
        assert clip.name == "clip" and _quick(clip) and _same(clip, state, True)
        assert clip.image_size == (32, 32) and clip.tokenize(["a cat"]).shape == (1, 16)
    assert "heads of width 64" in caplog.text and not [r for r in caplog.records if r.levelno > logging.INFO]
    named = load_clip("Tiny-8", path)
    assert _quick(named) and _same(named, state, True)
    wide = load_clip(path, text_heads=2, head_width=32)
    assert not _same(wide, state, True) and wide.text.transformer.resblocks[0].attn.num_heads == 2


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_a_plain_file_does_not_tell_its_activation(tmp_path, suffix):
    state, path = _openai_state(), tmp_path / f"x.{suffix}"
    save_file(state, path) if suffix == "safetensors" else torch.save({"state_dict": state}, path)
    with pytest.raises(ValueError, match="does not tell its activation"):
        load_clip(path)
    for quick_gelu in (True, False):
        assert _same(load_clip(path, quick_gelu=quick_gelu), state, quick_gelu)
        assert _same(load_clip("Tiny-8", path, quick_gelu=quick_gelu), state, quick_gelu)
    assert _same(load_clip("Tiny-8", path), state, False)
    assert _same(load_clip("Tiny-8-quickgelu", path), state, True)


def test_resnet_file_without_a_name(tmp_path):
    state = _openai_state(layers=(1, 2, 1, 1), width=8, image_size=96, patch_size=None)
    save_file(state, tmp_path / "x.safetensors")
    clip = load_clip(tmp_path / "x.safetensors", quick_gelu=True)
    assert clip.image_size == (96, 96) and clip.visual.tap_channels == {2: 32, 3: 64, 4: 128, 5: 256}
    assert clip.visual.attnpool.num_heads == 4


def test_open_clip_layout(tmp_path):
    torch.manual_seed(0)
    module = CustomTextCLIP(24, VISION, TEXT)
    save_file(module.state_dict(), tmp_path / "x.safetensors")
    for clip in (
        load_clip("Tiny-8", tmp_path / "x.safetensors"),
        load_clip(tmp_path / "x.safetensors", quick_gelu=False),
    ):
        assert clip.state_dict().keys() == module.state_dict().keys()
        assert all(torch.equal(v, module.state_dict()[k]) for k, v in clip.state_dict().items())


@pytest.mark.parametrize("name", ["Tiny-8-quickgelu", "Tiny-SigLIP"])
@torch.no_grad()
def test_our_own_files_need_nothing_else(tmp_path, name):
    clip = load_clip(name, "random")
    clip.save(tmp_path / "mine.safetensors")
    back = load_clip(tmp_path / "mine.safetensors")
    assert back.config == clip.config and back.pixel_mean == clip.pixel_mean
    images = torch.randn(1, 3, *clip.image_size)
    assert torch.equal(back.encode_image(images), clip.encode_image(images))
    tokens = torch.randint(1, 60, (2, 16))
    assert torch.equal(back.encode_text(tokens), clip.encode_text(tokens))
    plain_name = load_clip(name.removesuffix("-quickgelu"), tmp_path / "mine.safetensors")
    assert torch.equal(plain_name.encode_image(images), clip.encode_image(images))

    load_clip(name, "random", text=False).save(tmp_path / "image.safetensors")
    assert load_clip(tmp_path / "image.safetensors").text is None


def test_keys_and_shapes_that_do_not_fit_are_listed(tmp_path):
    state = _openai_state()
    state["visual.proj"] = torch.zeros(64, 25)
    state["visual.more"] = torch.zeros(1)
    del state["ln_final.weight"], state["visual.ln_pre.bias"]
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointMismatch) as caught:
        load_clip("Tiny-8", tmp_path / "x.safetensors")
    report = caught.value.report
    assert sorted(report.missing) == ["text.ln_final.weight", "visual.ln_pre.bias"]
    assert report.unexpected == ["visual.more"] and list(report.mismatched) == ["visual.proj"]
    assert "x.safetensors" in str(caught.value) and "file (64, 25), model (64, 24)" in str(caught.value)


def test_a_larger_position_table_is_never_resized_silently(tmp_path):
    save_file(_openai_state(image_size=48), tmp_path / "x.safetensors")
    with pytest.raises(
        CheckpointMismatch, match=r"visual.positional_embedding: file \(37, 64\), model \(17, 64\)"
    ):
        load_clip("Tiny-8", tmp_path / "x.safetensors")
    assert load_clip("Tiny-8", tmp_path / "x.safetensors", image_size=48).image_size == (48, 48)
    assert load_clip(tmp_path / "x.safetensors", quick_gelu=False).visual.grid == (6, 6)


def test_files_of_other_layouts(tmp_path):
    save_file({"backbone.conv1.weight": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(
        CheckpointError, match="is of no known layout. Known: openai_clip .*first keys: backbone.conv1"
    ):
        load_clip("Tiny-8", tmp_path / "x.safetensors")
    state = {f"visual.trunk.{i}": torch.zeros(1) for i in range(3)} | {"text.ln_final.weight": torch.zeros(2)}
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="do not determine the image tower"):
        load_clip(tmp_path / "x.safetensors", quick_gelu=False)
    save_file({"visual.proj": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="holds one tower of a CLIP: name the model"):
        load_clip(tmp_path / "x.safetensors", quick_gelu=False)


def test_a_file_and_weights_beside_it(tmp_path):
    save_file(_openai_state(), tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="is a weight file: remove pretrained"):
        load_clip(tmp_path / "x.safetensors", "openai")


# The model


def test_text_heads_and_image_size_of_a_named_model():
    clip = load_clip("Tiny-8", "random", text_heads=4, head_width=16, image_size=64)
    assert clip.text.transformer.resblocks[0].attn.num_heads == 4
    assert clip.visual.blocks[0].attn.num_heads == 4
    assert clip.visual.grid == (8, 8) and clip.config["model_cfg"]["vision_cfg"]["image_size"] == 64
    assert load_clip("Tiny-SigLIP", "random", image_size=96).visual.grid == (12, 12)
    with pytest.raises(ValueError, match="is a timm tower, whose config sets its heads"):
        load_clip("Tiny-SigLIP", "random", head_width=32)
    assert open_clip.get_model_config("Tiny-8")["text_cfg"]["heads"] == 1  # the registry is untouched


def test_without_text_tower(tmp_path):
    save_file(_openai_state(), tmp_path / "x.safetensors")
    clip = load_clip("Tiny-8", tmp_path / "x.safetensors", text=False)
    assert clip.text is None and not any(k.startswith("text.") for k in clip.state_dict())
    with pytest.raises(ValueError, match="loaded without its text tower"):
        clip.encode_text(torch.zeros(1, 16, dtype=torch.long))
    assert clip.tokenize(["a cat"]).shape == (1, 16)


@pytest.mark.parametrize("kind", [CLIP, CustomTextCLIP])
@torch.no_grad()
def test_an_open_clip_module_shares_its_parameters(kind):
    module = kind(24, VISION, TEXT, quick_gelu=True).eval()
    clip = load_clip(module)
    tokens = torch.randint(1, 400, (3, 16))
    torch.testing.assert_close(clip.encode_image(IMAGES), module.encode_image(IMAGES), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(clip.encode_text(tokens), module.encode_text(tokens), atol=1e-5, rtol=1e-4)
    assert {id(p) for p in clip.parameters()} == {id(p) for p in module.parameters()}
    assert clip.pixel_mean == OPENAI_DATASET_MEAN and clip.tokenize(["a cat"]).shape == (1, 16)
    with pytest.raises(ValueError, match="unknown config"):
        clip.save("nowhere")
    with pytest.raises(ValueError, match="has its own weights"):
        load_clip(module, "openai")
    with pytest.raises(ValueError, match="Linear is not an open_clip model"):
        load_clip(nn.Linear(1, 1))


def test_pixels_of_a_named_model_with_a_file(tmp_path, caplog):
    clip = load_clip("Tiny-SigLIP", "random")
    assert clip.pixel_mean == (0.5,) * 3  # all its tags agree
    assert clip.logit_bias.item() == -10
    assert load_clip("Tiny-8", "random").pixel_mean == OPENAI_DATASET_MEAN  # its tags do not
    assert "'Tiny-8' use different pixel statistics" in caplog.text


@pytest.mark.parametrize(("precision", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
@torch.no_grad()
def test_precision(precision, dtype):
    torch.manual_seed(0)
    full = load_clip("Tiny-8", "random")
    low = load_clip("Tiny-8", "random", precision=precision)
    assert low.visual.dtype == dtype and low.logit_scale.dtype == torch.float32
    low.load_state_dict(full.state_dict())
    for a, b in ((low.encode_image(IMAGES), full.encode_image(IMAGES)), *_texts(low, full)):
        assert a.dtype == dtype
        assert torch.nn.functional.cosine_similarity(a.float(), b).min() > 0.99


def _texts(*clips: ClipModel) -> list[tuple[Tensor, ...]]:
    return [tuple(clip.encode_text(clip.tokenize(["a red star", "a wall"])) for clip in clips)]


def test_long_texts_are_named():
    clip = load_clip("Tiny-8", "random")
    with pytest.raises(ValueError, match=r"texts longer than 16 tokens: 'a a a .*' \(22\)"):
        clip.tokenize(["fine", "a " * 20])
    assert clip.tokenize(["a cat"], context_length=5).tolist() == [[49406, 320, 2368, 49407, 0]]


def test_a_foreign_vocabulary_has_no_tokenizer():
    clip = load_clip("Tiny-SigLIP", "random")
    with pytest.raises(ValueError, match="has 64 tokens, which is not CLIP's vocabulary"):
        clip.tokenize(["a cat"])


# Images


def test_preprocess_equals_open_clip():
    """`crop` is open_clip's evaluation transform; without it, the whole image is kept."""
    clip = load_clip("Tiny-8", "random")
    clip.config["preprocess_cfg"] = {"mean": MEAN, "std": STD, "interpolation": "bilinear"}
    pixels = (torch.rand(90, 60, 3) * 255).byte().numpy()
    image = Image.fromarray(pixels)
    theirs = open_clip.image_transform(32, is_train=False, mean=MEAN, std=STD, interpolation="bilinear")
    assert torch.allclose(clip.preprocess(image), theirs(image))
    whole = clip.preprocess(image, crop=False, size=60)
    assert whole.shape == (3, 90, 60)
    expected = (torch.from_numpy(pixels).permute(2, 0, 1) / 255 - torch.tensor(MEAN).view(3, 1, 1)) / (
        torch.tensor(STD).view(3, 1, 1)
    )
    assert torch.allclose(whole, expected, atol=1e-5)
    assert clip.preprocess(image.convert("L"), crop=False).shape == (3, 48, 32)
