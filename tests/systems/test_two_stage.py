"""OVSeg: training, any vocabulary in evaluation, all outputs, and masks without a crop."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from clipdense.checkpoint import save_checkpoint
from clipdense.clip import load_clip
from clipdense.clip.mask_prompts import MaskPrompts
from clipdense.clip.vocabulary import Vocabulary
from clipdense.data.image import read_image
from clipdense.engine.checkpoint import TrainingCheckpointer
from clipdense.inference import MergeSettings
from clipdense.regions import FusionSettings, RegionEncoder
from clipdense.run.config import add_clipdense_config
from clipdense.systems.mask_adaptation import MaskAdaptedCLIP
from clipdense.systems.two_stage import OVSeg, Scoring

from detectron2.config import CfgNode, get_cfg
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

CLASSES = ["red star", "blue star", "green ring", "grass"]
NAME = "two_stage_test"


def small_config() -> CfgNode:
    cfg = get_cfg()
    add_clipdense_config(cfg)
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.DEVICE, cfg.INPUT.FORMAT = "OVSeg", "cpu", "RGB"
    cfg.MODEL.CLIP.NAME = "shapes-vit"
    cfg.MODEL.BACKBONE.NAME, cfg.MODEL.BACKBONE.FREEZE_AT = "build_resnet_backbone", 0
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.RESNETS.STEM_OUT_CHANNELS = cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 8
    cfg.MODEL.RESNETS.WIDTH_PER_GROUP = 4
    keys = cfg.MODEL.MASK_FORMER
    keys.PIXEL_DECODER.CONV_DIM = keys.MASK_DIM = keys.HIDDEN_DIM = 32
    keys.NHEADS, keys.DIM_FEEDFORWARD, keys.NUM_OBJECT_QUERIES, keys.DEC_LAYERS = 4, 32, 6, 2
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = len(CLASSES)
    cfg.MODEL.TWO_STAGE.EMBED_HIDDEN_DIM, cfg.MODEL.TWO_STAGE.TEMPLATES = 16, "single"
    cfg.MODEL.TWO_STAGE.MASK_PROMPTS.DEPTH = 2
    cfg.MODEL.TWO_STAGE.CROP_BATCH_SIZE = 4
    cfg.DATASETS.TRAIN = (NAME,)
    return cfg


@pytest.fixture(scope="module")
def built() -> OVSeg:
    MetadataCatalog.get(NAME).set(stuff_classes=CLASSES)
    torch.manual_seed(0)
    model = build_model(small_config())
    MetadataCatalog.remove(NAME)
    return model


@pytest.fixture
def model(built: OVSeg) -> OVSeg:
    """Return the model with its settings as built."""
    built.scoring, built.merging = Scoring(), MergeSettings(best_mask_threshold=0.4, max_dense_classes=256)
    built.encoder.rule = replace(built.encoder.rule, threshold=0.4)
    built.init_vocabulary(Vocabulary.from_names(CLASSES))
    return built.eval()


def batch() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    samples: list[dict[str, Any]] = []
    for height, width in ((64, 96), (80, 72)):
        image = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
        labels = torch.randint(0, 4, (height, width), generator=generator)
        samples.append({"image": image, "sem_seg": labels, "height": height + 10, "width": width - 5})
    return samples


def test_training_moves_the_proposals_and_leaves_clip_alone(model: OVSeg) -> None:
    model.train()
    with EventStorage():
        losses = model(batch())
    assert {"loss_ce", "loss_mask", "loss_dice", "loss_ce_0"} <= set(losses)
    sum(losses.values()).backward()
    gradients = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert "classifier.no_object" in gradients
    assert any(name.startswith("head.predictor.class_embed") for name in gradients)
    assert not any(p.requires_grad for p in model.encoder.parameters())
    model.zero_grad()


@torch.no_grad()
def test_photographs_with_20_and_1203_classes(
    model: OVSeg, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same images, the same model: the second time no text is encoded. So many names give labels."""
    lists = {20: "catseg_voc20.json", 1203: "clipself_lvis_v1_all_classes.json"}
    vocabularies = {
        n: Vocabulary.from_names(json.loads((data_dir / "class_lists" / name).read_text()))
        for n, name in lists.items()
    }
    files = sorted((data_dir / "voc2012" / "JPEGImages").glob("*.jpg"))[:2]
    images = [torch.from_numpy(read_image(str(f), "RGB")[::4, ::4].copy()).permute(2, 0, 1) for f in files]

    def segment(n: int) -> list[dict[str, Any]]:
        model.set_vocabulary(vocabularies[n])
        return model([{"image": image} for image in images])

    first = {n: segment(n) for n in lists}
    assert first[20][0]["sem_seg"].shape == (20, *images[0].shape[1:])
    assert first[1203][1]["sem_seg_labels"].shape == images[1].shape[1:]

    def refuse(tokens: torch.Tensor) -> torch.Tensor:
        raise AssertionError("text is encoded again")

    monkeypatch.setattr(model.encoder.clip, "encode_text", refuse)
    for n, outputs in first.items():
        for ours, theirs in zip(segment(n), outputs, strict=True):
            for key in ours:
                torch.testing.assert_close(ours[key], theirs[key])
    with pytest.raises(AssertionError, match="encoded again"):
        model.set_vocabulary(Vocabulary.from_names(["a name of no list"]))


@torch.no_grad()
def test_base_classes_are_those_of_training(model: OVSeg) -> None:
    model.set_vocabulary(Vocabulary.from_names(["hedge", "Red Star"]))
    assert model.vocabulary.base == (False, True)
    model.scoring = Scoring("ensemble", "zsseg", FusionSettings(0.0, 1.0), "boost")
    proposals = model.propose(batch())
    (fused, _), model.scoring = model.classify(proposals, batch()), Scoring("proposals")
    queries, _ = model.classify(proposals, batch())
    torch.testing.assert_close(fused[:, 1:], queries[:, 1:])  # of the base class, and the background
    assert (fused[:, 0] - queries[:, 0]).abs().max() > 1e-3


@torch.no_grad()
def test_masks_are_proposed_without_a_vocabulary(model: OVSeg) -> None:
    model.init_vocabulary(None)
    sample = batch()[1]
    masks = model.propose_masks(sample)
    assert masks.dtype == torch.bool and masks.shape == (6, 90, 67)
    proposals = model.propose([sample])
    assert proposals.image_sizes == [(80, 72)] and proposals.class_logits is None
    assert proposals.padded_size == (96, 96) and proposals.masks(0).shape == (6, 80, 72)
    assert proposals.query_embeddings.shape == (1, 6, model.encoder.clip.embed_dim)
    model.encoder.rule = replace(model.encoder.rule, threshold=0.0, padded_logits=True)
    assert torch.equal(model.propose_masks(sample), masks_above(model, sample, 0.5))


def masks_above(model: OVSeg, sample: dict[str, Any], threshold: float) -> torch.Tensor:
    model.encoder.rule = replace(model.encoder.rule, threshold=threshold, padded_logits=False)
    return model.propose_masks(sample)


@torch.no_grad()
def test_masks_without_a_crop(model: OVSeg) -> None:
    """No mask is above 1: the proposals' own scores are left, or nothing is."""
    model.encoder.rule = replace(model.encoder.rule, threshold=1.0)
    neutral = model(batch())[0]["sem_seg"]
    model.scoring = Scoring("proposals")
    torch.testing.assert_close(neutral, model(batch())[0]["sem_seg"])
    model.scoring = Scoring("clip")
    assert not model(batch())[0]["sem_seg"].any()


@torch.no_grad()
def test_every_output(model: OVSeg) -> None:
    outputs = {"panoptic_on": True, "instance_on": True}
    model.merging = replace(model.merging, **outputs, object_mask_threshold=0.0, overlap_threshold=0.0)
    output = model(batch())[1]
    ids, segments = output["panoptic_seg"]
    assert output["sem_seg"].shape == (4, 90, 67) and ids.shape == (90, 67)
    assert set(ids.unique().tolist()) - {0} == {segment["id"] for segment in segments}
    instances = output["instances"]
    assert instances.image_size == (90, 67) and instances.scores.isfinite().all()
    model.merging = replace(model.merging, max_dense_classes=3)
    labels = model(batch())[1]
    assert "sem_seg" not in labels
    assert (labels["sem_seg_labels"] == output["sem_seg"].argmax(0)).float().mean() > 0.999


@torch.no_grad()
def test_only_selected_outputs_are_computed(model: OVSeg) -> None:
    every = model(batch())[1]
    for kind, key in (("semantic", "sem_seg"), ("panoptic", "panoptic_seg"), ("instances", "instances")):
        model.select_outputs([kind])
        (output,) = {frozenset(output) for output in model(batch())}
        assert output == {key}
    model.select_outputs(["semantic"])
    assert torch.equal(model(batch())[1]["sem_seg"], every["sem_seg"])


@torch.no_grad()
@pytest.mark.parametrize("padded_logits", [False, True])
def test_masks_of_large_images_are_cropped_a_few_at_a_time(
    model: OVSeg, padded_logits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One mask at a time, and bands of one row: the same segmentation."""
    threshold = 0.0 if padded_logits else 0.4
    model.encoder.rule = replace(model.encoder.rule, threshold=threshold, padded_logits=padded_logits)
    whole = model(batch())
    monkeypatch.setattr("clipdense.regions.lazy_maps.WHOLE", 1)
    monkeypatch.setattr("clipdense.regions.lazy_maps.BAND", 1)
    monkeypatch.setattr("clipdense.regions.encoder._PART", 1)
    for ours, theirs in zip(model(batch()), whole, strict=True):
        torch.testing.assert_close(ours["sem_seg"], theirs["sem_seg"], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_only_the_best_mask_of_each_class(model: OVSeg) -> None:
    """Where no class has its best mask, there is nothing."""
    model.merging = replace(model.merging, proposals_on=True, best_masks=True)
    model.set_vocabulary(Vocabulary.from_names(CLASSES[:1]))
    output = model(batch())[0]
    binary = (output["proposal_masks"] > model.encoder.rule.threshold).float()
    maps = torch.nn.functional.interpolate(binary[None], (74, 91), mode="bilinear", align_corners=False)[0]
    ratio = [(output["sem_seg"][0] - output["sem_seg"].amax() * one).abs().max() for one in maps]
    assert min(ratio) < 1e-6 and output["sem_seg"].amax() > 0


def test_evaluation_needs_a_vocabulary(model: OVSeg) -> None:
    model.init_vocabulary(None)
    with pytest.raises(ValueError, match="set_vocabulary"), torch.no_grad():
        model(batch())


def test_checkpoints_know_what_they_were_trained_on(model: OVSeg, tmp_path: Path) -> None:
    """Base is what the weights have seen, also where the run's data are others; older files do not say."""
    TrainingCheckpointer(model, str(tmp_path)).save("trained")
    path = tmp_path / "trained.pth"
    other = "two_stage_other"
    MetadataCatalog.get(other).set(stuff_classes=["cat", "red star", "dog", "fox"])
    cfg = small_config()
    cfg.DATASETS.TRAIN = (other,)
    try:
        loaded = build_model(cfg)
    finally:
        MetadataCatalog.remove(other)
    TrainingCheckpointer(loaded).load_weights(str(path), complete=True)
    assert loaded.training_vocabulary.names == tuple(CLASSES)
    loaded.set_vocabulary(Vocabulary.from_names(["cat", "blue star"]))
    assert loaded.vocabulary.base == (False, True)
    loaded.start_training()
    assert loaded.training_vocabulary.names[0] == "cat"
    torch.save({"model": model.state_dict()}, path)  # without metadata
    TrainingCheckpointer(loaded).load_weights(str(path), complete=True)
    assert loaded.training_vocabulary.names[0] == "cat"


@torch.no_grad()
def test_an_adapted_clip_is_kept_on_load(model: OVSeg, tmp_path: Path) -> None:
    """Its image tower and prompts stay when weights are loaded; the rest is that of the weights."""
    MetadataCatalog.get(NAME).set(stuff_classes=CLASSES)
    adapted = MaskAdaptedCLIP(
        encoder=RegionEncoder(load_clip("shapes-vit"), mask_prompts=MaskPrompts(1, 64, 128))
    )
    for parameter in adapted.encoder.clip.visual.parameters():
        parameter.add_(0.01)
    save_checkpoint(tmp_path / "adapted.safetensors", *adapted.export_state())
    torch.save({"model": model.state_dict()}, tmp_path / "model.pth")

    cfg = small_config()
    cfg.MODEL.TWO_STAGE.ADAPTED_CLIP = str(tmp_path / "adapted.safetensors")
    built = build_model(cfg)
    MetadataCatalog.remove(NAME)
    TrainingCheckpointer(built).load_weights(str(tmp_path / "model.pth"), complete=True)
    state, published, own = built.state_dict(), model.state_dict(), adapted.encoder.state_dict()
    for key, value in state.items():
        part = key.removeprefix("encoder.")
        replaced = key.startswith("encoder.") and not part.startswith("clip.text.")
        torch.testing.assert_close(value, own[part] if replaced else published[key])
    assert len(state["encoder.mask_prompts.prompts"]) == 1
    assert not torch.equal(state["encoder.clip.visual.proj"], published["encoder.clip.visual.proj"])


@pytest.mark.parametrize(
    ("old", "value", "new"),
    [("CLIP", ["shapes-vit", ""], "CROP_CLIP.NAME"), ("SCORES.PRUNE", 0.1, "SCORES.MIN_QUERY_SCORE")],
)
def test_renamed_keys_are_refused_with_the_new_name(old: str, value: Any, new: str) -> None:
    with pytest.raises(KeyError, match=new):
        small_config().merge_from_list([f"MODEL.TWO_STAGE.{old}", value])


class UpperHalf:
    """A source of masks: the upper half of each image, and an empty mask."""

    def propose_masks(self, sample: dict[str, Any]) -> torch.Tensor:
        masks = torch.zeros(2, sample["height"], sample["width"], dtype=torch.bool)
        masks[0, : sample["height"] // 2] = True
        return masks


@torch.no_grad()
def test_masks_from_elsewhere_are_classified_by_their_crops(model: OVSeg) -> None:
    model.mask_source = UpperHalf()
    try:
        proposals = model.propose(batch())
        scores = model.classify(proposals, batch())
        output = model(batch())[1]
    finally:
        model.mask_source = None
    for classes in scores:
        torch.testing.assert_close(classes[0].sum(), torch.tensor(1.0))
        assert classes[0, -1] == 0 and classes[1].tolist() == [0.0] * len(CLASSES) + [1.0]
    height = batch()[1]["height"]
    assert (output["sem_seg"][:, : height // 2 - 1].sum(0) > 0.9).all()
    assert (output["sem_seg"][:, height // 2 + 2 :].sum(0) < 0.1).all()
