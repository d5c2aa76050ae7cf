"""RetinaNet's rules: each is what mmdetection does, and the defaults are Detectron2's."""

import math

import pytest
import torch
from torch import Tensor, nn

from clipdense.backbone.fpn import build_top_block
from clipdense.engine.options import ConfigError
from clipdense.run.setup import load_config
from clipdense.systems.denseclip.retinanet import (
    MMDetRetinaNet,
    OwnBoxMatcher,
    RetinaNetRules,
    TwoSidedBox2BoxTransform,
)

from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone, RetinaNet
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

CLASSES, STRIDE, SIZE = 3, 8, 32


class OneMap(Backbone):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, STRIDE, STRIDE)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"p3": self.conv(x)}

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {"p3": ShapeSpec(channels=4, stride=STRIDE)}


def model(kind: type[RetinaNet] = MMDetRetinaNet, **rules: object) -> RetinaNet:
    torch.manual_seed(0)
    head = RetinaNetHead(
        input_shape=[ShapeSpec(channels=4)], num_classes=CLASSES, num_anchors=1, conv_dims=[4], prior_prob=0.5
    )
    nn.init.normal_(head.cls_score.weight)
    return kind(
        **{
            "backbone": OneMap(),
            "head": head,
            "head_in_features": ["p3"],
            "anchor_generator": DefaultAnchorGenerator(
                sizes=[[16]], aspect_ratios=[[1.0]], strides=[STRIDE], offset=0.0
            ),
            "box2box_transform": Box2BoxTransform((1.0, 1.0, 1.0, 1.0)),
            "anchor_matcher": Matcher([0.4, 0.5], [0, -1, 1], allow_low_quality_matches=True),
            "num_classes": CLASSES,
            "pixel_mean": [0.0] * 3,
            "pixel_std": [1.0] * 3,
            "test_score_thresh": 0.3,
            **rules,
        }
    )


def batch(*boxes: list[list[float]]) -> list[dict[str, object]]:
    generator = torch.Generator().manual_seed(1)
    samples = []
    for of_image in boxes:
        instances = Instances((SIZE, SIZE))
        instances.gt_boxes = Boxes(torch.tensor(of_image).reshape(-1, 4))
        instances.gt_classes = torch.arange(len(of_image)) % CLASSES
        samples.append({"image": torch.rand(3, SIZE, SIZE, generator=generator), "instances": instances})
    return samples


BOXES = [[0.0, 0.0, 15.0, 17.0], [8.0, 8.0, 24.0, 24.0]]


def test_defaults_are_detectron2s() -> None:
    ours, theirs = model(), model(RetinaNet)
    for net in (ours, theirs):
        net.train()
    with EventStorage():
        for _ in range(2):  # the second time the average has moved
            assert ours(batch(BOXES, [])) == theirs(batch(BOXES, []))
    found = [net.eval()(batch(BOXES))[0]["instances"] for net in (ours, theirs)]
    assert len(found[0]) and torch.equal(found[0].pred_boxes.tensor, found[1].pred_boxes.tensor)
    assert torch.equal(found[0].scores, found[1].scores)


def test_losses_by_the_positives_of_the_batch() -> None:
    net, reference = model(rule_overrides={"loss_normalizer": "mmdetection"}).train(), model().train()
    samples = batch(BOXES, [])
    with EventStorage():
        first, second = net(samples), net(samples)
        averaged = reference(samples)
    torch.testing.assert_close(first, second)  # no memory of earlier batches
    anchors = net.anchor_generator([torch.zeros(1, 4, SIZE // STRIDE, SIZE // STRIDE)])
    labels, _ = net.label_anchors(anchors, [x["instances"] for x in samples])
    counts = [int(((x >= 0) & (x < CLASSES)).sum()) for x in labels]
    assert counts[0] > 1 and counts[1] == 0
    for name, loss in averaged.items():
        whole = loss * reference.loss_normalizer
        torch.testing.assert_close(first[name], whole / (counts[0] + 1))  # an empty image counts one


def test_best_anchors_of_a_box_are_its_own() -> None:
    # Boxes a, b, c and anchors 0..4. Anchor 0 is best for a and for b, but has more of a; anchor 1 is best
    # for c (a tie with anchor 2); anchor 3 is under every threshold.
    overlaps = torch.tensor(
        [[0.60, 0.45, 0.10, 0.20, 0.00], [0.30, 0.20, 0.00, 0.10, 0.30], [0.00, 0.15, 0.15, 0.10, 0.00]]
    )
    theirs = Matcher([0.4, 0.5], [0, -1, 1], allow_low_quality_matches=True)(overlaps)
    ours = OwnBoxMatcher(Matcher([0.4, 0.5], [0, -1, 1], allow_low_quality_matches=True))(overlaps)
    assert theirs[0][:3].tolist() == [0, 0, 2] and theirs[1].tolist() == [1, 1, 1, 0, 1]
    assert ours[0][[0, 1, 2, 4]].tolist() == [1, 2, 2, 1]  # of a and b, the later has anchor 0
    assert torch.equal(ours[1], theirs[1])


def test_matching_without_boxes() -> None:
    matcher = OwnBoxMatcher(Matcher([0.4, 0.5], [0, -1, 1], allow_low_quality_matches=True))
    matches, labels = matcher(torch.zeros(0, 5))
    assert matches.tolist() == [0] * 5 and labels.tolist() == [0] * 5


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0, 1.0), (10.0, 10.0, 5.0, 5.0)])
def test_deltas_are_clamped_on_both_sides(weights: tuple[float, ...]) -> None:
    theirs, ours = Box2BoxTransform(weights), TwoSidedBox2BoxTransform(weights)
    boxes = torch.tensor([[0.0, 0.0, 100.0, 50.0], [10.0, 10.0, 20.0, 40.0]])
    deltas = torch.randn(2, 8)  # two classes
    torch.testing.assert_close(ours.apply_deltas(deltas, boxes), theirs.apply_deltas(deltas, boxes))
    for sign in (-1, 1):
        extreme = torch.tensor([[0.0, 0.0, 9.0 * weights[2] * sign, 7.0 * weights[3] * sign]])
        x1, y1, x2, y2 = ours.apply_deltas(extreme, boxes[:1])[0].tolist()
        assert x2 - x1 == pytest.approx(100 * math.exp(sign * math.log(1000 / 16)), rel=1e-4)
        assert y2 - y1 == pytest.approx(50 * math.exp(sign * math.log(1000 / 16)), rel=1e-4)


def _candidates(net: RetinaNet, scores: Tensor, deltas: Tensor | None = None, topk: int = 2) -> Instances:
    anchors = Boxes(torch.tensor([[0.0, 0.0, 10.0, 10.0], [20.0, 20.0, 40.0, 40.0], [5.0, 5.0, 9.0, 9.0]]))
    deltas = torch.zeros(3, 4) if deltas is None else deltas
    return net._decode_per_level_predictions(anchors, scores, deltas, 0.05, topk, (32, 32))


def test_candidates_are_counted_by_anchor() -> None:
    scores = torch.tensor([[0.9, 0.8, 0.7], [0.1, 0.02, 0.3], [0.2, 0.01, 0.04]])
    pairs = _candidates(model(), scores)
    assert pairs.scores.tolist() == pytest.approx([0.9, 0.8])
    anchors = _candidates(model(rule_overrides={"test_candidates": "mmdetection"}), scores)
    assert sorted(anchors.scores.tolist()) == pytest.approx([0.1, 0.3, 0.7, 0.8, 0.9])  # of two anchors
    few = _candidates(model(rule_overrides={"test_candidates": "mmdetection"}), scores, topk=100)
    assert len(few) == 6  # all above the threshold


def test_candidates_are_cut_at_the_border() -> None:
    scores = torch.tensor([[0.9, 0.0, 0.0], [0.8, 0.0, 0.0], [0.0, 0.0, 0.0]])
    assert _candidates(model(), scores).pred_boxes.tensor[1].tolist() == [20, 20, 40, 40]
    cut = _candidates(model(rule_overrides={"clip_before_nms": "mmdetection"}), scores)
    assert cut.pred_boxes.tensor[1].tolist() == [20, 20, 32, 32]


def test_one_name_sets_every_rule() -> None:
    net = model(rules="mmdetection")
    assert net.rules == RetinaNetRules.build("mmdetection")
    assert isinstance(net.anchor_matcher, OwnBoxMatcher)
    assert isinstance(net.box2box_transform, TwoSidedBox2BoxTransform)


def test_a_single_rule_overrides_the_name() -> None:
    overrides = {"delta_clamp": "detectron2", "loss_normalizer": ""}
    net = model(rules="mmdetection", rule_overrides=overrides)
    assert not isinstance(net.box2box_transform, TwoSidedBox2BoxTransform)
    assert net.rules.loss_normalizer == "mmdetection"


def test_unknown_rules_are_errors() -> None:
    with pytest.raises(
        ValueError, match="MODEL.RETINANET.RULES must be detectron2 or mmdetection, not 'best'"
    ):
        model(rules="best")
    with pytest.raises(ValueError, match="RULE_OVERRIDES.TEST_CANDIDATES must be.*not 'best'"):
        model(rule_overrides={"test_candidates": "best"})
    with pytest.raises(ValueError, match="RULE_OVERRIDES has no .'anchors'.*clip_before_nms"):
        model(rule_overrides={"anchors": "mmdetection"})


def test_old_keys_are_refused_with_their_new_name() -> None:
    with pytest.raises(ConfigError, match="MODEL.RETINANET.RULE_OVERRIDES.DELTA_CLAMP"):
        load_config("configs/shapes/retinanet_clip_rn.yaml", ["MODEL.RETINANET.DELTA_CLAMP", "both"])


def test_top_block_without_relu() -> None:
    torch.manual_seed(0)
    plain, rectified = (build_top_block(f"LastLevelP6P7{x}", "res5", 4, 4) for x in ("NoReLU", ""))
    assert plain is not None and rectified is not None
    rectified.load_state_dict(plain.state_dict())
    c5 = torch.randn(1, 4, 5, 7)
    with torch.no_grad():
        p6, p7 = plain(c5)
        assert torch.equal(p7, plain.p7(p6))
        assert torch.equal(p6, rectified(c5)[0]) and not torch.allclose(p7, rectified(c5)[1])
    with pytest.raises(ValueError, match="LastLevelP6P7NoReLU or empty, not 'P6'"):
        build_top_block("P6", "res5", 4, 4)
