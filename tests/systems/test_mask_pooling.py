"""FC-CLIP: training, any vocabulary, all backbones, empty masks, masks from elsewhere, and ODISE's heads."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from clipdense.clip.vocabulary import Vocabulary
from clipdense.regions import pool_masks
from clipdense.systems.mask_pooling import Ensemble, region_masks
from clipdense.systems.mask_pooling.queries import SynonymClassifier
from tests.helpers.fcclip import CLASSES, build_fcclip, fcclip_batch, small_fcclip_config

from detectron2.utils.events import EventStorage

CLIPS = ("shapes-rn", "shapes-vit", "shapes-eva")


@pytest.fixture(scope="module", params=CLIPS)
def model(request: pytest.FixtureRequest):
    return build_fcclip(small_fcclip_config(request.param)).eval()


@pytest.fixture(scope="module")
def resnet():
    return build_fcclip(small_fcclip_config()).eval()


def losses_of(model):
    model.train()
    with EventStorage():
        return model(fcclip_batch())


def trained(model, losses):
    """Return the names of the parameters with a gradient."""
    model.zero_grad()
    sum(losses.values()).backward()
    names = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    model.zero_grad()
    return names


def test_training_moves_the_heads_and_leaves_clip_alone(model):
    losses = losses_of(model)
    assert {"loss_ce", "loss_mask", "loss_dice", "loss_ce_0", "loss_ce_1"} <= set(losses)
    moved = trained(model.train(), losses)
    assert {"classifier.void", "classifier.logit_scale", "head.predictor.query_feat.weight"} <= moved
    assert "head.predictor.class_embed.pool_proj.1.weight" in moved
    assert not any(".tower." in name or name.startswith("clip.") for name in moved)
    model.eval()


@torch.no_grad()
def test_all_outputs_of_non_square_images(model):
    outputs = model.eval()(fcclip_batch())
    for sample, output in zip(fcclip_batch(), outputs, strict=True):
        size = (sample["height"], sample["width"])
        assert output["sem_seg"].shape == (len(CLASSES), *size)
        assert output["panoptic_seg"][0].shape == size
        assert output["instances"].image_size == size


@torch.no_grad()
def test_region_embeddings_are_those_of_clip(model):
    """The whole image as one mask: ViTs give the mean of the dense map, as CLIPSelf pools it."""
    images = model.preprocess_image(fcclip_batch())
    features = model.backbone(images.tensor)
    joint = features["joint"]
    proposals = replace(model.propose(fcclip_batch()), mask_logits=torch.ones(2, 3, 20, 24))
    regions = model.embed_regions(proposals, fcclip_batch())
    assert regions.embeddings.shape == (2, 3, 64 if joint.shape[1] == 64 else model.clip.embed_dim)
    assert regions.valid.all()
    if model.region_head == "dense" and joint.shape[1] == model.clip.embed_dim:
        whole = torch.ones(2, 1, *joint.shape[-2:])
        expected = pool_masks(joint, whole, pooling="clipself")
        torch.testing.assert_close(regions.embeddings[:, 0], expected)


@torch.no_grad()
def test_the_vocabulary_switches_from_20_to_1203_classes_without_rebuilding(
    resnet, data_dir: Path, monkeypatch
):
    lists = {20: "catseg_voc20.json", 1203: "clipself_lvis_v1_all_classes.json"}
    vocabularies = {
        n: Vocabulary.from_names(json.loads((data_dir / "class_lists" / name).read_text()))
        for n, name in lists.items()
    }
    batch = fcclip_batch()[:1]

    def segment(n: int):
        resnet.set_vocabulary(vocabularies[n])
        return resnet(batch)[0]

    first = {n: segment(n) for n in lists}
    assert first[20]["sem_seg"].shape[0] == 20

    def refuse(tokens):
        raise AssertionError("text is encoded again")

    monkeypatch.setattr(resnet.clip, "encode_text", refuse)
    for n, output in first.items():
        again = segment(n)
        assert torch.equal(again["panoptic_seg"][0], output["panoptic_seg"][0])
        assert torch.equal(again["instances"].pred_classes, output["instances"].pred_classes)
    resnet.set_vocabulary(Vocabulary.from_names(CLASSES))


def test_the_best_synonym_decides():
    classifier = SynonymClassifier(2)
    rows, classes = torch.eye(2).repeat(2, 1), torch.tensor([0, 0, 1, 1])
    logits = classifier(torch.tensor([1.0, 0.0]), rows, classes)
    assert logits[0] == logits[1] == classifier.scale
    alone = classifier(torch.tensor([1.0, 0.0]), rows[:2], torch.tensor([0, 1]))
    assert alone[1] == 0


class TestEnsemble:
    inside = torch.tensor([[2.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    outside = torch.tensor([[0.0, 3.0], [1.0, 0.0]])
    base = torch.tensor([True, False])
    valid = torch.tensor([True, True])

    def test_is_the_geometric_mean_without_void(self):
        scores = Ensemble(0.25, 0.5)(self.inside, self.outside, self.valid, self.base)
        p, q = self.inside[:, :2].softmax(-1), self.outside.softmax(-1)
        e = torch.tensor([0.25, 0.5])
        fused = p ** (1 - e) * q**e
        void = self.inside.softmax(-1)[:, 2:]
        torch.testing.assert_close(scores[:, :2], fused / fused.sum(1, keepdim=True) * (1 - void))
        torch.testing.assert_close(scores.sum(1), torch.ones(2))

    def test_classes_that_are_not_known_to_be_base_are_novel(self):
        unknown = Ensemble(0.25, 0.5)(self.inside, self.outside, self.valid, None)
        novel = Ensemble(0.25, 0.5)(self.inside, self.outside, self.valid, torch.zeros(2).bool())
        assert torch.equal(unknown, novel)

    @pytest.mark.parametrize("value", [0.0, float("nan")])
    def test_empty_masks_keep_their_in_vocabulary_scores(self, value):
        outside = torch.stack([torch.full((2,), value), self.outside[1]])
        valid = torch.tensor([False, True])
        scores = Ensemble()(self.inside, outside, valid, self.base)
        torch.testing.assert_close(scores[0], self.inside[0].softmax(-1))
        full = Ensemble()(self.inside, self.outside, self.valid, self.base)
        assert torch.equal(scores[1], full[1])

    def test_confident_regions_lower_void(self):
        adjusted = Ensemble(void_adjustment=0.5)(self.inside, self.outside, self.valid, self.base)
        plain = Ensemble()(self.inside, self.outside, self.valid, self.base)
        top = self.outside.softmax(-1).amax(-1)
        torch.testing.assert_close(adjusted[:, 2], plain[:, 2] * (1 - 0.5 * top))
        torch.testing.assert_close(adjusted.sum(1), torch.ones(2))

    def test_one_classifier_alone(self):
        alone = Ensemble(source="in_vocabulary")(self.inside, self.outside, self.valid, self.base)
        torch.testing.assert_close(alone, self.inside.softmax(-1))
        other = Ensemble(source="out_of_vocabulary")(self.inside, self.outside, self.valid, self.base)
        torch.testing.assert_close(other[:, :2] / (1 - other[:, 2:]), self.outside.softmax(-1))

    def test_wrong_settings_are_refused(self):
        with pytest.raises(ValueError, match="rule must be one of probability, logit"):
            Ensemble(rule="sum")
        with pytest.raises(ValueError, match=r"alpha must lie in 0 \.\. 1, not 2"):
            Ensemble(alpha=2)


@pytest.mark.parametrize(
    ("pixel", "inside"),
    [((0, 1), {"fcclip": 0, "odise": 1, "clipself": 0}), ((1, 1), {"fcclip": 0, "odise": 1, "clipself": 1})],
)
def test_policies_of_masks_of_one_pixel(pixel, inside):
    """The pixel lies at the border or at the centre of a cell of 4 x 4 pixels."""
    logits = torch.full((1, 1, 8, 8), -1.0)
    logits[0, 0, pixel[0], pixel[1]] = 1.0
    found = {policy: int(region_masks(logits, (2, 2), policy, cell=4).sum()) for policy in inside}
    assert found == inside


def test_soft_masks_are_weights():
    weights = region_masks(torch.zeros(1, 1, 4, 4), (2, 2), "soft")
    torch.testing.assert_close(weights, torch.full((1, 1, 2, 2), 0.5))
    with pytest.raises(ValueError, match="masks must be one of fcclip"):
        region_masks(weights, (2, 2), "hard")


class OneMask:
    """A source of masks: the upper half of each image."""

    def propose_masks(self, sample):
        mask = torch.zeros(1, sample["height"], sample["width"], dtype=torch.bool)
        mask[:, : sample["height"] // 2] = True
        return mask


@torch.no_grad()
def test_masks_from_elsewhere_are_classified_by_clip_alone(model):
    model.mask_source = OneMask()
    try:
        batch = fcclip_batch()
        proposals = model.propose(batch)
        assert proposals.query_embeddings is None
        scores = model.classify(proposals, batch)
        regions = model.embed_regions(proposals, batch)
        rows = model.text_embeddings()["rows"]
        cosines = F.normalize(regions.embeddings[0], dim=-1) @ rows.T
        expected = (cosines * model.clip.logit_scale.exp()).softmax(-1)
        torch.testing.assert_close(scores[0][:, :-1], expected)
        for sample, output in zip(batch, model(batch), strict=True):
            ids, segments = output["panoptic_seg"]
            assert len(segments) == 1
            inside = ids.bool()
            assert inside[: sample["height"] // 2 - 1].all() and not inside[sample["height"] // 2 + 1 :].any()
    finally:
        model.mask_source = None


class NoMask:
    """A source without any mask."""

    def propose_masks(self, sample):
        return torch.zeros(0, sample["height"], sample["width"], dtype=torch.bool)


@torch.no_grad()
def test_an_image_without_masks_is_void(model):
    model.mask_source = NoMask()
    try:
        (output, _) = model(fcclip_batch())
    finally:
        model.mask_source = None
    assert output["panoptic_seg"][1] == [] and not output["panoptic_seg"][0].any()


def test_the_out_of_vocabulary_classifier_may_be_absent():
    cfg = small_fcclip_config()
    cfg.MODEL.MASK_POOLING.OUT_OF_VOCABULARY.HEAD = "none"
    model = build_fcclip(cfg).eval()
    with torch.no_grad():
        batch = fcclip_batch()
        pairs = model.class_logits(model.propose(batch), batch)
        scores = model.classify(model.propose(batch), batch)
    torch.testing.assert_close(scores[0], pairs[0].in_vocabulary.softmax(-1))
    cfg.MODEL.MASK_FORMER.TEST.MASK_SOURCE = "ground_truth"
    cfg.DATASETS.TEST = ("shapes_ov_panoptic_mini_val",)
    with pytest.raises(ValueError, match="only the out-of-vocabulary classifier scores masks"):
        build_fcclip(cfg)


@pytest.mark.parametrize("clip", ["shapes-rn", "shapes-vit"])
def test_regions_can_train_the_tower(clip):
    """OVRCOAT: the cross-entropy of ground-truth masks reaches the tower, whose batch norms stay constant."""
    cfg = small_fcclip_config(clip)
    cfg.MODEL.FROZEN_CLIP.TRAIN_TOWER = True
    cfg.MODEL.MASK_POOLING.OUT_OF_VOCABULARY.LOSS_WEIGHT = 0.1
    model = build_fcclip(cfg)
    losses = losses_of(model)
    assert losses["loss_regions"] > 0
    moved = trained(model, {"loss_regions": losses["loss_regions"]})
    assert any(".tower." in name for name in moved) and not any(name.startswith("clip.") for name in moved)


@torch.no_grad()
def test_a_simple_pyramid_over_the_last_map():
    cfg = small_fcclip_config("shapes-vit")
    cfg.MODEL.BACKBONE.NAME, cfg.MODEL.TRUNK.NAME = "build_trunk_simple_pyramid_backbone", "FrozenCLIPTrunk"
    cfg.MODEL.FROZEN_CLIP.BLOCKS, cfg.MODEL.FPN.OUT_CHANNELS, cfg.MODEL.FPN.TOP_BLOCK = [], 32, ""
    cfg.MODEL.SIMPLE_PYRAMID.SCALE_FACTORS = (2.0, 1.0, 0.5, 0.25)
    cfg.MODEL.MASK_FORMER.IN_FEATURES = ["p2", "p3", "p4", "p5"]
    model = build_fcclip(cfg).eval()
    proposals = model.propose(fcclip_batch())
    assert model.embed_regions(proposals, fcclip_batch()).embeddings.shape == (2, 6, model.clip.embed_dim)
    assert model(fcclip_batch())[0]["sem_seg"].isfinite().all()


def odise_config():
    cfg = small_fcclip_config("shapes-vit")
    keys = cfg.MODEL.MASK_POOLING
    keys.EMBED_NORM, keys.TEXT_PROJECTION, keys.VOID_INIT = True, 16, "text"
    keys.OUT_OF_VOCABULARY.HEAD, keys.OUT_OF_VOCABULARY.MASKS = "mask_tokens", "odise"
    return cfg


class TestODISE:
    def test_labels(self):
        model = build_fcclip(odise_config())
        empty = model.clip.encode_text(model.clip.tokenize([""]))
        torch.testing.assert_close(model.classifier.void.detach(), empty)
        moved = trained(model, losses_of(model))
        assert {"classifier.text_proj.weight", "classifier.void"} <= moved
        assert not any(name.startswith("clip.") for name in moved)
        with torch.no_grad():
            assert model.eval()(fcclip_batch())[0]["sem_seg"].isfinite().all()

    def test_captions(self):
        cfg = odise_config()
        cfg.MODEL.MASK_POOLING.GROUNDING.ENABLED = True
        model = build_fcclip(cfg)
        losses = losses_of(model)
        assert {"loss_grounding", "loss_grounding_0", "loss_ce", "loss_mask"} <= set(losses)
        moved = trained(model, losses)
        assert {"classifier.text_proj.weight", "head.predictor.class_embed.objectness.weight"} <= moved
        model.eval()
        with torch.no_grad():
            proposals = model.propose(fcclip_batch())
            scores = model.classify(proposals, fcclip_batch())
        void = proposals.class_logits.softmax(-1)[0, :, 1]
        torch.testing.assert_close(scores[0][:, -1], void)
        cfg.MODEL.MASK_POOLING.OUT_OF_VOCABULARY.LOSS_WEIGHT = 0.1
        with pytest.raises(ValueError, match="LOSS_WEIGHT trains the tower"):
            build_fcclip(cfg)
        cfg.MODEL.MASK_POOLING.OUT_OF_VOCABULARY.HEAD = "dense"
        cfg.MODEL.FROZEN_CLIP.TRAIN_TOWER = True
        with pytest.raises(ValueError, match="LOSS_WEIGHT needs class labels"):
            build_fcclip(cfg)

    def test_a_backbone_without_clip(self):
        cfg = odise_config()
        cfg.MODEL.BACKBONE.NAME, cfg.MODEL.BACKBONE.FREEZE_AT = "build_resnet_backbone", 0
        cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
        cfg.MODEL.RESNETS.STEM_OUT_CHANNELS = cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 8
        cfg.MODEL.RESNETS.WIDTH_PER_GROUP = 4
        model = build_fcclip(cfg).eval()
        with torch.no_grad():
            assert model(fcclip_batch())[0]["sem_seg"].isfinite().all()
        cfg.MODEL.MASK_POOLING.OUT_OF_VOCABULARY.HEAD = "dense"
        with pytest.raises(ValueError, match="needs a frozen CLIP in its backbone"):
            build_fcclip(cfg)

    def test_towers_without_mask_tokens_are_refused(self):
        cfg = odise_config()
        cfg.MODEL.CLIP.NAME, cfg.MODEL.BACKBONE.NAME = "shapes-rn", "FrozenCLIPTrunk"
        cfg.MODEL.FROZEN_CLIP.BLOCKS, cfg.MODEL.FROZEN_CLIP.LAST_BLOCK = [], "plain"
        cfg.MODEL.FROZEN_CLIP.JOINT = "pooling"
        with pytest.raises(ValueError, match="ResNetTower cannot give mask tokens"):
            build_fcclip(cfg)
