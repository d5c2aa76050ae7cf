"""Prompt learners: CoOp, CoCoOp and VPT, from their published tensors."""

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from clipdense.checkpoint import load_strict
from clipdense.clip.layouts import OPENAI_CLIP, config_from_tensors
from clipdense.clip.model import build_clip
from clipdense.clip.prompt_files import convert_coop
from clipdense.clip.prompts import insert_contexts
from clipdense.clip.templates import NAME_RULES
from clipdense.clip.towers import TowerRequest, build_tower
from clipdense.clip.visual_prompts import VisualPrompts, chain_hooks, convert_vpt
from tests.helpers.towers import timm_model

FULL_VOCABULARY = 49408


def _clip(golden, quick_gelu=True):
    """The CLIP of the file, its rows of the token table scattered to the full vocabulary."""
    state, inputs = golden.part("state"), golden.part("in")
    rows = inputs["token_embedding_rows"]
    table = torch.zeros(FULL_VOCABULARY, rows.shape[1])
    table[inputs["vocab_ids"]] = rows
    openai = {"token_embedding.weight": table}
    for key, value in state.items():
        if not key.startswith("prompt_learner."):
            openai[key.removeprefix("text_encoder.").replace("image_encoder.", "visual.")] = value
    converted = OPENAI_CLIP.convert(openai)
    heads = golden.args["transformer_heads"]
    model_cfg = config_from_tensors(converted, head_width=64, text_heads=heads) | {"quick_gelu": quick_gelu}
    pixels = {"mean": [0.5] * 3, "std": [0.5] * 3}
    clip = build_clip(golden.id, {"model_cfg": model_cfg, "preprocess_cfg": pixels})
    load_strict(clip, converted, source=golden.id)
    return clip.eval()


def _names(golden):
    return [NAME_RULES["spaces"](name) for name in golden.args["class_names"]]


def _prompts(golden, **changes):
    args = golden.args
    settings = {"position": args.get("class_token_position", "end"), "classes": args["class_names"]}
    return convert_coop(golden.part("state"), source=golden.id, **settings | changes)


def _run(golden, clip, prompts):
    """Every recorded output, with texts as long as the tower's positions."""
    tower, inputs = clip.text, golden.part("in")
    results = {"image_features": clip.encode_image(inputs["image"])}
    tokens = clip.tokenize([f"{name}." for name in _names(golden)], tower.context_length - prompts.length)
    g = results["image_features"]
    contexts = prompts.contexts_of(golden.args["class_names"], g)
    sequences = insert_contexts(tower, tokens, contexts, prompts.position, prompts.tail)
    text = prompts.encode(tower, tokens, golden.args["class_names"], g)
    if not prompts.image_dependent:
        sequences, text = sequences[0], text[0]
    else:
        results["meta_bias"] = prompts.bias(g)
    results |= {"prompts": sequences, "text_features": text}
    u, t = F.normalize(g, dim=-1), F.normalize(text, dim=-1).expand(len(g), -1, -1)
    results["logits"] = clip.logit_scale.exp() * torch.einsum("bd,bkd->bk", u, t)
    if "label" in inputs:
        results["train_loss"] = F.cross_entropy(results["logits"], inputs["label"])
    return results


@pytest.mark.golden(case="coop")
@torch.no_grad()
def test_coop(golden):
    args, clip, prompts = golden.args, _clip(golden), _prompts(golden)
    names = _names(golden)
    placeholders = " ".join(["X"] * prompts.length)
    tokens = clip.tokenize([f"{args['ctx_init'].replace('_', ' ') or placeholders} {n}." for n in names])
    assert torch.equal(tokens, golden.part("in")["token_ids_bpe"])
    lengths = clip.text.end(clip.tokenize(names)) - 1
    assert torch.equal(lengths, golden.part("in")["name_lens"])
    assert torch.equal(clip.text.end(tokens), lengths + prompts.length + prompts.tail + 1)
    golden.check({k: v for k, v in _run(golden, clip, prompts).items() if k in golden.part("out")})


@pytest.mark.golden(case="coop")
@torch.no_grad()
def test_coop_controls(golden):
    """Other contexts, another place of the name, and another activation are seen."""
    clip, prompts = _clip(golden), _prompts(golden)
    assert golden.differs("text_features", _run(golden, _clip(golden, False), prompts)["text_features"])
    prompts.contexts.mul_(-1)  # never zero: contexts are random numbers
    assert golden.differs("prompts", _run(golden, clip, prompts)["prompts"])
    assert golden.differs("text_features", _run(golden, clip, prompts)["text_features"])
    for position in {"end", "middle", "front"} - {prompts.position}:
        changed = _run(golden, clip, _prompts(golden, position=position))
        if prompts.length > 1 or "middle" not in (position, prompts.position):
            assert golden.differs("prompts", changed["prompts"])
    if prompts.classes and len(prompts.classes) > 1:
        shuffled = _prompts(golden, classes=[*prompts.classes[1:], prompts.classes[0]])
        assert golden.differs("prompts", _run(golden, clip, shuffled)["prompts"])


@pytest.mark.golden(name="cocoop*")
@torch.no_grad()
def test_cocoop(golden):
    clip, prompts = _clip(golden), _prompts(golden)
    assert prompts.image_dependent
    golden.check(_run(golden, clip, prompts))
    # the network reads unit embeddings, and every image has contexts of its own
    features = golden.part("out")["image_features"]
    hidden = prompts.meta_net.linear1(F.normalize(features, dim=-1)).relu()
    if hidden.any():  # else no image has an effect
        assert golden.differs("meta_bias", prompts.meta_net(10 * features))
    if hidden.amax(0).ne(hidden.amin(0)).any():
        assert golden.differs("meta_bias", prompts.bias(features.roll(1, 0)))
    with pytest.raises(ValueError, match="depend on the image"):
        prompts(clip, clip.tokenize(["cat."]))


def _vpt(golden, gelu=nn.GELU):
    """The file's ViT as a tower, its prompts and its classifier."""
    args = golden.args
    vit, prompts = convert_vpt(golden.part("state"))
    trunk = VisionTransformer(
        img_size=args["img_size"],
        patch_size=args["patch_size"],
        embed_dim=args["width"],
        depth=args["layers"],
        num_heads=args["heads"],
        mlp_ratio=args["mlp_dim"] / args["width"],
        num_classes=args["num_classes"],
        act_layer=gelu,
    )
    load_strict(trunk, vit, source=golden.id)
    tower = build_tower(timm_model(trunk))
    learner = VisualPrompts.of(tower, args["num_prompts"], deep=args["deep"], project=max(0, args["project"]))
    load_strict(learner, prompts, source=golden.id)
    learner.check(tower)
    return tower.eval(), learner.eval()


def _vpt_run(golden, tower, prompts):
    results = {}
    last = len(tower.blocks)

    def before(index, stream):
        if index > 0:
            results[f"layer_{index - 1}_out"] = stream.x
        return stream

    def after(index, stream):
        if 0 <= index < last:
            results[f"layer_{index}_in"] = stream.x
        return stream

    hook = chain_hooks(before, prompts, after)
    results["logits"] = tower(golden.part("in")["image"], TowerRequest(pooled=True), hook=hook).pooled
    results["encoded"] = tower.norm_tokens(results[f"layer_{last - 1}_out"])
    count = 0 if prompts is None else prompts.count
    encoded = results["encoded"]
    results["encoded_without_prompts"] = torch.cat([encoded[:, :1], encoded[:, 1 + count :]], dim=1)
    return results


@pytest.mark.golden(case="vpt")
@torch.no_grad()
def test_vpt(golden):
    tower, prompts = _vpt(golden)
    results = _vpt_run(golden, tower, prompts)
    golden.check({name: results[name] for name in golden.part("out")})
    height, width = tower.grid
    assert results["encoded_without_prompts"].shape[1] == 1 + height * width


@pytest.mark.golden(case="vpt")
@torch.no_grad()
def test_vpt_controls(golden):
    """Lost, mirrored and never replaced tokens, and another activation, are seen."""
    tower, prompts = _vpt(golden)
    name = "encoded_without_prompts"
    assert golden.differs(name, _vpt_run(golden, tower, None)[name])
    assert golden.differs(name, _vpt_run(golden, *_vpt(golden, nn.ReLU))[name])
    if golden.args["deep"] and golden.args["layers"] > 1:
        kept = _vpt(golden)[1]
        kept.deep_prompt_embeddings = None
        assert golden.differs(name, _vpt_run(golden, tower, kept)[name])
    prompts.prompt_embeddings.mul_(-1)
    assert golden.differs("layer_0_in", _vpt_run(golden, tower, prompts)["layer_0_in"])
