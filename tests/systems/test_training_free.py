"""ZeroShotSegmentor: methods on nano CLIPs, text, thresholds, windows, large vocabularies, second models."""

from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image

from clipdense.clip import load_clip
from clipdense.clip.attention import Block, History, TokenStream
from clipdense.clip.text import TextBank
from clipdense.clip.vocabulary import Vocabulary
from clipdense.inference import Refinements, RefineSettings, text_cosines
from clipdense.run.setup import load_config
from clipdense.systems.training_free import (
    METHODS,
    NAME_LISTS,
    PROTOCOLS,
    DenseEncoder,
    FeatureModel,
    Memo,
    SamModel,
    ScoreSettings,
    WindowSettings,
    ZeroShotSegmentor,
    name_list,
    protocol_overrides,
)
from clipdense.systems.training_free.names import protocol_names
from clipdense.systems.training_free.protocols import DATASETS

from detectron2.data import MetadataCatalog

WINDOWS = WindowSettings(window=64, stride=32)
BASE = "projects/ZeroShot/configs/Base-ZeroShot.yaml"
VOCABULARY = Vocabulary.from_names([["background"], ["star", "asterisk"], ["disc"]])


@pytest.fixture(scope="module")
def clip():
    return load_clip("shapes-vit")


@pytest.fixture(scope="module")
def features():
    """A small trunk of DINO's kind, per kind of output."""
    torch.manual_seed(0)
    trunk = timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, dynamic_img_size=True, embed_dim=48, depth=2, num_heads=3
    )
    return {kind: FeatureModel(trunk, kind) for kind in ("tokens", "queries_keys", "values")}


def sam_model():
    from transformers import SamConfig
    from transformers import SamModel as Module

    vision = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_dim": 64}
    vision |= {
        "image_size": 128,
        "patch_size": 16,
        "output_channels": 16,
        "window_size": 4,
        "num_pos_feats": 8,
    }
    prompt = {"hidden_size": 16, "image_size": 128, "patch_size": 16, "mask_input_channels": 4}
    decoder = {"hidden_size": 16, "num_attention_heads": 2, "mlp_dim": 32, "iou_head_hidden_dim": 16}
    config = SamConfig(
        vision_config=vision | {"global_attn_indexes": [1]},
        prompt_encoder_config=prompt,
        mask_decoder_config=decoder,
    )
    torch.manual_seed(0)
    return SamModel(Module._from_config(config, attn_implementation="eager"))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CLIPDENSE_CACHE", str(tmp_path / "cache"))


def image(height=96, width=80, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)


def segmentor(clip, method="sclip", scores=None, **kwargs):
    encoder_keys = ("options", "windows", "refinements", "features", "sam", "memo")
    encoder = {k: kwargs.pop(k) for k in encoder_keys if k in kwargs}
    model = ZeroShotSegmentor(
        encoder=DenseEncoder(clip, method, **{"windows": WINDOWS, **encoder}),
        scores=scores,
        templates="single",
        **kwargs,
    )
    model.set_vocabulary(VOCABULARY)
    return model.eval()


def predict(model, pixels=None, size=(48, 40)):
    pixels = image() if pixels is None else pixels
    (output,) = model([{"image": pixels, "height": size[0], "width": size[1]}])
    return output


ALONE = [m for m in METHODS if METHODS[m].kind not in ("corrclip", "trident") and not METHODS[m].embedder]


@pytest.mark.parametrize("method", ALONE)
def test_every_method_segments(clip, features, method):
    second = features[METHODS[method].features] if METHODS[method].features else None
    options = {"resclip": {"blocks": (1, 2)}}.get(method, {})
    output = predict(segmentor(clip, method, features=second, options=options))
    assert output["sem_seg"].shape == (3, 48, 40)
    assert output["sem_seg"].isfinite().all()
    # a class with two names has the larger of two probabilities
    assert output["sem_seg"].sum(0).max() <= 1 + 1e-5
    assert torch.equal(output["sem_seg_labels"], output["sem_seg"].argmax(0))


def test_methods_differ(clip):
    maps = [
        predict(segmentor(clip, m))["sem_seg"] for m in ("clip", "maskclip", "sclip", "clearclip", "naclip")
    ]
    for i, one in enumerate(maps):
        for other in maps[:i]:
            assert not torch.allclose(one, other, atol=1e-3)


@pytest.mark.parametrize("name", ["shapes-rn", "shapes-eva"])
def test_other_towers(name):
    clip = load_clip(name)
    method = "maskclip" if name == "shapes-rn" else "clearclip"
    assert predict(segmentor(clip, method))["sem_seg"].isfinite().all()
    if name == "shapes-rn":
        with pytest.raises(ValueError, match="method 'sclip' needs a ViT.*use one of clip, maskclip"):
            DenseEncoder(clip, "sclip")


def test_corrclip_reads_regions_of_a_folder(clip, features, tmp_path):
    """Every region has one label; a wrong folder is an error that names the file."""
    ids = np.zeros((96, 80), np.uint8)
    ids[10:60, 10:50], ids[60:90, 40:80] = 1, 2
    Image.fromarray(ids).save(tmp_path / "a.png")
    kwargs = {"features": features["queries_keys"], "regions": str(tmp_path)}
    model = segmentor(clip, "corrclip", **kwargs)
    sample = {"image": image(), "height": 96, "width": 80, "file_name": "/photos/a.jpg"}
    (output,) = model([sample])
    for region in (1, 2):
        assert len(output["sem_seg_labels"][torch.from_numpy(ids == region)].unique()) == 1
    with pytest.raises(FileNotFoundError, match=r"REGIONS: no label map .*b\.png"):
        model([{**sample, "file_name": "b.jpg"}])
    with pytest.raises(ValueError, match="method 'corrclip' needs region ids"):
        segmentor(clip, "corrclip", features=features["queries_keys"])


def test_sam_gives_affinities_regions_and_masks(clip, features):
    sam = sam_model()
    maps = []
    for options in ({"cos_fac": 0.5}, {"cos_fac": 0.5, "halves": True}):
        scores = ScoreSettings(logit_scale=1.0)
        model = segmentor(
            clip, "trident", scores, features=features["tokens"], sam=sam, options=options, windows=WINDOWS
        )
        maps.append(predict(model)["sem_seg"])
    assert maps[0].isfinite().all() and not torch.allclose(*maps, atol=1e-5)
    corr = segmentor(clip, "corrclip", features=features["queries_keys"], sam=sam, regions="sam")
    assert predict(corr)["sem_seg"].isfinite().all()
    pixels = clip.normalize(image()[None])
    weights, values, grid = sam.last_attention(pixels, corr.encoder.statistics)
    assert weights.shape == (2, grid[0] * grid[1], grid[0] * grid[1])
    assert values.shape[:2] == weights.shape[:2]
    assert grid == (8, 6)  # 96 x 80 fills 128 x 107 of the frame


def test_sam_of_any_input_size_refines_labels(clip, features):
    sam, seen = sam_model(), []  # its input has 128 pixels, and its mask prompts 32
    decode = sam.decode
    sam.decode = lambda embeddings, prompts: seen.append(prompts.boxes) or decode(embeddings, prompts)
    settings = RefineSettings(coarse_threshold=0.0, minimal_area=1, iou_threshold=-10.0)
    maps = []
    for refinement in (None, settings):
        scores = ScoreSettings(logit_scale=1.0, sam_refinement=refinement)
        model = segmentor(clip, "trident", scores, features=features["tokens"], sam=sam, windows=WINDOWS)
        maps.append(predict(model)["sem_seg"])
    assert not torch.allclose(*maps, atol=1e-5)
    assert 64 < torch.cat(seen).max() <= 128  # boxes are in the frame of this SAM


def test_missing_parts_are_named(clip):
    with pytest.raises(ValueError, match="set MODEL.ZERO_SHOT.FEATURES.NAME"):
        DenseEncoder(clip, "proxyclip")
    with pytest.raises(ValueError, match="unknown method 'nope'; known: clip, maskclip"):
        DenseEncoder(clip, "nope")
    with pytest.raises(
        ValueError, match="method 'naclip' has no option std; its options are full, gaussian_std"
    ):
        DenseEncoder(clip, "naclip", options={"std": 3})
    with pytest.raises(ValueError, match="set MODEL.ZERO_SHOT.SAM.NAME"):
        segmentor(clip, regions="sam")
    with pytest.raises(RuntimeError, match="nothing to train"):
        segmentor(clip).train()([{"image": image()}])


def test_thresholds(clip):
    """Rejected pixels get the class called background, or none."""
    free = predict(segmentor(clip))["sem_seg"]
    limit = float(free.amax(0).median())
    labels = predict(segmentor(clip, scores=ScoreSettings(prob_threshold=limit)))["sem_seg_labels"]
    assert torch.equal(labels, free.argmax(0).masked_fill(free.amax(0) < limit, 0))
    model = segmentor(clip, scores=ScoreSettings(prob_threshold=limit))
    model.set_vocabulary(Vocabulary.from_names(["square", "disc"]))
    labels, scores = (predict(model)[key] for key in ("sem_seg_labels", "sem_seg"))
    assert torch.equal(labels == -1, scores.amax(0) < limit)
    peaks = free.flatten(1).amax(1)
    rejected = segmentor(clip, scores=ScoreSettings(class_threshold=float(peaks.min()) + 1e-4))
    assert (predict(rejected)["sem_seg_labels"] != int(peaks.argmin())).all()


def test_a_text_table_replaces_the_text_tower(clip, tmp_path):
    """The same scores, from a CLIP without text tower; a table of other classes is refused."""
    expected = predict(segmentor(clip))["sem_seg"]
    rows, _ = TextBank(clip, "single").per_synonym(VOCABULARY)
    path = tmp_path / "table.npy"
    np.save(path, rows.numpy())
    overrides = ["MODEL.CLIP.NAME", "shapes-vit", "MODEL.ZERO_SHOT.TEXT_TABLE", str(path)]
    cfg = load_config("configs/shapes/Base-ZeroShot.yaml", [*overrides, "DATASETS.TEST", "[]"])
    model = ZeroShotSegmentor(cfg).eval()
    model.encoder.windows = WINDOWS
    assert model.encoder.clip.text is None
    model.set_vocabulary(VOCABULARY)
    torch.testing.assert_close(predict(model)["sem_seg"], expected)
    with pytest.raises(ValueError, match="does not fit 2 classes with 2 names"):
        model.set_vocabulary(Vocabulary.from_names(["square", "disc"]))


def test_background_names_replace_the_word(clip):
    plain, named = segmentor(clip), segmentor(clip, background="sky|wall")
    embeddings = named.text_embeddings()
    assert embeddings["classes"].tolist() == [0, 0, 1, 1, 2]
    sky = plain.bank(Vocabulary.from_names(["sky"]))[0]
    torch.testing.assert_close(embeddings["text"][0], sky)
    assert plain.text_embeddings()["classes"].tolist() == [0, 1, 1, 2]


def test_large_vocabularies_are_streamed(clip, monkeypatch):
    monkeypatch.setattr("clipdense.systems.training_free.meta_arch.CHUNK", 2)
    limit = float(predict(segmentor(clip))["sem_seg"].amax(0).median())
    scores = ScoreSettings(prob_threshold=limit, pamr_steps=2, pamr_dilations=(1, 2))
    whole = predict(segmentor(clip, scores=scores))
    streamed = predict(segmentor(clip, scores=scores, max_dense_classes=2))
    assert set(streamed) == {"sem_seg_labels"}
    assert (streamed["sem_seg_labels"] == whole["sem_seg_labels"]).float().mean() > 0.999
    assert len(whole["sem_seg_labels"].unique()) > 1


def test_methods_share_forwards_through_a_memo(clip, monkeypatch):
    memo, calls = Memo(), []
    history = type(clip.visual).history
    monkeypatch.setattr(
        type(clip.visual), "history", lambda self, *args: calls.append(1) or history(self, *args)
    )
    alone = {m: predict(segmentor(clip, m))["sem_seg"] for m in ("sclip", "gem", "scclip")}
    shared = {m: segmentor(clip, m, memo=memo) for m in alone}
    for method, model in shared.items():
        torch.testing.assert_close(predict(model)["sem_seg"], alone[method], atol=1e-5, rtol=1e-4)
    assert len(calls) == 1
    memo.clear()
    predict(shared["sclip"])
    assert len(calls) == 2


def test_methods_share_a_resnet_through_a_memo(monkeypatch):
    clip, memo, calls = load_clip("shapes-rn"), Memo(), []
    features = type(clip.visual).features
    settings = {"clip": None, "maskclip": None, "smooth": Refinements(0.5, 1.0)}
    methods = {"clip": "clip", "maskclip": "maskclip", "smooth": "maskclip"}
    alone = {n: predict(segmentor(clip, m, refinements=settings[n]))["sem_seg"] for n, m in methods.items()}
    monkeypatch.setattr(
        type(clip.visual), "features", lambda self, *args: calls.append(1) or features(self, *args)
    )
    for name, method in methods.items():
        model = segmentor(clip, method, refinements=settings[name], memo=memo)
        torch.testing.assert_close(predict(model)["sem_seg"], alone[name], atol=1e-5, rtol=1e-4)
    assert len(calls) == 1


def test_maskclip_refinements(clip):
    plain = predict(segmentor(clip, "maskclip"))["sem_seg"]
    for settings in (Refinements(key_smoothing=1.0), Refinements(key_smoothing=1.0, normalize_tokens=True)):
        assert not torch.allclose(
            predict(segmentor(clip, "maskclip", refinements=settings))["sem_seg"], plain
        )


def test_vocabulary_of_a_dataset_takes_published_names():
    overrides = [*map(str, protocol_overrides("sclip", "voc21"))]
    names = protocol_names(load_config(BASE, overrides))
    voc = Vocabulary.from_metadata(MetadataCatalog.get("pascalvoc21_sem_seg_val"))
    assert names[voc.synonyms].names[:5] == ("sky", "aeroplane", "bicycle", "bird", "ship")
    assert names[voc.synonyms].synonyms[20][1] == "tv monitor"
    wrong = load_config(BASE, [*overrides, "MODEL.ZERO_SHOT.CLASS_NAMES", "voc20"])
    with pytest.raises(ValueError, match="list voc20 has 20 classes, and dataset pascalvoc21"):
        protocol_names(wrong)


@pytest.mark.parametrize("benchmark", DATASETS)
def test_published_settings_load(benchmark):
    for method in PROTOCOLS:
        cfg = load_config(BASE, [*map(str, protocol_overrides(method, benchmark))])
        assert method == cfg.MODEL.ZERO_SHOT.METHOD
        count = len(name_list(cfg.MODEL.ZERO_SHOT.CLASS_NAMES))
        assert count == len(
            Vocabulary.from_metadata(MetadataCatalog.get(DATASETS[benchmark]), separator=None)
        )
    shipped = load_config(f"projects/ZeroShot/configs/{benchmark}.yaml")
    ours = load_config(BASE, [*map(str, protocol_overrides("sclip", benchmark))])
    assert shipped.MODEL.ZERO_SHOT == ours.MODEL.ZERO_SHOT
    assert shipped.INPUT.MIN_SIZE_TEST == ours.INPUT.MIN_SIZE_TEST
    assert shipped.DATASETS.TEST == ours.DATASETS.TEST
    assert {*PROTOCOLS, "pacl"} == set(METHODS) and len(NAME_LISTS) == 13  # PACL published no thresholds


def test_features_resize_positions_as_dino(features):
    """At the native size the trunk's own forward; q + k and v are those of the last attention."""
    model = features["tokens"]
    images = torch.randn(2, 3, 224, 224)
    zero_mean = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    tokens = model.trunk.forward_features(images)[:, 1:]
    torch.testing.assert_close(
        model(images, zero_mean).flatten(2).transpose(1, 2), tokens, atol=1e-5, rtol=1e-4
    )
    small = torch.randn(1, 3, 100, 70)
    assert model(small, zero_mean).shape == (1, 48, 6, 4)
    own = model.trunk.forward_features(small[..., :96, :64])[:, 1:]
    assert not torch.allclose(model(small, zero_mean).flatten(2).transpose(1, 2), own, atol=1e-4)
    both = {kind: features[kind](images, zero_mean) for kind in ("queries_keys", "values")}
    assert both["values"].shape == both["queries_keys"].shape == (2, 48, 14, 14)
    assert not torch.allclose(*both.values())
    with pytest.raises(ValueError, match="output must be one of tokens, queries_keys, values"):
        FeatureModel(model.trunk, "keys")


def test_windows_of_one_image_equal_the_whole(clip):
    """A window as large as the image is the whole image."""
    pixels = image(64, 64)
    whole = predict(segmentor(clip, windows=WindowSettings(0, 0)), pixels)["sem_seg"]
    one = predict(segmentor(clip, windows=WindowSettings(64, 32)), pixels)["sem_seg"]
    torch.testing.assert_close(whole, one, atol=1e-5, rtol=1e-4)
    text = torch.eye(clip.embed_dim)[:3]
    dense = torch.randn(1, clip.embed_dim, 2, 2)
    torch.testing.assert_close(text_cosines(dense, text), F.normalize(dense, dim=1)[:, :3])


def test_history_names_its_outputs(clip):
    history = clip.visual.history(torch.randn(1, 3, 64, 64))
    assert isinstance(history.block, Block) and isinstance(history.stream, TokenStream)
    with pytest.raises(ValueError, match="has outputs 0 to"):
        history.output(len(history) - 1)
    short = History(history.blocks[:1], [replace(history.stream)])
    assert len(short) == 1
