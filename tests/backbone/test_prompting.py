"""MODEL.PROMPT: one description of learned prompts for every system."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from clipdense.backbone import CLIPTrunk
from clipdense.backbone.class_text import ClassText
from clipdense.backbone.clip_trunk import clip_from_config
from clipdense.backbone.prompting import build_class_prompts, build_fixed_prompts, build_visual_prompts
from clipdense.clip.image_prompts import (
    ConditionalPrompts,
    InstancePrompts,
    PreModelPrompts,
    alignment_loss,
)
from clipdense.clip.model import build_clip
from clipdense.clip.prompt_files import find_prompts, save_prompts
from clipdense.clip.prompts import ContextPrompts
from clipdense.clip.vocabulary import Vocabulary
from clipdense.engine.options import ConfigError
from clipdense.run.config import add_clipdense_config
from clipdense.run.setup import load_config
from clipdense.systems.denseclip.loss import PixelTextLoss
from clipdense.systems.denseclip.meta_arch import export_without_text_tower
from clipdense.systems.fvlm.text import build_text_embedder
from clipdense.systems.text_rcnn.predictor import class_embeddings

from detectron2.config import CfgNode, get_cfg
from detectron2.data import MetadataCatalog
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone, build_model

CLASSES = ["red star", "blue ring", "green hourglass"]
IMAGE_DEPENDENT = ["cocoop", "pre_model", "icpc"]


def config(*keys: object, clip: str = "shapes-rn") -> CfgNode:
    torch.manual_seed(0)
    cfg = get_cfg()
    add_clipdense_config(cfg)
    cfg.merge_from_list(
        ["MODEL.CLIP.NAME", clip, "MODEL.CLIP.PRETRAINED", "random", "MODEL.LANGUAGE.CLASSES", CLASSES]
        + ["MODEL.BACKBONE.FREEZE_AT", 0, "MODEL.BACKBONE.NAME", "LanguageTrunk", "INPUT.FORMAT", "RGB"]
        + ["MODEL.PIXEL_MEAN", [127.5] * 3, "MODEL.PIXEL_STD", [127.5] * 3, "MODEL.DEVICE", "cpu"]
        + ["MODEL.LANGUAGE.CONTEXT_DECODER.ENABLED", False, "MODEL.PROMPT.N_CONTEXTS", 3]
        + ["MODEL.PROMPT.PRE_MODEL.WIDTH", 24, "MODEL.PROMPT.PRE_MODEL.LAYERS", 1, *keys]
    )
    return cfg


@pytest.mark.parametrize("method", ["contexts", *IMAGE_DEPENDENT])
def test_a_language_backbone_trains_every_method(method: str) -> None:
    model = build_backbone(config("MODEL.PROMPT.METHOD", method), ShapeSpec(channels=3))
    images = torch.randn(2, 3, 64, 64)
    model(images)["score"].square().sum().backward()
    trained = {n for n, p in model.text.named_parameters() if p.grad is not None}
    assert trained == {f"prompts.{name}" for name, _ in model.text.prompts.named_parameters()}
    assert all(p.grad.any() for p in model.text.prompts.parameters())

    model.eval()
    with torch.no_grad():
        both = model(images)["score"]
        torch.testing.assert_close(model(images[:1])["score"], both[:1], atol=1e-4, rtol=1e-4)
        _, g, z = model.trunk.forward_joint(images)
        t = model.class_embeddings(g, z)
        cosine = torch.einsum("bdhw,bkd->bkhw", F.normalize(z, dim=1), F.normalize(t, dim=2))
        torch.testing.assert_close(both, cosine / model.tau)
        features, text = model.joint_features(images)
        torch.testing.assert_close(torch.einsum("bdhw,bkd->bkhw", features, text), cosine)
    assert torch.equal(t[0], t[1]) == (method == "contexts")


@pytest.mark.parametrize("method", IMAGE_DEPENDENT)
def test_image_dependent_prompts_refuse_tables(method: str, tmp_path: Path) -> None:
    model = build_backbone(config("MODEL.PROMPT.METHOD", method), ShapeSpec(channels=3))
    with pytest.raises(ValueError, match="depend on the image"):
        model.text.table()
    state, metadata = export_without_text_tower(model)
    assert metadata["options"]["config"] == {} and state.keys() == model.state_dict().keys()
    keys = ["MODEL.PROMPT.METHOD", method, "MODEL.LANGUAGE.TEXT", "table", "MODEL.LANGUAGE.TABLE_DIM", 128]
    with pytest.raises(ValueError, match=f"TEXT table: with MODEL.PROMPT.METHOD {method}"):
        build_backbone(config(*keys), ShapeSpec(channels=3))
    path = str(tmp_path / "p.safetensors")
    save_prompts(path, model.text.prompts)
    with pytest.raises(ValueError, match=f"TEXT table: with MODEL.PROMPT.WEIGHTS {path}"):
        build_backbone(config("MODEL.PROMPT.WEIGHTS", path, *keys[2:]), ShapeSpec(channels=3))


def test_contexts_of_the_config() -> None:
    cfg = config("MODEL.PROMPT.METHOD", "contexts", "MODEL.PROMPT.POSITION", "middle")
    cfg.MODEL.PROMPT.CLASS_SPECIFIC = True
    cfg.MODEL.PROMPT.CONTEXT_WORDS = "a photo"
    clip = clip_from_config(cfg)
    prompts = build_class_prompts(cfg, clip, CLASSES)
    assert isinstance(prompts, ContextPrompts)
    assert (prompts.position, prompts.tail, prompts.classes) == ("middle", 1, tuple(CLASSES))
    words = clip.text.token_embedding(clip.tokenize(["a photo"])[0, 1:3])
    assert torch.equal(prompts.contexts[:, 1:], words.expand(3, -1, -1))
    assert prompts.contexts[:, 0].std() < 0.04
    cfg.MODEL.PROMPT.METHOD = "cocoop"
    with pytest.raises(ValueError, match="CLASS_SPECIFIC True: cocoop shares"):
        build_class_prompts(cfg, clip, CLASSES)
    assert build_class_prompts(config(), clip, CLASSES) is None


def test_the_token_budget_follows_the_names() -> None:
    """All names of LVIS fit with 16 contexts; the longest possible context is what the names leave."""
    vision = {"layers": 1, "width": 64, "patch_size": 16, "image_size": 32}
    text = {"context_length": 77, "vocab_size": 49408, "width": 8, "heads": 1, "layers": 1}
    cfg = {"model_cfg": {"embed_dim": 8, "vision_cfg": vision, "text_cfg": text}}
    clip = build_clip("tiny", cfg | {"preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}})
    names = MetadataCatalog.get("lvis_v1_val").thing_classes
    assert len(names) == 1203
    longest = ClassText(clip, names, prompts=ContextPrompts(16, 8, full_stop=True)).tokens.shape[1]
    room = 77 - longest
    assert 16 <= room < 77 - 4
    ClassText(clip, names, prompts=ContextPrompts(room, 8, full_stop=True))
    with pytest.raises(ValueError, match=f"longer than {longest - 1} tokens"):
        ClassText(clip, names, prompts=ContextPrompts(room + 1, 8, full_stop=True))


@pytest.fixture
def file(tmp_path: Path) -> str:
    clip = clip_from_config(config())
    save_prompts(tmp_path / "p.safetensors", ContextPrompts(3, clip.text.width, full_stop=True))
    return str(tmp_path / "p.safetensors")


@torch.no_grad()
def test_trained_prompts_load_into_other_systems(file: str) -> None:
    keys = ["DATASETS.TRAIN", ("shapes_ov_mini_train",), "DATASETS.TEST", ()]
    plain, prompted = config(*keys), config(*keys, "MODEL.PROMPT.WEIGHTS", file)
    names = MetadataCatalog.get("shapes_ov_mini_train").thing_classes
    clip = clip_from_config(config())  # the same seed, so the same random CLIP
    prompts = build_fixed_prompts(prompted, clip)
    tokens = clip.tokenize([f"{name}." for name in names], clip.text.context_length - 3)
    expected = F.normalize(prompts(clip, tokens), dim=-1)
    assert not any(p.requires_grad for p in prompts.parameters())
    for embed in (class_embeddings, lambda cfg: build_text_embedder(cfg)(names).cpu()):
        torch.manual_seed(0)
        without = embed(plain)
        torch.manual_seed(0)
        found = embed(prompted)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
        assert not torch.allclose(without, found)
    text = build_backbone(prompted, ShapeSpec(channels=3)).text
    assert torch.equal(text.prompts.contexts, prompts.contexts)


def test_prompts_that_a_system_cannot_use_are_refused(file: str, tmp_path: Path) -> None:
    cfg = config("MODEL.PROMPT.METHOD", "contexts")
    clip = clip_from_config(cfg)
    with pytest.raises(ValueError, match="does not train contexts of class names. Train them with"):
        build_fixed_prompts(cfg, clip)
    save_prompts(tmp_path / "wide.safetensors", ContextPrompts(3, 7))
    cfg = config("MODEL.PROMPT.WEIGHTS", str(tmp_path / "wide.safetensors"))
    with pytest.raises(ValueError, match="its contexts have 7 channels"):
        build_fixed_prompts(cfg, clip)
    width = clip.text.width
    for learner in (ConditionalPrompts, PreModelPrompts, InstancePrompts):  # of the images of another CLIP
        save_prompts(tmp_path / "wide.safetensors", learner(3, width, clip.embed_dim + 1))
        with pytest.raises(ValueError, match=f"image embeddings have {clip.embed_dim + 1} channels"):
            build_class_prompts(cfg, clip, CLASSES)
    cfg = config("MODEL.PROMPT.WEIGHTS", file, "MODEL.FVLM.TEXT_SOURCE", "table")
    with pytest.raises(ValueError, match="MODEL.PROMPT.WEIGHTS has no effect with MODEL.FVLM.TEXT_SOURCE"):
        build_text_embedder(cfg)
    cfg = config("MODEL.PROMPT.WEIGHTS", file, "MODEL.TEXT_RCNN.TABLE", "x.npy")
    cfg.DATASETS.TRAIN = ("shapes_ov_mini_train",)
    with pytest.raises(ValueError, match="has no effect with MODEL.TEXT_RCNN.TABLE"):
        class_embeddings(cfg)


def test_alignment_of_pixels_adds_to_the_cross_entropy() -> None:
    score, labels = torch.randn(2, 3, 4, 4), torch.randint(0, 3, (2, 8, 8))
    labels[:, :4] = 255
    inputs = [{"sem_seg": x} for x in labels]
    plain, aligned = (PixelTextLoss("sem_seg", alignment_weight=w)(score, inputs, (8, 8)) for w in (0.0, 0.5))
    cells = labels[:, ::2, ::2].flatten(1)  # the nearest pixel of each cell
    torch.testing.assert_close(aligned - plain, 0.5 * alignment_loss(score.flatten(2), cells))
    with pytest.raises(ValueError, match="ALIGNMENT_WEIGHT 0.5 needs SOURCE sem_seg, not boxes"):
        PixelTextLoss("boxes", alignment_weight=0.5)


@pytest.mark.parametrize("deep", [False, True])
def test_visual_prompts_train_on_a_frozen_trunk(deep: bool, tmp_path: Path) -> None:
    keys = ["MODEL.BACKBONE.NAME", "CLIPTrunk", "MODEL.BACKBONE.FREEZE_AT", 5]
    images = torch.randn(2, 3, 64, 96)
    plain = build_backbone(config(*keys, clip="shapes-vit"), ShapeSpec(channels=3))
    keys += ["MODEL.PROMPT.VISUAL.N_TOKENS", 4, "MODEL.PROMPT.VISUAL.DEEP", deep]
    trunk = build_backbone(config(*keys, clip="shapes-vit"), ShapeSpec(channels=3))
    assert isinstance(trunk, CLIPTrunk)
    (a,), (b,) = plain(images).values(), trunk(images).values()
    assert a.shape == b.shape and not torch.allclose(a, b)
    b.square().sum().backward()
    trained = {n for n, p in trunk.named_parameters() if p.requires_grad}
    assert trained == {f"visual_prompts.{n}" for n, _ in trunk.visual_prompts.named_parameters()}
    assert all(p.grad.any() for p in trunk.visual_prompts.parameters())

    save_prompts(tmp_path / "v.safetensors", None, trunk.visual_prompts)
    keys = ["MODEL.PROMPT.WEIGHTS", str(tmp_path / "v.safetensors")]
    cfg = config(*keys, "MODEL.BACKBONE.NAME", "FrozenCLIPTrunk", clip="shapes-vit")
    cfg.MODEL.FROZEN_CLIP.JOINT = "plain"
    frozen = build_backbone(cfg, ShapeSpec(channels=3)).eval()
    torch.testing.assert_close(next(iter(frozen(images).values())), trunk.eval()(images)["res3"])
    assert frozen.frozen


def test_published_class_specific_contexts_load_with_the_classes_of_the_config(tmp_path: Path) -> None:
    path = tmp_path / "coop.safetensors"
    cfg = config("MODEL.PROMPT.WEIGHTS", str(path), "MODEL.PROMPT.POSITION", "front", clip="shapes-vit")
    clip = clip_from_config(cfg)
    contexts = torch.randn(3, 2, clip.text.width)
    save_file({"ctx": contexts, "token_prefix": torch.ones(3, 1, clip.text.width)}, path)
    prompts = build_class_prompts(cfg, clip, CLASSES)
    assert (prompts.classes, prompts.position) == (tuple(CLASSES), "front")
    assert torch.equal(prompts.contexts, contexts)
    assert build_visual_prompts(cfg, clip.visual) is None


def test_visual_prompts_that_nobody_trains_are_refused() -> None:
    keys = ["MODEL.BACKBONE.NAME", "FrozenCLIPTrunk", "MODEL.PROMPT.VISUAL.N_TOKENS", 4]
    with pytest.raises(ValueError, match="N_TOKENS 4: a FrozenCLIPTrunk trains no tokens"):
        build_backbone(config(*keys, clip="shapes-vit"), ShapeSpec(channels=3))
    cfg = config("MODEL.PROMPT.VISUAL.N_TOKENS", 4)
    with pytest.raises(ValueError, match="only ViTs have tokens"):
        build_visual_prompts(cfg, clip_from_config(cfg).visual)


# What reads contexts, by config: where its text embeddings are.
SYSTEMS = {
    "fcclip_rn": lambda model: model.bank,
    "pacl_vit": lambda model: model.bank,
    "zero_shot_maskclip_rn": lambda model: model.bank,
    "maskclip_plus_rn": lambda model: model.bank,
}


@pytest.mark.parametrize("name", SYSTEMS)
def test_open_vocabulary_systems_read_trained_contexts(name: str, file: str) -> None:
    config_file = f"configs/shapes/{name}.yaml"
    keys = ["MODEL.CLIP.PRETRAINED", "random", "MODEL.DEVICE", "cpu"]
    model = build_model(load_config(config_file, [*keys, "MODEL.PROMPT.WEIGHTS", file]))
    bank, vocabulary = SYSTEMS[name](model), Vocabulary.from_names(CLASSES)
    prompted = bank(vocabulary)
    tokens = bank.clip.tokenize([f"{c}." for c in CLASSES], bank.clip.text.context_length - 3)
    with torch.no_grad():
        expected = F.normalize(bank.prompts(bank.clip, tokens), dim=-1)
    torch.testing.assert_close(prompted, expected, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="does not train contexts of class names"):
        build_model(load_config(config_file, [*keys, "MODEL.PROMPT.METHOD", "contexts"]))


def test_systems_without_a_place_for_contexts_refuse_them(file: str) -> None:
    table = ["MODEL.PROMPT.WEIGHTS", file, "MODEL.ZERO_SHOT.TEXT_TABLE", "x.npz", "MODEL.DEVICE", "cpu"]
    with pytest.raises(ValueError, match="has no effect with MODEL.ZERO_SHOT.TEXT_TABLE"):
        build_model(load_config("configs/shapes/zero_shot_maskclip_rn.yaml", table))
    for name in ("catseg_rn", "clippy_vit", "clipself_vit_patches"):
        with pytest.raises(ConfigError, match=r"MODEL.PROMPT.WEIGHTS is .*takes no learned prompts"):
            load_config(f"configs/shapes/{name}.yaml", ["MODEL.PROMPT.WEIGHTS", file])


def test_contexts_of_a_language_backbone_become_a_file(tmp_path: Path) -> None:
    model = build_backbone(config("MODEL.LANGUAGE.N_CONTEXTS", 5), ShapeSpec(channels=3))
    found = find_prompts(model)
    save_prompts(tmp_path / "p.safetensors", found.text, found.visual)
    cfg = config("MODEL.PROMPT.WEIGHTS", str(tmp_path / "p.safetensors"))
    again = build_fixed_prompts(cfg, clip_from_config(cfg))
    assert torch.equal(again.contexts, model.text.prompts.contexts) and again.tail == 0
    with pytest.raises(ValueError, match="has no learned prompts"):
        find_prompts(build_backbone(config("MODEL.LANGUAGE.N_CONTEXTS", 0), ShapeSpec(channels=3)))


def test_a_frozen_trunk_has_no_score_map() -> None:
    with pytest.raises(
        ValueError, match="a FrozenCLIPTrunk gives no dense map for a score map: use CLIPTrunk"
    ):
        build_backbone(config("MODEL.LANGUAGE.TRUNK", "FrozenCLIPTrunk"), ShapeSpec(channels=3))
