"""DenseCLIP's detectors end to end: published file -> converter -> our model -> every recorded number."""

from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F

from clipdense.checkpoint import Checkpoint, config_options, convert_model, model_layout
from clipdense.run.config import add_clipdense_config
from clipdense.run.config_file import read_config_file
from clipdense.run.conversion import account_model
from clipdense.run.keys import config_keys, set_options
from clipdense.run.setup import load_config
from clipdense.run.weights import apply_weight_options
from clipdense.systems.denseclip.loss import box_targets
from tests.helpers.denseclip_golden import build_published, gradients, language_options, published

from detectron2.config import get_cfg
from detectron2.data import MetadataCatalog
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import EventStorage

RECIPES = Path(__file__).parents[2] / "projects/DenseCLIP/configs"


@pytest.fixture
def build(golden, tmp_path):
    """Convert the published file with changed options, build the model that the result names, load it."""

    def build(content=None, **changes):
        args = golden.args
        options = {
            **language_options(golden),
            "MODEL.RPN.POST_NMS_TOPK_TEST": args.get("rpn_max", 1000),
            "MODEL.ROI_HEADS.SCORE_THRESH_TEST": args["score_thr"],
            "MODEL.RETINANET.SCORE_THRESH_TEST": args["score_thr"],
            "TEST.DETECTIONS_PER_IMAGE": args["max_per_img"],
            **changes,
        }
        return build_published(content or published(golden), options, tmp_path)

    return build


def batch(golden):
    """The recorded images, with their boxes, as Detectron2's input."""
    inputs = golden.part("in")
    height, width = inputs["image"].shape[-2:]
    samples = []
    for i, image in enumerate(inputs["image"]):
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(inputs[f"gt_boxes.{i}"].reshape(-1, 4))
        instances.gt_classes = inputs[f"gt_labels.{i}"].reshape(-1).long()
        samples.append({"image": image, "instances": instances, "height": height, "width": width})
    return samples


def language_outputs(model, golden):
    """What both detectors share, by the names of the recorded outputs; and the pyramid's levels."""
    images, trunk = golden.part("in")["image"], model.backbone.bottom_up
    maps, g, z = trunk.trunk.forward_joint(images)
    text = trunk.text()[None]
    features = model.backbone(images)
    score = features.pop("score")
    targets, inside = box_targets(
        [x["instances"] for x in batch(golden)], score.shape[1], images.shape[-2:], images.device
    )
    results = {
        **{f"x{i}": level for i, level in enumerate(maps.values())},
        **{f"fpn.{i}": level for i, level in enumerate(features.values())},
        "global": g,
        "dense": z,
        "text": text,
        "text_refined": trunk.refine(text.expand(len(z), -1, -1), g, z),
        "score_map_stride32": score,
        "score_map_stride4": F.interpolate(score, maps["res2"].shape[-2:], mode="bilinear"),
        "aux_target": targets.float(),
        "aux_mask": inside.float(),
    }
    return results, list(features.values())


def losses_of(model, golden):
    """All losses, with running statistics and without dropout, as they were recorded."""
    for module in model.modules():
        module.training = module is model
    try:
        with EventStorage():
            return model(batch(golden))
    finally:
        model.eval()


def pop_outputs(golden, *prefixes):
    """Remove the outputs that are compared in another way from the file, and return them."""
    popped = {
        name: golden.tensors.pop(f"out/{name}") for name in golden.part("out") if name.startswith(prefixes)
    }
    assert popped
    return popped


def check_lists(golden, expected, found):
    """Every recorded (box, score[, label]) has its own counterpart; near-equal scores may trade places.

    mmdetection keeps boxes that are empty after clipping, Detectron2 drops them; the others are compared.
    If Detectron2 drops them before its limit of boxes, it may return as many more, with lower scores.
    """
    atol, rtol = golden.tolerance
    filled = Boxes(expected[0]).nonempty()
    columns = [x[filled].reshape(int(filled.sum()), -1).float() for x in expected]
    ours = [x.reshape(len(found[0]), -1).float() for x in found]
    more = len(ours[0]) - len(columns[0])
    allowed = int((~filled).sum())
    assert 0 <= more <= allowed, f"{golden.id}: {len(ours[0])} boxes, {len(columns[0])} recorded"
    a, b = torch.cat(ours, 1)[:, None], torch.cat(columns, 1)[None]
    fits = ((a - b).abs() <= atol + rtol * b.abs()).all(2)
    extra = ~fits.any(1)
    assert fits.any(0).all() and extra.sum() <= more, f"{golden.id}: boxes without a counterpart"
    assert not extra.any() or ours[1][extra].max() <= expected[1].min() + atol


def to_mmdet(x, axis, anchors=9):
    """Detectron2's (scale, ratio, ...) along an axis as mmdetection's (ratio, scale, ...)."""
    return x.unflatten(axis, (anchors // 3, 3, -1)).transpose(axis, axis + 1).flatten(axis, axis + 2)


def retinanet_outputs(model, golden):
    results, levels = language_outputs(model, golden)
    logits, deltas = model.head(levels)
    for i, anchors in enumerate(model.anchor_generator(levels)):
        results[f"anchors_mmdet_order.{i}"] = to_mmdet(anchors.tensor.view(-1, 9, 4), 1).reshape(-1, 4)
        results[f"cls_logits.{i}"], results[f"box_deltas.{i}"] = (
            to_mmdet(logits[i], 1),
            to_mmdet(deltas[i], 1),
        )
    return results


def mask_rcnn_outputs(model, golden):
    results, levels = language_outputs(model, golden)
    rpn, heads = model.proposal_generator, model.roi_heads
    logits, deltas = rpn.rpn_head(levels)
    for i, anchors in enumerate(rpn.anchor_generator(levels)):
        results[f"rpn_anchors.{i}"] = anchors.tensor
        results[f"rpn_logits.{i}"], results[f"rpn_deltas.{i}"] = logits[i], deltas[i]
    rois = golden.part("in")["rois"]
    order = rois[:, 0].argsort(stable=True)
    boxes = [Boxes(rois[rois[:, 0] == i, 1:]) for i in range(len(levels[0]))]
    pooled = heads.box_pooler(levels[:4], boxes)
    scores, box_deltas = heads.box_predictor(heads.box_head(pooled))
    masks = heads.mask_head.layers(heads.mask_pooler(levels[:4], boxes))
    back = order.argsort()
    results |= {"roi_feats": pooled[back], "roi_cls_logits": scores[back]}
    return results | {"roi_box_deltas": box_deltas[back], "mask_logits": masks[back]}


def is_retinanet(golden):
    return golden.args["detector"] == "retinanet"


@pytest.mark.golden(case="detector")
def test_every_output(golden, build):
    model = build()
    expected = pop_outputs(golden, "detections.", "proposals.", "loss_cls_per", "loss_bbox_per")
    with torch.no_grad():
        results = (retinanet_outputs if is_retinanet(golden) else mask_rcnn_outputs)(model, golden)
        detections = [x["instances"] for x in model(batch(golden))]
    losses = losses_of(model, golden)
    if is_retinanet(golden):
        results["loss_seg"], results["total_loss"] = losses["loss_pixel_text"], sum(losses.values())
        results |= gradients(model, golden, results["total_loss"])
        for ours, theirs in (("loss_cls", "loss_cls_per_level"), ("loss_box_reg", "loss_bbox_per_level")):
            recorded = sum(value for name, value in expected.items() if name.startswith(theirs))
            torch.testing.assert_close(
                losses[ours], recorded, atol=golden.tolerance[0], rtol=golden.tolerance[1]
            )
    else:
        results["loss_aux_seg"] = losses["loss_pixel_text"]
        results |= gradients(model, golden, losses["loss_pixel_text"])
    golden.check({name: value.detach() for name, value in results.items()})
    for i, found in enumerate(detections):
        boxes, scores, labels = (expected[f"detections.{i}.{part}"] for part in ("boxes", "scores", "labels"))
        check_lists(
            golden, (boxes, scores, labels), (found.pred_boxes.tensor, found.scores, found.pred_classes)
        )
    if not is_retinanet(golden):
        check_proposals(model, golden, expected)


@torch.no_grad()
def check_proposals(model, golden, expected):
    images = golden.part("in")["image"]
    features = model.backbone(images)
    listed = ImageList(images, [tuple(images.shape[-2:])] * len(images))
    proposals, _ = model.proposal_generator(listed, features)
    for i, found in enumerate(proposals):
        boxes, scores = expected[f"proposals.{i}.boxes"], expected[f"proposals.{i}.scores"]
        ours = found.proposal_boxes.tensor, found.objectness_logits.sigmoid()
        check_lists(golden, (boxes, scores), ours)


@pytest.mark.golden(case="detector")
@torch.no_grad()
def test_backbone_controls(golden, build):
    """The file distinguishes the published rules of the backbone from their alternatives."""
    model = build()
    trunk = model.backbone.bottom_up
    results, levels = language_outputs(model, golden)
    if trunk.tau != 1:
        trunk.concatenate = "cosine"
        assert golden.differs("fpn.0", language_outputs(model, golden)[0]["fpn.0"])
        trunk.concatenate = "scaled"
    tower = trunk.trunk.tower
    if results["dense"].shape[-2:] != tower.grid:
        tower.position_rule = "bilinear"
        assert golden.differs("dense", language_outputs(model, golden)[0]["dense"])
    if is_retinanet(golden) and (levels[3] < 0).any():
        assert golden.differs("fpn.4", model.backbone.top_block.p7(levels[3].relu()))


@pytest.mark.golden(case="detector")
@torch.no_grad()
def test_retinanet_controls(golden, build):
    """The file distinguishes mmdetection's rules from Detectron2's, where they differ for its boxes."""
    if not is_retinanet(golden):
        return
    model = build()
    _, levels = language_outputs(model, golden)
    assert golden.differs("cls_logits.0", model.head(levels)[0][0])  # Detectron2's order of anchors

    anchors, instances = model.anchor_generator(levels), [x["instances"] for x in batch(golden)]
    labels, matched = model.label_anchors(anchors, instances)
    positive = [(x >= 0) & (x < model.num_classes) for x in labels]
    normalizer = sum(max(int(x.sum()), 1) for x in positive)
    published, rules = losses_of(model, golden), model.rules
    model.rules = replace(rules, loss_normalizer="detectron2")
    averaged = losses_of(model, golden)
    if abs(model.loss_normalizer / normalizer - 1) > 0.01:
        assert not torch.isclose(averaged["loss_cls"], published["loss_cls"], rtol=1e-3)
    model.rules, published_matcher = rules, model.anchor_matcher

    model.anchor_matcher = published_matcher.matcher
    _, others = model.label_anchors(anchors, instances)
    if any((a[p] != b[p]).any() for a, b, p in zip(matched, others, positive, strict=True)):
        recorded = sum(x for name, x in golden.part("out").items() if name.startswith("loss_bbox_per_level"))
        theirs = losses_of(model, golden)["loss_box_reg"]
        assert not torch.isclose(theirs, recorded, atol=golden.tolerance[0], rtol=golden.tolerance[1])


@pytest.mark.golden(manifest="denseclip_det_*")
def test_every_key_of_full_size_files_is_converted(golden):
    state = {key: torch.empty(shape, device="meta") for key, shape in golden.shapes.items()}
    classes = MetadataCatalog.get("coco_2017_val").thing_classes
    file = Checkpoint(golden.path, state, "torch", extras={"meta": {"CLASSES": tuple(classes)}})
    layout = model_layout(state)
    assert layout.name == "denseclip_retinanet" if "retinanet" in golden.id else "denseclip_mask_rcnn"
    converted = convert_model(file)
    options = config_options(converted)
    assert options["MODEL.LANGUAGE.CLASSES"] == classes == converted.metadata["thing_classes"]
    cfg = get_cfg()
    add_clipdense_config(cfg)
    set_options(cfg, options, golden.id)
    report = account_model(cfg, converted, layout.drops)
    assert report.complete, str(report)
    assert len(report.loaded) == len(state) and not report.dropped

    model_cfg = cfg.MODEL.CLIP.CONFIG
    named = open_clip.get_model_config("RN50-quickgelu" if "rn50" in golden.id else "RN101-quickgelu")
    assert model_cfg.embed_dim == named["embed_dim"] and model_cfg.quick_gelu
    assert list(model_cfg.vision_cfg.layers) == named["vision_cfg"]["layers"]
    assert model_cfg.vision_cfg.width * 32 // model_cfg.vision_cfg.head_width == 32
    text = {key: model_cfg.text_cfg[key] for key in ("width", "heads", "layers", "vocab_size")}
    assert text == {key: named["text_cfg"][key] for key in text} and model_cfg.text_cfg.context_length == 13
    assert cfg.MODEL.CLIP.POSITION_GRID == 42 and cfg.MODEL.LANGUAGE.N_CONTEXTS == 8


@pytest.mark.golden(manifest="denseclip_det_*")
def test_configs_agree_with_the_published_files(golden, monkeypatch, caplog):
    state = {key: torch.empty(shape, device="meta") for key, shape in golden.shapes.items()}
    published = convert_model(Checkpoint(golden.path, state, "torch"))
    detector, trunk = golden.id.split("_")[-2:]
    recipe = RECIPES / f"{detector.replace('maskrcnn', 'mask_rcnn')}_{trunk}.yaml"
    explicit = set(config_keys(read_config_file(recipe)))
    cfg = load_config(str(recipe))
    apply_weight_options(cfg, published, explicit)
    assert not caplog.records
    needed = config_options(published)
    assert explicit & set(needed) > {"MODEL.CLIP.POSITION_RULE", "MODEL.FPN.IN_FEATURES"}


@pytest.mark.golden(manifest="denseclip_det_*_rn50")
def test_full_size_files_with_wrong_keys_are_refused(golden):
    """A missing key, an unexpected key and a mismatched shape are each listed."""
    state = {key: torch.empty(shape, device="meta") for key, shape in golden.shapes.items()}
    del state["neck.lateral_convs.0.conv.bias"]
    state["neck.extra"] = torch.empty(1, device="meta")
    state["context_decoder.out_proj.1.weight"] = torch.empty(3, 5, device="meta")
    converted = convert_model(Checkpoint(golden.path, state, "torch"))
    cfg = get_cfg()
    add_clipdense_config(cfg)
    set_options(cfg, config_options(converted), golden.id)
    report = account_model(cfg, converted)
    first = 3 if "retinanet" in golden.id else 2
    assert (report.missing, report.unexpected) == ([f"backbone.fpn_lateral{first}.bias"], ["neck.extra"])
    assert list(report.mismatched) == ["backbone.bottom_up.context_decoder.out_proj.1.weight"]
