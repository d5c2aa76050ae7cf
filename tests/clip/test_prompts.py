"""Prompt learners: contexts of class names, tokens of image towers, and their files."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from clipdense.checkpoint import CheckpointError, save_checkpoint
from clipdense.clip import TowerRequest, load_clip
from clipdense.clip.image_prompts import (
    ConditionalPrompts,
    InstancePrompts,
    PreModelPrompts,
    alignment_loss,
)
from clipdense.clip.prompt_files import load_prompts, prompt_state, save_prompts
from clipdense.clip.prompts import AffixPrompts, ContextPrompts, encode_with_contexts, insert_contexts
from clipdense.clip.text import TextBank
from clipdense.clip.visual_prompts import VisualPrompts, chain_hooks
from tests.helpers.towers import random_images, tower_pair

NAMES = ["red star", "hot-air balloon", "chest_of_drawers"]


@pytest.fixture(scope="module")
def clip():
    torch.manual_seed(0)
    return load_clip("shapes-rn", "random")


def tokens_of(clip, texts):
    return clip.tokenize(texts, clip.text.context_length - 6)


@pytest.mark.parametrize(("position", "before"), [("end", 3), ("middle", 1), ("front", 0)])
@torch.no_grad()
def test_contexts_stand_around_the_name(clip, position, before):
    tokens, contexts = tokens_of(clip, [f"{n}." for n in NAMES]), torch.randn(2, 3, clip.text.width)
    found = insert_contexts(clip.text, tokens, contexts, position, tail=1)
    for b in range(2):
        for k, row in enumerate(clip.text.token_embedding(tokens)):
            end = int(tokens[k].argmax())
            parts = [row[:1], contexts[b, :before], row[1 : end - 1], contexts[b, before:], row[end - 1 :]]
            assert torch.equal(found[b, k], torch.cat(parts))


def test_unknown_position():
    with pytest.raises(ValueError, match="'start'; expected end, middle, front"):
        ContextPrompts(2, 4, position="start")


@torch.no_grad()
def test_contexts_that_are_words_make_the_sentence(clip):
    prompts = ContextPrompts(4, clip.text.width, 0.02, full_stop=True)
    prompts.start_from_words(clip, "a_photo of a")
    sentence = clip.encode_text(clip.tokenize(["a photo of a red star."]))
    torch.testing.assert_close(prompts(clip, clip.tokenize(["red star."], 60)), sentence)
    with pytest.raises(ValueError, match="5 tokens, but there are 4 contexts"):
        prompts.start_from_words(clip, "a photo of a big")


@torch.no_grad()
def test_blocks_of_sequences_change_nothing(clip, monkeypatch):
    tokens, contexts = tokens_of(clip, NAMES), torch.randn(2, 2, clip.text.width)
    whole = encode_with_contexts(clip.text, tokens, contexts)
    monkeypatch.setattr("clipdense.clip.prompts._BLOCK", 4)
    torch.testing.assert_close(encode_with_contexts(clip.text, tokens, contexts), whole)


@torch.no_grad()
def test_class_specific_contexts_follow_the_names(clip):
    prompts = ContextPrompts(3, clip.text.width, classes=NAMES)
    bank = TextBank(clip, "a photo of a {}", prompts=prompts, cache_dir=None)
    forward, backward = bank(["red star", "chest of drawers"]), bank(["chest of drawers", "red star"])
    torch.testing.assert_close(forward, backward.flip(0))
    alone = encode_with_contexts(clip.text, tokens_of(clip, NAMES[:1]), prompts.contexts[:1])[0]
    torch.testing.assert_close(forward[:1], F.normalize(alone, dim=-1))
    prompts.contexts[1].zero_()  # of another class
    torch.testing.assert_close(bank(["red star"]), forward[:1])
    with pytest.raises(ValueError, match="know the 3 classes .* not 'cat'"):
        bank(["red star", "cat"])


@torch.no_grad()
def test_learners_bring_their_template(clip):
    prompts = ContextPrompts(2, clip.text.width, full_stop=True)
    templates = TextBank(clip, "a photo of a {}", prompts=prompts, cache_dir=None).templates.templates
    assert templates == ("{}.",)
    zsseg = AffixPrompts(2, 0, clip.text.width)
    assert TextBank(clip, "{}.", prompts=zsseg, cache_dir=None).templates.templates == ("{}.",)


def learners(clip):
    width, dim = clip.text.width, clip.embed_dim
    return {
        "contexts": ContextPrompts(4, width, position="middle", full_stop=True),
        "specific": ContextPrompts(2, width, classes=NAMES),
        "cocoop": ConditionalPrompts(3, width, dim, position="front"),
        "pre_model": PreModelPrompts(3, width, dim, decoder_width=24, heads=2, layers=2),
        "icpc": InstancePrompts(2, width, dim, instance_tokens=2),
    }


@pytest.mark.parametrize("kind", ["cocoop", "pre_model", "icpc"])
@torch.no_grad()
def test_contexts_of_images(clip, kind):
    prompts = learners(clip)[kind].eval()
    tokens = tokens_of(clip, NAMES)
    g, z = torch.randn(2, clip.embed_dim), torch.randn(2, clip.embed_dim, 2, 3)
    both = prompts.encode(clip.text, tokens, NAMES, g, z)
    assert both.shape == (2, 3, clip.embed_dim)
    for b in range(2):  # every image on its own
        torch.testing.assert_close(
            prompts.encode(clip.text, tokens, NAMES, g[b : b + 1], z[b : b + 1])[0], both[b]
        )
    assert not torch.allclose(both[0], both[1])
    if kind == "pre_model":  # the others do not read the map
        assert not torch.allclose(prompts.encode(clip.text, tokens, NAMES, g, z.flip(1)), both)
    else:
        torch.testing.assert_close(prompts.encode(clip.text, tokens, NAMES, g), both)
    with pytest.raises(ValueError, match="need its embedding g"):
        prompts.encode(clip.text, tokens, NAMES)
    with pytest.raises(ValueError, match="neither cached nor stored in a text table"):
        TextBank(clip, prompts=prompts)


def test_alignment_loss_contrasts_pixels():
    scores = torch.randn(2, 3, 5, requires_grad=True)
    labels = torch.tensor([[0, 0, 2, 255, 0], [1, 1, 1, 1, 255]])
    terms = []
    for b, k in ((0, 0), (0, 2), (1, 1)):
        known, mine = labels[b] != 255, labels[b] == k
        share = scores[b, k][mine].exp().sum() / scores[b, k][known].exp().sum()
        terms.append(-share.log())
    torch.testing.assert_close(alignment_loss(scores, labels), torch.stack(terms).mean())
    alignment_loss(scores, labels).backward()
    assert scores.grad.isfinite().all() and scores.grad[0, 0].any()
    assert alignment_loss(scores, torch.full((2, 5), 255)) == 0


@pytest.mark.parametrize("family", ["vit", "vit_clipa", "eva02", "siglip"])
@pytest.mark.parametrize("deep", [False, True])
@torch.no_grad()
def test_visual_prompts_leave_maps_in_place(family, deep):
    """The tokens change every output, which keeps its shape."""
    _, tower = tower_pair(family)
    images = random_images(tower)
    request = TowerRequest(pooled=True, keys=True, pre=True, taps=(0, 2))
    plain = tower(images, request)
    prompts = VisualPrompts.of(tower, 3, deep=deep, project=4).eval()
    seen = []

    def watch(index, stream):
        seen.append((index, stream.x.shape[1] - len(stream.patches[0])))
        return stream

    found = tower(images, request, hook=chain_hooks(prompts, watch))
    assert {extra for index, extra in seen if index >= 0} == {tower.prefix + 3}
    for name in ("pooled", "keys", "pre"):
        a, b = getattr(plain, name), getattr(found, name)
        assert a.shape == b.shape and not torch.allclose(a, b)
    assert [tap.shape for tap, _ in plain.taps] == [tap.shape for tap, _ in found.taps]


@torch.no_grad()
def test_deep_prompts_replace():
    """Nothing of the tokens of block 0 reaches block 2, except through the patches."""
    _, tower = tower_pair("vit")
    prompts = VisualPrompts.of(tower, 2, deep=True).eval()
    inputs = {}

    def watch(index, stream):
        inputs[index] = stream.x[:, 1:3]
        return stream

    tower(random_images(tower), hook=chain_hooks(prompts, watch))
    for block, tokens in enumerate([prompts.prompt_embeddings[0], *prompts.deep_prompt_embeddings]):
        torch.testing.assert_close(inputs[block], tokens.expand(2, -1, -1))


def test_visual_prompts_need_a_vit():
    with pytest.raises(ValueError, match="only ViTs have tokens"):
        VisualPrompts.of(tower_pair("resnet")[1], 2)
    _, tower = tower_pair("vit")
    with pytest.raises(ValueError, match="of 5 blocks: it has 3 blocks"):
        VisualPrompts(2, 32, 5, deep=True).check(tower)
    with pytest.raises(ValueError, match="of width 16: its tokens have 32"):
        VisualPrompts(2, 16, 3).check(tower)
    with pytest.raises(ValueError, match="at least 1 token"):
        VisualPrompts(0, 16, 3)


@pytest.mark.parametrize("kind", ["contexts", "specific", "cocoop", "pre_model", "icpc"])
@torch.no_grad()
def test_files_return_the_same_learner(clip, kind, tmp_path):
    prompts, visual = learners(clip)[kind].eval(), VisualPrompts(2, 8, 3, deep=True, project=4)
    save_prompts(tmp_path / "p.safetensors", prompts, visual, "shapes-rn")
    file = load_prompts(tmp_path / "p.safetensors")
    assert (file.clip, type(file.text), file.text.classes) == ("shapes-rn", type(prompts), prompts.classes)
    g = torch.randn(2, clip.embed_dim)
    tokens = tokens_of(clip, NAMES)
    torch.testing.assert_close(
        file.text.eval().encode(clip.text, tokens, NAMES, g), prompts.encode(clip.text, tokens, NAMES, g)
    )
    for a, b in zip(file.visual.parameters(), visual.parameters(), strict=True):
        assert torch.equal(a, b)
    assert (tmp_path / "p.safetensors").stat().st_size < 500_000


def test_files_without_prompts(tmp_path):
    save_file({"weight": torch.ones(2)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="x.safetensors holds no prompts"):
        load_prompts(tmp_path / "x.safetensors")
    save_file({"ctx": torch.ones(3, 2, 4)}, tmp_path / "csc.safetensors")
    with pytest.raises(CheckpointError, match="of 3 classes, but 0 class names"):
        load_prompts(tmp_path / "csc.safetensors")
    own = load_prompts(tmp_path / "csc.safetensors", classes=NAMES).text
    assert own.classes == tuple(NAMES) and own.contexts.shape == (3, 2, 4)
    save_file({"ctx": torch.ones(2, 4), "token_prefix": torch.ones(1)}, tmp_path / "ctx.safetensors")
    assert load_prompts(tmp_path / "ctx.safetensors", position="front").text.position == "front"


def test_damaged_descriptions_are_named(tmp_path):
    state, metadata = prompt_state(ContextPrompts(2, 4), None)
    for text, message in (
        ("contexts", "description of the prompts is damaged"),
        ({"kind": "cocoop"}, "of kind 'cocoop' are incomplete"),
        ({"kind": "poems"}, "unknown prompts of kind 'poems'"),
        ({"position": "left"}, "are incomplete .*'left'"),
    ):
        damaged = {"layout": metadata["layout"], "options": {"text": text}}
        save_checkpoint(tmp_path / "p.safetensors", state, damaged)
        with pytest.raises(CheckpointError, match=message):
            load_prompts(tmp_path / "p.safetensors")
