"""F-VLM: training on base classes, evaluation with any vocabulary, checkpoints between vocabularies."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from clipdense.checkpoint import CheckpointError
from clipdense.clip.vocabulary import Vocabulary
from clipdense.data.mappers import build_augmentations
from clipdense.engine.build import build_model
from clipdense.engine.checkpoint import TrainingCheckpointer
from clipdense.engine.options import ConfigError
from clipdense.open_vocabulary import training_vocabulary
from clipdense.run.setup import load_config
from clipdense.systems.fvlm import FVLM, open_vocabulary_loss

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data import transforms as T
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

ROOT = Path(__file__).parents[2]
CLASSES, NOVEL = ["red star", "blue star", "green ring", "red ring"], ["green ring"]


@pytest.fixture
def dataset() -> str:
    name = "fvlm_test"
    DatasetCatalog.register(name, list)
    MetadataCatalog.get(name).set(thing_classes=CLASSES, novel_classes=NOVEL)
    yield name
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


@pytest.fixture
def config(dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The config of a nano tower with small heads: ``config("vit", KEY, VALUE, ...)``."""
    monkeypatch.setenv("CLIPDENSE_CACHE", str(tmp_path / "cache"))

    def load(tower: str = "vit", *overrides: object) -> CfgNode:
        keys = ["DATASETS.TRAIN", [dataset], "DATASETS.TEST", [], "MODEL.FPN.OUT_CHANNELS", 16]
        keys += ["MODEL.ROI_BOX_HEAD.FC_DIM", 32, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0]
        keys += ["TEST.DETECTIONS_PER_IMAGE", 5]
        return load_config(
            str(ROOT / f"configs/shapes/fvlm_{tower}.yaml"), [str(x) for x in [*keys, *overrides]]
        )

    return load


def batch(training: bool = True) -> list[dict[str, object]]:
    torch.manual_seed(0)
    samples: list[dict[str, object]] = []
    for height, width in ((96, 128), (104, 80)):
        image = torch.randint(0, 255, (3, height, width), dtype=torch.uint8)
        samples.append({"image": image, "height": height, "width": width})
        if training:
            instances = Instances((height, width))
            instances.gt_boxes = Boxes(torch.tensor([[10.0, 10, 60, 60], [30, 20, 75, 80]]))
            instances.gt_classes = torch.tensor([0, 2])
            samples[-1]["instances"] = instances
    return samples


def losses_of(model: FVLM, samples: list[dict[str, object]]) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)  # of the sampled anchors and proposals
    with EventStorage():
        return model.train()(samples)


@torch.no_grad()
def detect(model: FVLM) -> list[Instances]:
    return [x["instances"] for x in model.eval()(batch(training=False))]


# the loss


def test_novel_classes_do_not_compete() -> None:
    logits = torch.randn(6, 4, requires_grad=True)
    labels = torch.tensor([0, 1, 3, 3, 0, 2])
    weight = torch.tensor([1.0, 1.0, 0.0, 0.5])  # class 2 is novel, the last is the background
    loss = open_vocabulary_loss(logits, labels, weight)
    known = logits[:, [0, 1, 3]].log_softmax(1)
    rows = [known[0, 0], known[1, 1], 0.5 * known[2, 2], 0.5 * known[3, 2], known[4, 0]]
    torch.testing.assert_close(loss, -torch.stack(rows).sum() / 6)  # over all regions
    loss.backward()
    assert logits.grad.isfinite().all() and (logits.grad[:, 2] == 0).all() and (logits.grad[5] == 0).all()
    assert open_vocabulary_loss(logits[:0], labels[:0], weight) == 0


# training


@pytest.mark.parametrize("tower", ["rn", "vit", "eva"])
def test_heads_train_and_clip_does_not(config, tower: str) -> None:
    model = build_model(config(tower))
    assert model.training_vocabulary.names == tuple(CLASSES)
    assert model.training_vocabulary.base == (True, True, False, True)
    losses = losses_of(model, batch())
    sum(losses.values()).backward()
    trained = {n for n, p in model.named_parameters() if p.grad is not None}
    assert trained == {n for n, p in model.named_parameters() if p.requires_grad}
    assert not any("trunk.tower" in n or "bottom_up.tower" in n for n in trained)
    assert "roi_heads.box_predictor.cls_score.log_scale" in trained
    first, second = detect(model)
    assert len(first) == len(second) == 5 and first.pred_boxes.tensor[:, 2].max() <= 128
    assert first.scores.diff().max() <= 0 and first.pred_classes.max() < 4


def test_objects_of_novel_classes_are_removed_from_the_labels(config) -> None:
    model = build_model(config())
    labelled, without = batch(), batch()
    for sample in without:
        sample["instances"] = sample["instances"][:1]
    for a, b in zip(losses_of(model, labelled).values(), losses_of(model, without).values(), strict=True):
        assert torch.equal(a, b)
    for sample in without:
        sample["instances"] = sample["instances"][:0]  # images without any object train, too
    assert sum(losses_of(model, without).values()).isfinite()


def test_training_does_not_depend_on_the_evaluation_vocabulary(config) -> None:
    model = build_model(config())
    before = losses_of(model, batch())
    model.set_vocabulary(Vocabulary.parse("cat, dog, red star, tree, house, street"))
    assert detect(model)[0].pred_classes.max() < 6
    after = losses_of(model, batch())
    assert all(torch.equal(before[k], after[k]) for k in before)


# vocabularies


def test_a_class_is_base_if_it_shares_a_name_with_a_base_class_of_training(config) -> None:
    model = build_model(config())
    assert model.evaluation_classes()[1].tolist() == [True, True, False, True]
    model.set_vocabulary(Vocabulary.parse("green ring, crimson star|Red_Star, banana"))
    text, base = model.evaluation_classes()
    assert text.shape == (3, 128) and base.tolist() == [False, True, False]
    assert model.vocabulary.names == ("green ring", "crimson star", "banana")
    alone = Vocabulary.parse("banana")
    model.set_vocabulary(alone)
    torch.testing.assert_close(model.evaluation_classes()[0], text[2:])
    unknown = build_model(config("vit", "DATASETS.TRAIN", []))  # neither data nor weights name its classes
    unknown.set_vocabulary(alone)
    assert unknown.training_vocabulary is None and unknown.evaluation_classes()[1] is None  # fused as novel
    assert (detect(unknown)[0].pred_classes == 0).all()


def test_logits_of_a_class_do_not_depend_on_the_other_classes(config) -> None:
    """Only the softmax couples the classes of a vocabulary."""
    model = build_model(config()).eval()
    heads, x = model.roi_heads, torch.randn(7, 32)
    model.set_vocabulary(Vocabulary.parse("red star, cat"))
    two = heads.box_predictor(x, model.evaluation_classes()[0])[0]
    model.set_vocabulary(Vocabulary.parse("dog, cat, house, red star"))
    four = heads.box_predictor(x, model.evaluation_classes()[0])[0]
    torch.testing.assert_close(two, four[:, [3, 1, 4]])


def test_with_all_weight_on_clip_its_embedding_decides(config) -> None:
    """With all weight on CLIP, the class of a region is that of its CLIP embedding."""
    keys = ["MODEL.FVLM.FUSION", "fvit", "MODEL.FVLM.ALPHA", 1.0, "MODEL.FVLM.BETA", 1.0]
    model = build_model(config("vit", *keys, "MODEL.FVLM.CLIP_SCALE", 50.0))
    text, base = model.evaluation_classes()
    predictor = model.roi_heads.box_predictor
    q = predictor.clip_probabilities(3 * text + 0.01, text)
    scores = predictor.fuse(torch.randn(4, 5).softmax(1), q, base)
    assert scores[:, :-1].argmax(1).tolist() == [0, 1, 2, 3]
    rows = torch.cat([text, predictor.cls_score.background])
    expected = (50 * F.normalize(3 * text + 0.01, dim=1) @ rows.T).softmax(1)
    torch.testing.assert_close(scores, expected)


def test_clip_has_no_score_for_a_learned_background(config) -> None:
    model = build_model(config("rn", "MODEL.FVLM.BACKGROUND", "learned"))
    sum(losses_of(model, batch()).values()).backward()
    predictor = model.roi_heads.box_predictor
    assert predictor.cls_score.background.grad.abs().sum() > 0
    clip = predictor.clip_probabilities(torch.randn(3, 128), model.evaluation_classes()[0])
    assert (clip[:, -1] == 0).all()
    torch.testing.assert_close(clip.sum(1), torch.ones(3))
    assert len(detect(model)[0]) == 5
    with pytest.raises(ValueError, match=r"FVLM\.BACKGROUND is 'none'; expected one of text, learned"):
        build_model(config("rn", "MODEL.FVLM.BACKGROUND", "none"))


def table(path: Path | str) -> list[object]:
    return ["MODEL.FVLM.TEXT_SOURCE", "table", "MODEL.FVLM.TEXT_TABLE", path]


def test_text_embeddings_from_a_table(config, tmp_path: Path) -> None:
    rows = torch.randn(6, 128, generator=torch.Generator().manual_seed(0))
    names = [*CLASSES, "background", "banana"]
    torch.save({"embeddings": rows, "index": {"classes": names}}, tmp_path / "table.pt")
    model = build_model(config("vit", *table(tmp_path / "table.pt")))
    torch.testing.assert_close(model.evaluation_classes()[0], F.normalize(rows[:4], dim=1))
    model.set_vocabulary(Vocabulary.parse("banana"))
    torch.testing.assert_close(model.evaluation_classes()[0], F.normalize(rows[5:], dim=1))
    with pytest.raises(ValueError, match="'bananas'"):
        model.set_vocabulary(Vocabulary.parse("bananas"))
    assert model.vocabulary.names == ("banana",)
    with pytest.raises(FileNotFoundError, match=r"no\.pt"):
        build_model(config("vit", *table("no.pt")))

    torch.save(
        {
            "embeddings": rows,
            "index": {
                "classes": [*names[:4], "banana", "banana"],
                "synonyms": [*names[:4], "plantain", "banana"],
            },
        },
        tmp_path / "two.pt",
    )
    for synonyms, expected in (
        ("first", rows[5:]),
        ("mean", F.normalize(rows[4:], dim=1).mean(0, keepdim=True)),
    ):
        keys = [*table(tmp_path / "two.pt"), "MODEL.FVLM.SYNONYMS", synonyms]
        model = build_model(config("vit", *keys, "MODEL.FVLM.BACKGROUND", "learned"))
        model.set_vocabulary(Vocabulary((("banana", "plantain"),)))
        torch.testing.assert_close(model.evaluation_classes()[0], F.normalize(expected, dim=1))


# checkpoints


def load_into(model: FVLM, path: Path) -> FVLM:
    TrainingCheckpointer(model).load_weights(str(path), complete=True)
    return model


def test_checkpoints_store_the_training_vocabulary(config, dataset: str, tmp_path: Path) -> None:
    trained = build_model(config())
    TrainingCheckpointer(trained, str(tmp_path)).save("trained")
    path = tmp_path / "trained.pth"
    expected = detect(trained)
    assert torch.equal(detect(load_into(build_model(config()), path))[0].scores, expected[0].scores)

    other = "fvlm_other"
    DatasetCatalog.register(other, list)
    MetadataCatalog.get(other).thing_classes = ["cat", "red star"]
    try:
        model = load_into(build_model(config("vit", "DATASETS.TRAIN", [other])), path)
        assert model.training_vocabulary.names == tuple(CLASSES)
        model.set_vocabulary(Vocabulary.parse("cat, red star"))
        assert model.evaluation_classes()[1].tolist() == [False, True]
        samples = batch()
        for sample in samples:
            sample["instances"].gt_classes = torch.tensor([0, 1])
        model.start_training()
        losses_of(model, samples)
        assert model.training_vocabulary.names == ("cat", "red star")
        assert training_vocabulary(model.checkpoint_metadata()) == model.training_vocabulary
    finally:
        DatasetCatalog.remove(other)
        MetadataCatalog.remove(other)


def test_the_weights_hold_the_embeddings_of_the_training_classes(config, tmp_path: Path) -> None:
    """Without a text tower, only the classes in the weights can be named."""
    trained = build_model(config())
    TrainingCheckpointer(trained, str(tmp_path)).save("trained")
    model = load_into(
        build_model(config("vit", "MODEL.FVLM.TEXT_SOURCE", "weights")), tmp_path / "trained.pth"
    )
    torch.testing.assert_close(detect(model)[0].scores, detect(trained)[0].scores, rtol=0, atol=1e-6)
    for detector in (model, trained):
        detector.set_vocabulary(Vocabulary.parse("red ring, blue star"))
    torch.testing.assert_close(detect(model)[0].scores, detect(trained)[0].scores)
    with pytest.raises(ValueError, match="no text embedding of 'cat'"):
        model.set_vocabulary(Vocabulary.parse("cat, red star"))
    with pytest.raises(CheckpointError, match="cls_score.background: not in the file"):
        state = trained.state_dict()
        del state["roi_heads.box_predictor.cls_score.background"]
        torch.save({"model": state}, tmp_path / "half.pth")
        load_into(model, tmp_path / "half.pth")


def test_a_random_text_tower_is_refused(config) -> None:
    keys = ["MODEL.CLIP.PRETRAINED", "random", "MODEL.WEIGHTS", "detector.safetensors"]
    with pytest.raises(ValueError, match="TEXT_ENCODER"):
        build_model(config("vit", *keys))
    model = build_model(config("vit", *keys, "MODEL.FVLM.TEXT_ENCODER.NAME", "shapes-vit"))
    assert torch.equal(model.evaluation_classes()[0], build_model(config()).evaluation_classes()[0])


# cost


def test_images_are_padded_to_squares(config) -> None:
    model = build_model(config("vit", "MODEL.FVLM.SQUARE_SIZE", 160))
    images = model.preprocess_image(batch(training=False))
    assert images.tensor.shape == (2, 3, 160, 160) and images.image_sizes == [(96, 128), (104, 80)]
    assert (images.tensor[0, :, 96:] == 0).all() and (images.tensor[0, :, :, 128:] == 0).all()
    model.square_size = 64  # never smaller than the image
    assert model.preprocess_image(batch(training=False)).tensor.shape == (2, 3, 128, 128)


def test_many_classes_add_little_cost(config) -> None:
    model = build_model(config("vit")).eval()
    flops = {}
    for count in (80, 1203):
        text = F.normalize(torch.randn(count, 128), dim=1)
        names = Vocabulary.from_names([f"class {i}" for i in range(count)])
        model.set_vocabulary(names, {"classes": text})
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(batch(training=False))
        flops[count] = counter.get_total_flops()
    assert flops[1203] < 1.15 * flops[80]  # of a nano tower on two small images


def test_masks_are_class_agnostic(config) -> None:
    keys = ["MODEL.MASK_ON", True]
    model = build_model(config("vit", *keys))
    assert detect(model)[0].pred_masks.shape == (5, 96, 128)
    with pytest.raises(ValueError, match="CLS_AGNOSTIC_MASK True"):
        build_model(config("vit", *keys, "MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK", False))


def test_other_backbones_and_classes_are_refused(config, dataset: str) -> None:
    for text in ("clip", "weights"):
        with pytest.raises(ValueError, match="frozen CLIP"):
            build_model(config("rn", "MODEL.TRUNK.NAME", "CLIPTrunk", "MODEL.FVLM.TEXT_SOURCE", text))
    with pytest.raises(ValueError, match="one class list"):
        build_model(config("rn", "DATASETS.TRAIN", [dataset, "shapes_closed_val"]))


def test_clip_scores_every_proposal_of_every_image(config, monkeypatch: pytest.MonkeyPatch) -> None:
    """CLIP pools exactly the proposals, in the order in which the detector scores them."""
    model = build_model(config("rn")).eval()
    proposals: list[Instances] = []
    model.proposal_generator.register_forward_hook(lambda module, args, out: proposals.extend(out[0]))
    scored: list[torch.Tensor] = []
    score = model.roi_heads.box_predictor.clip_probabilities

    def record(embeddings: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        scored.append(embeddings)
        return score(embeddings, text)

    monkeypatch.setattr(model.roi_heads.box_predictor, "clip_probabilities", record)
    detect(model)
    joint = model.trunk(model.preprocess_image(batch(training=False)).tensor)["joint"]
    boxes = [found.proposal_boxes.tensor for found in proposals]
    torch.testing.assert_close(scored[0], model.trunk.tower.embed_regions(joint, boxes=boxes))


def test_old_config_keys_are_refused_with_the_new_name(config) -> None:
    for old, new in (("TEXT", "TEXT_SOURCE"), ("TEXT_CLIP", "TEXT_ENCODER.NAME")):
        with pytest.raises(ConfigError, match=f"FVLM.{old} is now MODEL.FVLM.{new}"):
            config("rn", f"MODEL.FVLM.{old}", "weights")


# the recipe


def test_large_scale_jitter() -> None:
    cfg = load_config(str(ROOT / "projects/FVLM/configs/fvit_b16_ovcoco.yaml"))
    augmentations = T.AugmentationList(build_augmentations(cfg, True))
    np.random.seed(0)  # noqa: NPY002 (what Detectron2's augmentations draw from)
    sizes = []
    for _ in range(40):
        augmented = T.AugInput(np.zeros((120, 160, 3), np.uint8))
        augmentations(augmented)
        sizes.append(max(augmented.image.shape[:2]))
    assert max(sizes) == 640 and min(sizes) < 150  # from a tenth of 640 to a cut-out square of it
    assert [type(a).__name__ for a in build_augmentations(cfg, False)] == ["ResizeShortestEdge"]
