"""MaskCLIP+: the rules of its labels, teacher and self-training, text heads, export, and what is refused."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipdense.clip import TowerRequest, load_clip
from clipdense.engine.build import build_model
from clipdense.inference import Refinements, text_cosines
from clipdense.run.setup import load_config
from clipdense.systems.maskclip_plus import (
    UNLABELLED,
    DeepLabV2TextHead,
    LabelRules,
    MaskCLIPPlus,
    TextClassifier,
    fill_labels,
    hardest_pixels,
    pseudo_labels,
    suppress_labels,
)
from clipdense.systems.maskclip_plus.heads import HardPixels
from clipdense.systems.maskclip_plus.labels import labelled_cross_entropy

from detectron2.layers import ShapeSpec
from detectron2.utils.events import EventStorage

CONFIG = "configs/shapes/maskclip_plus_rn.yaml"
ZERO_SHOT = "configs/shapes/maskclip_plus_zero_shot_rn.yaml"
CLASSES = ("red star", "blue disc", "grass")


class Recorder(nn.Module):
    """A segmentor that keeps the labels it is trained on and predicts a constant class in evaluation."""

    def __init__(self, scores: Tensor | None = None, key: str = "sem_seg") -> None:
        super().__init__()
        self.batches: list[list[Tensor]] = []
        self.modes: list[bool] = []
        self.scores, self.key = scores, key

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        self.modes.append(self.training)
        if self.training:
            self.batches.append([x["sem_seg"] for x in batched_inputs])
            return {"loss_sem_seg": torch.zeros(())}
        assert self.scores is not None
        return [
            {self.key: self.scores[:, None, None].expand(-1, x["height"], x["width"])} for x in batched_inputs
        ]


@pytest.fixture(scope="module")
def clip() -> Any:
    return load_clip("shapes-rn")


@pytest.fixture(autouse=True)
def cache(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIPDENSE_CACHE", str(tmp_path / "cache"))


def sample(size: tuple[int, int] = (64, 96), labels: Tensor | None = None, seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    x = {"image": torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator)}
    return x if labels is None else x | {"sem_seg": labels}


def model(clip: Any, segmentor: nn.Module | None = None, **rules: Any) -> MaskCLIPPlus:
    return MaskCLIPPlus(
        segmentor=segmentor or Recorder(),
        clip=clip,
        classes=CLASSES,
        rules=LabelRules(**rules),
        templates="single",
    )


def scored(plus: MaskCLIPPlus, batch: list[dict[str, Any]]) -> Tensor:
    return plus.teacher_scores(plus.teacher_maps(batch))[0]


def trained_labels(plus: MaskCLIPPlus, batch: list[dict[str, Any]], iteration: int = 0) -> list[Tensor]:
    with EventStorage(iteration):
        plus(batch)
    recorder: Any = plus.segmentor
    labels: list[Tensor] = recorder.batches[-1]
    return labels


def test_rules_by_hand() -> None:
    labels = torch.tensor([[0, 1, 2], [2, 255, 1]])
    hidden = suppress_labels(labels, (1, 2))
    assert hidden.tolist() == [[0, -1, -1], [-1, 255, -1]]
    scores = torch.tensor([[[0.1, 0.9, 0.2], [0.3, 0.9, 0.1]], [[0.2, 0.1, 0.1], [0.1, 0.1, 0.15]]])
    found = pseudo_labels(scores, (1, 2), min_score=0.2)
    assert found.tolist() == [[2, 1, 1], [1, 1, UNLABELLED]]
    assert pseudo_labels(scores, (1, 2))[1, 2] == 2
    assert fill_labels(hidden, found, 255).tolist() == [[0, 1, 1], [1, 255, 255]]


def test_hard_pixels_by_hand() -> None:
    """Below the threshold, or among the hardest; ignored pixels never."""
    probability = torch.tensor([0.1, 0.3, 0.5, 0.8, 0.9, 0.2])
    logits = torch.stack([probability.logit(), torch.zeros(6)])[None, :, None]
    targets = torch.tensor([[[0, 0, 0, 0, 0, 255]]])
    kept = {
        (threshold, count): hardest_pixels(logits, targets, threshold=threshold, min_kept=count)[
            0, 0
        ].tolist()
        for threshold, count in ((0.4, 1), (0.4, 3), (0.4, 100), (0.95, 1))
    }
    assert kept[0.4, 1] == [True, True, False, False, False, False]
    assert kept[0.4, 3] == [True, True, True, False, False, False]  # fewer than 3 are below 0.4
    assert kept[0.4, 100] == [True, True, True, True, False, False]
    assert kept[0.95, 1] == [True] * 5 + [False]
    mask = torch.tensor([[kept[0.4, 1]]])
    expected = F.cross_entropy(logits[..., :2], targets[..., :2])
    torch.testing.assert_close(labelled_cross_entropy(logits, targets, mask), expected)
    nothing = labelled_cross_entropy(logits, torch.full_like(targets, 255), torch.zeros_like(mask))
    assert nothing == 0
    ignored = torch.full_like(targets, 255)
    assert not hardest_pixels(logits, ignored, threshold=0.4, min_kept=3).any()


def test_without_annotations_labels_are_those_of_maskclip(clip: Any) -> None:
    """Label maps have no influence, unless their ignored pixels are to stay ignored."""
    maps = [torch.full((64, 96), 1), torch.full((64, 96), 2)]
    maps[0][:10] = 255
    plus = model(clip)
    free, other = (trained_labels(plus, [sample(labels=m)])[0] for m in maps)
    none = trained_labels(plus, [sample()])[0]
    assert torch.equal(free, none) and torch.equal(other, none)
    pixels = clip.normalize(sample()["image"][None])
    dense = clip.visual(pixels, TowerRequest(dense="value")).dense
    cosines = text_cosines(dense, plus.bank(plus.vocabulary))
    cosines = F.interpolate(cosines, (64, 96), mode="bilinear", align_corners=False)
    assert torch.equal(none, cosines[0].argmax(0))
    kept = trained_labels(model(clip, keep_ignored=True), [sample(labels=maps[0])])[0]
    assert (kept[:10] == 255).all() and torch.equal(kept[10:], none[10:])


def test_seen_labels_are_kept_and_unseen_pixels_get_unseen_classes(clip: Any) -> None:
    labels = torch.zeros(64, 96, dtype=torch.int64)
    labels[:, 30:60], labels[:, 60:90], labels[:, 90:] = 1, 2, 255
    found = trained_labels(model(clip, setting="zero_shot", unseen=(0, 2)), [sample(labels=labels)])[0]
    assert (found[:, 30:60] == 1).all() and (found[:, 90:] == 255).all()
    hidden = torch.cat([found[:, :30], found[:, 60:90]], 1)
    assert set(hidden.unique().tolist()) <= {0, 2}
    # the hidden labels have no influence on what replaces them
    swapped = labels.clone()
    swapped[labels == 0], swapped[labels == 2] = 2, 0
    again = trained_labels(model(clip, setting="zero_shot", unseen=(0, 2)), [sample(labels=swapped)])[0]
    assert torch.equal(found, again)


def test_self_training_takes_over_at_its_iteration(clip: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Own predictions among the unseen classes only; the segmentor predicts in evaluation mode."""
    segmentor = Recorder(torch.tensor([0.2, 0.9, 0.5]))
    rules = {"setting": "zero_shot", "unseen": (0, 2), "self_training_from": 40}
    plus = model(clip, segmentor, **rules)
    teacher: list[int] = []
    maps = MaskCLIPPlus.teacher_maps

    def counted(self: MaskCLIPPlus, batch: Any) -> Any:
        teacher.append(1)
        return maps(self, batch)

    monkeypatch.setattr(MaskCLIPPlus, "teacher_maps", counted)
    batch = [sample(labels=torch.zeros(64, 96, dtype=torch.int64))]
    trained_labels(plus, batch, iteration=38)  # the 39th
    assert len(teacher) == 1 and segmentor.modes == [True]
    labels = trained_labels(plus, batch, iteration=39)[0]
    assert len(teacher) == 1 and segmentor.modes == [True, False, True] and plus.segmentor.training
    assert (labels == 2).all()
    low = trained_labels(model(clip, segmentor, min_score=0.6, **rules), batch, iteration=39)[0]
    assert (low == 255).all()
    only_labels = model(clip, Recorder(torch.ones(3), key="sem_seg_labels"), **rules)
    with pytest.raises(ValueError, match=r"TEST\.MAX_DENSE_CLASSES and"):
        trained_labels(only_labels, batch, iteration=39)


def test_images_of_any_size(clip: Any) -> None:
    """An image has the same labels alone and beside others; leftover pixels of a patch are labelled."""
    plus = model(clip)
    sizes = [(70, 101), (64, 96)]
    together = trained_labels(plus, [sample(size) for size in sizes])
    for size, labels in zip(sizes, together, strict=True):
        assert labels.shape == size
        assert torch.equal(labels, trained_labels(plus, [sample(size)])[0])
    stacked = trained_labels(plus, [sample(seed=1), sample(seed=2)])
    assert (stacked[1] == trained_labels(plus, [sample(seed=2)])[0]).float().mean() > 0.99


def test_refinements_and_channel_order_reach_the_teacher(clip: Any) -> None:
    batch = [sample()]
    plain = scored(model(clip), batch)
    arguments = {"segmentor": Recorder(), "clip": clip, "classes": CLASSES, "templates": "single"}
    smoothed = MaskCLIPPlus(**arguments, refinements=Refinements(key_smoothing=1.0))
    assert not torch.allclose(scored(smoothed, batch), plain)
    swapped = [{"image": batch[0]["image"].flip(0)}]
    bgr = scored(MaskCLIPPlus(**arguments, input_format="BGR"), swapped)
    torch.testing.assert_close(bgr, plain)
    vit = load_clip("shapes-vit")
    both = Refinements(prompt_denoising=0.5, key_smoothing=1.0)
    scores = scored(MaskCLIPPlus(**arguments | {"clip": vit}, refinements=both), batch)
    assert scores.shape == (3, 64, 96) and scores.isfinite().all()


def test_the_teacher_is_frozen(clip: Any) -> None:
    plus = model(clip).train()
    assert not plus.clip.training and plus.segmentor.training
    assert not [p for p in plus.parameters() if p.requires_grad]


def test_text_classifier() -> None:
    """Features are not normalised; text is constant; a learned background is normalised."""
    text = F.normalize(torch.randn(3, 5), dim=1)
    features = torch.randn(2, 5, 4, 6)
    logits = TextClassifier(text)(features)
    torch.testing.assert_close(logits, torch.einsum("bdhw,kd->bkhw", features, text))
    torch.testing.assert_close(TextClassifier(text)(2 * features), 2 * logits)
    assert not list(TextClassifier(text).parameters())
    learned = TextClassifier(text, 1)
    assert learned.background is not None
    found = learned(features)
    torch.testing.assert_close(found[:, 0], logits[:, 0])
    row = F.normalize(learned.background.detach(), dim=0)
    torch.testing.assert_close(found[:, 1].detach(), torch.einsum("bdhw,d->bhw", features, row))
    found.sum().backward()
    assert learned.background.grad is not None


def test_deeplab_v2_sums_its_branches() -> None:
    text = F.normalize(torch.randn(3, 8), dim=1)
    shapes = {"res3": ShapeSpec(channels=6, stride=8), "res5": ShapeSpec(channels=4, stride=32)}
    head = DeepLabV2TextHead(
        shapes, classifier=TextClassifier(text), dilations=(1, 2), hard_pixels=HardPixels(0.7, 2)
    )
    maps = {"res3": torch.randn(2, 6, 8, 8), "res5": torch.randn(2, 4, 5, 7)}
    head.eval()
    summed = sum(branch(maps["res5"]) for branch in head.branches)
    torch.testing.assert_close(head.layers(maps), head.classifier(summed))
    assert head(maps)[0].shape == (2, 3, 5, 7)
    _, losses = head.train()(maps, torch.randint(0, 3, (2, 40, 56)))
    losses["loss_sem_seg"].backward()
    assert all(branch.weight.grad is not None for branch in head.branches)


def test_config_trains_any_segmentor_and_exports_it() -> None:
    head = ["MODEL.SEM_SEG_HEAD.NAME", "SemanticFPNHead", "MODEL.SEM_SEG_HEAD.IN_FEATURES", "['res3']"]
    cfg = load_config(CONFIG, head)
    plus: Any = build_model(cfg)
    with EventStorage(0):
        losses = plus([sample()])
    losses["loss_sem_seg"].backward()
    assert plus.rules.setting == "annotation_free" and len(plus.vocabulary) == 88
    state, _ = plus.export_state()
    alone = build_model(load_config(CONFIG, [*head, "MODEL.META_ARCHITECTURE", "WindowedSemanticSegmentor"]))
    alone.load_state_dict(state)
    batch = [sample() | {"height": 64, "width": 96}]
    with torch.no_grad():
        torch.testing.assert_close(alone.eval()(batch)[0]["sem_seg"], plus.eval()(batch)[0]["sem_seg"])


def test_unseen_classes_come_from_config_or_metadata() -> None:
    listed = MaskCLIPPlus.from_config(load_config(ZERO_SHOT))["rules"].unseen
    dataset = ["DATASETS.TRAIN", "['shapes_ov_sem_seg_mini_val']", "MODEL.MASKCLIP_PLUS.UNSEEN", "[]"]
    from_metadata = MaskCLIPPlus.from_config(load_config(ZERO_SHOT, dataset))["rules"].unseen
    assert listed == from_metadata and len(listed) == 20


def test_errors_name_the_key(clip: Any) -> None:
    with pytest.raises(ValueError, match=r"no class is unseen: list them in MODEL\.MASKCLIP_PLUS\.UNSEEN"):
        LabelRules("zero_shot")
    with pytest.raises(KeyError, match="annotation_free needs none"):
        trained_labels(model(clip, setting="zero_shot", unseen=(0,)), [sample()])
    with pytest.raises(ValueError, match="unseen label 7, but there are 3 classes"):
        model(clip, setting="zero_shot", unseen=(7,))
    with pytest.raises(ValueError, match=r"MASKCLIP_PLUS\.UNSEEN: .*red stra.*did you mean 'red star'"):
        MaskCLIPPlus.from_config(load_config(ZERO_SHOT, ["MODEL.MASKCLIP_PLUS.UNSEEN", "['red stra']"]))
    with pytest.raises(ValueError, match="NUM_CLASSES is 80, but the datasets have 88 classes"):
        build_model(load_config(CONFIG, ["MODEL.SEM_SEG_HEAD.NUM_CLASSES", "80"]))
    with pytest.raises(ValueError, match="no class is called background"):
        build_model(load_config(CONFIG, ["MODEL.MASKCLIP_PLUS.BACKGROUND", "learned"]))
    with pytest.raises(ValueError, match=r"MODEL\.MASKCLIP_PLUS\.MODE 'sclip' does not fit 'shapes-rn'"):
        build_model(load_config(CONFIG, ["MODEL.MASKCLIP_PLUS.MODE", "sclip"]))
