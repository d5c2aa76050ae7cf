"""Contrastive pre-training: what crops say, what the loss counts as positive, what stays locked."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import clipdense
from clipdense.checkpoint import save_checkpoint
from clipdense.clip import load_clip
from clipdense.clip.contrastive import contrastive_loss
from clipdense.clip.nano import nano_path
from clipdense.clip.position import resize_table
from clipdense.data.shapes import world
from clipdense.data.shapes.captions import SYNONYMS
from clipdense.data.shapes.draw import Rng
from clipdense.data.shapes.pretraining import (
    ContrastiveCLIP,
    CropCaptionMapper,
    CropPairMapper,
    CropRetrievalEvaluator,
)
from clipdense.data.shapes.pretraining.crops import CONTENT_SIZE, AnnotatedThing, CropSampler
from clipdense.data.shapes.pretraining.local_pool import POOL_CHANNELS, localize_pool
from clipdense.data.shapes.pretraining.mapper import CropView
from clipdense.data.shapes.pretraining.meta_arch import (
    centring_loss,
    positive_pairs,
)
from clipdense.engine.options import ConfigError

from detectron2.config import get_cfg

K, G = len(world.CLASSES), len(world.GROUNDS)


def content(things=(), named=(), seen=()):
    row = torch.zeros(CONTENT_SIZE, dtype=torch.uint8)
    for thing in things:
        row[thing] += 1
    row[[K + g for g in named]] = 1
    row[[K + G + g for g in seen]] = 1
    return row


def annotated(scene):
    ground = scene.ground.copy()
    for thing in scene.things:
        ground[thing.mask] = 255
    return scene.image, ground, [AnnotatedThing(t.category, t.box, t.visible) for t in scene.things]


def test_crops_say_what_they_show():
    sampler = CropSampler(64, 0.5, 0.3)
    words = {word: name for name, options in SYNONYMS.items() for word in options}
    kinds = set()
    for i in range(30):
        scene = world.render(3, i)
        crop = sampler(*annotated(scene), Rng(0, i))
        assert crop.image.shape == (64, 64, 3) and crop.image.dtype == np.uint8
        things, named, seen = np.split(crop.content, [K, K + G])
        present = np.bincount([t.category for t in scene.things], minlength=K)
        assert (things <= present).all()
        assert set(np.flatnonzero(named)) <= set(np.flatnonzero(seen))
        assert things.sum() + named.sum() > 0
        for category in np.flatnonzero(things):
            color, shape = world.CLASSES[category].split()
            for name in (color, shape):
                for caption in (crop.caption, crop.paraphrase):
                    assert any(w in caption for w, n in words.items() if n == name), (name, caption)
        kinds.add(min(int(things.sum()), 2))
    assert kinds == {0, 1, 2}


def test_positives_ask_for_the_same_things_and_seen_grounds():
    crops = torch.stack([content([3], [], [1]), content([3, 3], [], [1]), content([], [2], [2, 4])])
    captions = torch.stack(
        [content([3]), content([3], [1]), content([3], [2]), content([3, 3]), content([], [4])]
    )
    expected = torch.tensor([[1, 1, 0, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 1]])
    assert torch.equal(positive_pairs(crops, captions), expected.float())


def test_loss_of_a_hand_computed_batch():
    u = torch.eye(3)[:2]
    v = torch.eye(3)[:2]
    scale = torch.tensor(2.0)
    apart = torch.stack([content([1]), content([2])])
    hit, miss = math.exp(2), 1.0

    def loss(content):
        return contrastive_loss(u, v, scale, labels=content, matches=positive_pairs).item()

    assert loss(apart) == pytest.approx(-math.log(hit / (hit + miss)))
    same = torch.stack([content([1]), content([1])])
    both = -0.5 * (math.log(hit / (hit + miss)) + math.log(miss / (hit + miss)))
    assert loss(same) == pytest.approx(both)


def batch(n=4):
    sampler = CropSampler(64, 0.6, 0.3)
    crops = [sampler(*annotated(world.render(5, i)), Rng(1, i)) for i in range(n)]
    return [
        {
            "crops": torch.from_numpy(c.image.transpose(2, 0, 1).copy())[None],
            "captions": [c.caption],
            "paraphrases": [c.paraphrase],
            "contents": torch.from_numpy(c.content)[None],
        }
        for c in crops
    ]


@pytest.mark.parametrize("locked", [False, True])
def test_locked_text_gets_no_gradient(locked):
    torch.manual_seed(0)
    model = ContrastiveCLIP(clip=load_clip("shapes-vit", "random"), locked_text=locked).train()
    model(batch())["loss_contrastive"].backward()
    text = [p.grad is not None for p in model.clip.text.parameters()]
    assert all(text) != locked and any(text) != locked
    assert all(p.grad is not None for p in model.clip.visual.parameters())
    assert model.clip.logit_scale.grad is not None


def test_a_clip_with_a_bias_learns_pairs_alone():
    """The loss is the sum of binary cross-entropies of all pairs; the bias learns, too."""
    torch.manual_seed(0)
    model = ContrastiveCLIP(clip=load_clip("shapes-siglip", "random"), locked_text=True).train()
    clip, inputs = model.clip, batch()
    loss = model(inputs)["loss_contrastive"]
    loss.backward()
    with torch.no_grad():
        u = torch.nn.functional.normalize(model.encode_crops([x["crops"] for x in inputs]), dim=-1)
        v = torch.nn.functional.normalize(model.encode_captions([x["captions"][0] for x in inputs]), dim=-1)
        contents = torch.cat([x["contents"] for x in inputs])
        signs = 2 * positive_pairs(contents, contents) - 1
        logits = clip.logit_scale.exp() * u @ v.T + clip.logit_bias
        expected = torch.nn.functional.softplus(-signs * logits).sum() / len(inputs)
        softmax = contrastive_loss(u, v, clip.logit_scale.exp(), labels=contents, matches=positive_pairs)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert loss.item() != pytest.approx(softmax.item(), rel=0.1)
    assert clip.logit_bias.grad.abs() > 0


def test_text_alone_learns_from_paraphrases():
    torch.manual_seed(0)
    model = ContrastiveCLIP(clip=load_clip("shapes-vit", "random"), text_only=True).train()
    model(batch())["loss_contrastive"].backward()
    assert all(p.grad is not None for p in model.clip.text.parameters())
    assert not any(p.requires_grad for p in model.clip.visual.parameters())
    with pytest.raises(ValueError, match=r"nothing would be trained: set .*TEXT_ONLY False"):
        ContrastiveCLIP(clip=load_clip("shapes-vit", "random"), text_only=True, locked_text=True)


def test_locked_text_is_the_shared_one():
    cfg = get_cfg()
    clipdense.add_clipdense_config(cfg)
    cfg.MODEL.CLIP.NAME, cfg.MODEL.CLIP.PRETRAINED = "shapes-eva", "random"
    cfg.MODEL.CONTRASTIVE_CLIP.LOCKED_TEXT = "shapes-text"
    text = ContrastiveCLIP(**ContrastiveCLIP.from_config(cfg)).clip.text
    shipped = load_file(nano_path("shapes-text"))
    assert all(torch.equal(v.half(), shipped[f"text.{k}"]) for k, v in text.state_dict().items())


def test_centring_measures_the_mean_embedding():
    u = torch.eye(4)
    assert centring_loss(u).item() == pytest.approx(1 / 4)
    assert centring_loss(torch.cat([u, -u])).item() == 0
    assert centring_loss(u[:1].repeat(5, 1)).item() == 1
    model = ContrastiveCLIP(clip=load_clip("shapes-vit", "random"), centring_weight=0.5).train()
    losses = model(batch())
    assert set(losses) == {"loss_contrastive", "loss_centring"} and 0 < losses["loss_centring"] <= 1


def test_crops_of_several_sizes_keep_their_order():
    model = ContrastiveCLIP(clip=load_clip("shapes-vit", "random")).eval()
    crops = [
        torch.randint(256, (n, 3, size, size), dtype=torch.uint8) for n, size in ((2, 64), (1, 128), (1, 64))
    ]
    together = model.encode_crops(crops)
    apart = torch.cat([model.encode_crops([part]) for part in crops])
    assert together.shape == (4, 128)
    torch.testing.assert_close(together, apart, atol=1e-4, rtol=1e-4)


def test_a_local_pool_attends_to_the_neighbourhood():
    torch.manual_seed(0)
    tower = load_clip("shapes-rn", "random").visual
    localize_pool(tower)
    pool, features = tower.attnpool, torch.randn(1, 768, 8, 8).abs()
    positions = resize_table(pool.positional_embedding, tower.grid, (8, 8), "bicubic")
    tokens = features.flatten(2).transpose(1, 2)
    tokens = torch.cat([tokens.mean(1, keepdim=True), tokens], 1) + positions
    q, k = (p(tokens).view(1, 65, pool.num_heads, -1).transpose(1, 2) for p in (pool.q_proj, pool.k_proj))
    attention = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(-1)[0].mean(0)
    rows, columns = torch.arange(64) // 8, torch.arange(64) % 8
    distance = torch.maximum((rows[:, None] - rows).abs(), (columns[:, None] - columns).abs())
    near = (attention[1:, 1:] * (distance <= 1)).sum(1)  # 4 to 9 of 64 positions
    assert near.min() > 0.9
    assert attention[1:, 0].max() < 0.01  # the mean token is not among the neighbours
    assert attention[0].max() < 0.1  # but attends to the whole map


def test_training_keeps_a_local_pool():
    model = ContrastiveCLIP(clip=load_clip("shapes-rn", "random"), locked_text=True, local_pool=True)
    pool = model.clip.visual.attnpool
    before = pool.v_proj.weight.detach().clone()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    crops = torch.randint(256, (4, 3, 64, 64), dtype=torch.uint8)
    model.encode_crops([crops]).square().mean().backward()
    optimizer.step()
    assert not pool.v_proj.weight[:, :POOL_CHANNELS].any()
    assert (pool.v_proj.weight != before)[:, POOL_CHANNELS:].any()
    frozen = (pool.positional_embedding, *pool.q_proj.parameters(), *pool.k_proj.parameters())
    assert not any(p.requires_grad for p in frozen)


def test_a_local_pool_needs_a_pool():
    with pytest.raises(ValueError, match="LOCAL_POOL is for ResNets"):
        ContrastiveCLIP(clip=load_clip("shapes-vit", "random"), local_pool=True)


def test_short_token_rows_change_nothing():
    model = ContrastiveCLIP(clip=load_clip("shapes-vit", "random")).eval()
    captions = ["a red star", "a photo of a blue ring and a pink box on the lawn"]
    whole = model.clip.encode_text(model.clip.tokenizer(captions))
    torch.testing.assert_close(model.encode_captions(captions), whole, atol=1e-5, rtol=1e-5)


def test_export_loads_again(tmp_path):
    torch.manual_seed(0)
    model = ContrastiveCLIP(clip=load_clip("shapes-rn", "random")).eval()
    save_checkpoint(tmp_path / "export.safetensors", *model.export_state())
    again = load_clip(str(tmp_path / "export.safetensors"))
    image = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(
        again.encode_image(image), model.clip.encode_image(image), atol=2e-3, rtol=2e-2
    )


def test_retrieval_finds_equal_content():
    evaluator = CropRetrievalEvaluator(distributed=False)
    evaluator.reset()
    contents = torch.stack([content([1]), content([2]), content([1])])
    u = torch.eye(3)
    v = u[[2, 1, 0]]  # crop 0 finds caption 2: another image's, but of equal content
    evaluator.process([{"contents": contents}], [{"image_embeddings": u, "text_embeddings": v}])
    assert evaluator.evaluate()["retrieval"]["image_to_text_R@1"] == 100
    evaluator.reset()
    evaluator.process([{"contents": contents}], [{"image_embeddings": u, "text_embeddings": v[[1, 0, 2]]}])
    assert evaluator.evaluate()["retrieval"]["image_to_text_R@1"] < 100


@pytest.fixture
def record(tmp_path):
    """A scene on disk, as a record of shapes_clip_*."""
    scene = world.render(4, 1)
    labels = scene.ground + np.uint8(K)
    for thing in scene.things:
        labels[thing.mask] = thing.category
    Image.fromarray(scene.image).save(tmp_path / "0.png")
    Image.fromarray(labels).save(tmp_path / "0_labels.png")
    return {
        "file_name": str(tmp_path / "0.png"),
        "sem_seg_file_name": str(tmp_path / "0_labels.png"),
        "image_id": 0,
        "annotations": [
            {
                "category_id": t.category,
                "bbox": [t.box[0], t.box[1], t.box[2] - t.box[0], t.box[3] - t.box[1]],
                "visible": t.visible,
            }
            for t in scene.things
        ],
    }


def test_mapper_reads_scenes_from_disk(record):
    cfg = get_cfg()
    clipdense.add_clipdense_config(cfg)
    whole = {"SIZE": 128, "PER_IMAGE": 1, "SHARE": 1, "OBJECTS": 0.0, "WINDOWS": 1.0}
    cfg.INPUT.CROP_CAPTION.VIEWS[0]["SHARE"] = 1  # whole numbers are shares, too
    cfg.INPUT.CROP_CAPTION.VIEWS.append(whole)
    test = CropCaptionMapper(cfg, is_train=False)
    first, again = test(record), test(record)
    assert first["crops"].shape == (4, 3, 64, 64) and first["contents"].shape == (4, CONTENT_SIZE)
    assert first["captions"] == again["captions"] and torch.equal(first["crops"], again["crops"])
    model = ContrastiveCLIP(clip=load_clip("shapes-vit", "random")).train()
    assert model([first])["loss_contrastive"].isfinite()
    train = CropCaptionMapper(cfg, is_train=True)
    drawn = [train(record)["crops"] for _ in range(40)]
    assert {tuple(crops.shape) for crops in drawn} == {(4, 3, 64, 64), (1, 3, 128, 128)}
    assert len({crops.sum().item() for crops in drawn}) > 20
    with pytest.raises(ConfigError, match=r"CROP_CAPTION.VIEWS: .* must have the keys OBJECTS, PER_IMAGE"):
        CropView.parse({"SIZE": 64})
    del record["sem_seg_file_name"]
    with pytest.raises(KeyError, match=r"0\.png.*shapes_clip"):
        test(record)


def test_pairs_are_single_crops_of_the_view(record):
    cfg = get_cfg()
    clipdense.add_clipdense_config(cfg)
    cfg.INPUT.CROP_CAPTION.VIEWS = [
        {"SIZE": 32, "PER_IMAGE": 1, "SHARE": 1.0, "OBJECTS": 1.0, "WINDOWS": 0.0}
    ]
    pairs = [CropPairMapper(cfg, is_train=True)(record) for _ in range(20)]
    assert all(p["image"].shape == (3, 32, 32) and p["image"].dtype == torch.uint8 for p in pairs)
    assert len({p["caption"] for p in pairs}) > 1 and all(" and " not in p["caption"] for p in pairs)
    whole = CropPairMapper(cfg, is_train=False)(record)  # in evaluation, Detectron2's input
    assert whole["image"].shape[1] > 32 and "caption" not in whole
