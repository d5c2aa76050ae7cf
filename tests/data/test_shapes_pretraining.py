"""Contrastive pre-training: what crops say, what the loss counts as positive, what stays locked."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

import clipdense
from clipdense.checkpoint import save_checkpoint
from clipdense.clip import load_clip
from clipdense.data.shapes import world
from clipdense.data.shapes.captions import SYNONYMS
from clipdense.data.shapes.draw import Rng
from clipdense.data.shapes.pretraining import ContrastiveCLIP, CropCaptionMapper, CropRetrievalEvaluator
from clipdense.data.shapes.pretraining.crops import CONTENT_SIZE, AnnotatedThing, CropSampler
from clipdense.data.shapes.pretraining.meta_arch import contrastive_loss, positive_pairs

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
                assert any(w in crop.caption for w, n in words.items() if n == name), (name, crop.caption)
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
    assert contrastive_loss(u, v, apart, scale).item() == pytest.approx(-math.log(hit / (hit + miss)))
    same = torch.stack([content([1]), content([1])])
    both = -0.5 * (math.log(hit / (hit + miss)) + math.log(miss / (hit + miss)))
    assert contrastive_loss(u, v, same, scale).item() == pytest.approx(both)


def batch(n=4):
    sampler = CropSampler(64, 0.6, 0.3)
    crops = [sampler(*annotated(world.render(5, i)), Rng(1, i)) for i in range(n)]
    return [
        {
            "crops": torch.from_numpy(c.image.transpose(2, 0, 1).copy())[None],
            "captions": [c.caption],
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


def test_mapper_reads_scenes_from_disk(tmp_path):
    scene = world.render(4, 1)
    labels = scene.ground + np.uint8(K)
    for thing in scene.things:
        labels[thing.mask] = thing.category
    Image.fromarray(scene.image).save(tmp_path / "0.png")
    Image.fromarray(labels).save(tmp_path / "0_labels.png")
    record = {
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
    cfg = get_cfg()
    clipdense.add_clipdense_config(cfg)
    test = CropCaptionMapper(cfg, is_train=False)
    first, again = test(record), test(record)
    assert first["crops"].shape == (4, 3, 64, 64) and first["contents"].shape == (4, CONTENT_SIZE)
    assert first["captions"] == again["captions"] and torch.equal(first["crops"], again["crops"])
    model = ContrastiveCLIP(clip=load_clip("shapes-vit", "random")).train()
    assert model([first])["loss_contrastive"].isfinite()
    train = CropCaptionMapper(cfg, is_train=True)
    assert not torch.equal(train(record)["crops"], train(record)["crops"])
    del record["sem_seg_file_name"]
    with pytest.raises(KeyError, match=r"0\.png.*shapes_clip"):
        test(record)
