"""F-ViT and F-VLM: backbone, heads and fusion alone, then published file -> converter -> our model -> every
recorded number.
"""

import pytest
import torch
import torch.nn.functional as F
import yaml

from clipdense.backbone import JOINT, FrozenCLIPTrunk, InterpolatedTrunk
from clipdense.checkpoint import Checkpoint, config_options, convert_model, model_layout
from clipdense.clip.layouts import EVA_CLIP
from clipdense.clip.model import build_clip
from clipdense.clip.vocabulary import Vocabulary
from clipdense.engine.build import build_model
from clipdense.engine.checkpoint import TrainingCheckpointer
from clipdense.regions import FusionSettings, TextClassifier, get_fusion, pool_boxes
from clipdense.run.config import add_clipdense_config
from clipdense.run.conversion import account_model, convert_weights
from clipdense.run.keys import set_options
from clipdense.run.setup import load_config
from clipdense.systems.fvlm.convert import BLOCKS
from clipdense.systems.fvlm.loss import mask_novel_logits, open_vocabulary_loss
from clipdense.systems.fvlm.roi_heads import FVLMBoxPredictor

from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.roi_heads.box_head import FastRCNNConvFCHead
from detectron2.structures import Boxes, Instances

VISION = ("layers", "width", "head_width", "patch_size", "mlp_ratio", "image_size")


def close(golden, name, value, atol):
    """Within the tolerance of the recorded output of that name."""
    try:
        torch.testing.assert_close(value, golden.part("out")[name], atol=atol, rtol=0)
    except AssertionError as e:
        raise AssertionError(f"{golden.id} {name}: {e}") from None


def far(golden, name, value, atol):
    """A negative control is outside the tolerance, and not by its shape alone."""
    expected = golden.part("out")[name]
    assert value.shape == expected.shape
    return (value - expected).abs().nan_to_num(nan=torch.inf).max() > atol


# the backbone


def trunk(golden, last_block="value"):
    config = golden.config
    vision = {"timm_model_name": "eva02_clip", **{key: config["vision"][key] for key in VISION}}
    pixels = {"mean": [0.5] * 3, "std": [0.5] * 3}
    model_cfg = {"embed_dim": config["embed_dim"], "vision_cfg": vision, "text_cfg": {}}
    clip = build_clip("golden", {"model_cfg": model_cfg, "preprocess_cfg": pixels}, text=False)
    frozen = FrozenCLIPTrunk(clip, blocks=config["out_indices"], last_block=last_block, joint="clipself")
    backbone = InterpolatedTrunk(frozen).eval()
    state = golden.part("state")
    visual = {k: v for k, v in state.items() if k.startswith("visual.") and ".rope." not in k}
    renamed = {f"trunk.tower.{k.removeprefix('visual.')}": v for k, v in EVA_CLIP.convert(visual).items()}
    for theirs, ours in (("interpolate1.", "levels.0."), ("interpolate2.", "levels.1.")):
        renamed |= {k.replace(theirs, ours): v for k, v in state.items() if k.startswith(theirs)}
    assert len(renamed) == len([k for k in state if ".rope." not in k])
    backbone.load_state_dict(renamed, strict=True)
    return backbone


@pytest.mark.golden(name="fvit_backbone")
def test_backbone(golden):
    backbone, plain = trunk(golden), trunk(golden, "plain")
    for size in golden.config["sizes"]:
        images = golden.part("in")[f"image_{size}"]
        with torch.no_grad():
            maps, others = backbone(images), plain(images)
        close(golden, f"dense_{size}", F.normalize(maps.pop(JOINT), dim=1), 1e-4)
        for i, level in enumerate(maps.values()):
            close(golden, f"level{i}_{size}", level, 1e-4)
        assert far(golden, f"level3_{size}", list(others.values())[3], 1e-4)


# the heads


def predictor(golden, relu=True):
    """The box head and predictor with the file's state, and the classifier's text (K + 1, D)."""
    config, state = golden.config, golden.part("state")
    rows = state["all_embeddings"].T.contiguous()
    channels, side = golden.part("in")["roi_feats"].shape[1:3]
    head = FastRCNNConvFCHead(
        ShapeSpec(channels=channels, height=side, width=side),
        conv_dims=[config["neck"]] * config["shared_convs"],
        fc_dims=[config["fc"]] * len({k.split(".")[1] for k in state if k.startswith("shared_fcs.")}),
        conv_norm="BN",
    )
    scale = state["detect_temperature"].item() if "detect_temperature" in state else None
    classifier = TextClassifier(
        config["fc"],
        rows[:-1],
        background=rows[-1:],
        temperature=1 / (scale or config["fixed_temperature"]),
        learn_temperature=scale is not None,
        relu=relu,
    )
    base = torch.ones(config["num_classes"])
    base[config["novel"]] = 0
    boxes = FVLMBoxPredictor(
        ShapeSpec(channels=config["fc"]),
        classifier,
        class_weight=F.pad(base, (0, 1), value=config["bg_weight"]),
        box_fc_dim=config["fc"],
        clip_scale=config["T_vlm"],
        fusion="fvit" if scale else "fvit_transfer",
        fusion_settings=FusionSettings(config["alpha"], config["beta"]),
        box2box_transform=Box2BoxTransform(weights=(10.0, 10.0, 5.0, 5.0)),
        test_score_thresh=config["score_thr"],
        test_nms_thresh=config["nms"],
        test_topk_per_image=config["max_per_img"],
    )
    names = {"cls_fcs.0.": "cls_score.project.", "reg_fcs.0.": "bbox_pred.0.", "fc_reg.": "bbox_pred.2."}
    loaded = {}
    for module, prefix in ((head, "shared_"), (boxes, tuple(names))):
        renamed = {}
        for key, value in state.items():
            if key.startswith(prefix):
                kind, index, rest = key.split(".", 2) if prefix == "shared_" else (key, "0", "")
                ours = next((key.replace(a, b) for a, b in names.items() if key.startswith(a)), "")
                if prefix == "shared_":
                    rest = rest.replace("conv.", "").replace("bn.", "norm.")
                    ours = f"{'conv' if kind == 'shared_convs' else 'fc'}{int(index) + 1}.{rest}"
                renamed[ours] = value
        report = module.load_state_dict(renamed, strict=False)
        assert not report.unexpected_keys
        loaded |= dict.fromkeys(report.missing_keys)
    assert set(loaded) <= {"cls_score.text", "cls_score.background", "cls_score.log_scale"}
    return head.eval(), boxes.eval(), base > 0


def head_outputs(golden, head, boxes, base):
    inputs, config = golden.part("in"), golden.config
    logits, deltas = boxes(head(inputs["roi_feats"]))
    text = boxes.cls_score.text
    proposals = Instances(tuple(config["img"]), proposal_boxes=Boxes(inputs["rois"][:, 1:]))
    (decoded,) = boxes.predict_boxes((logits, deltas), [proposals])
    clipped = Boxes(decoded.clone())
    clipped.clip(tuple(config["img"]))
    q = boxes.clip_probabilities(inputs["vlm_feats"], text)
    fused = boxes.fuse(logits.softmax(1), q, base)
    return {
        "detector_logits": logits,
        "detector_probs": logits.softmax(1),
        "bbox_deltas": deltas,
        "vlm_scores": q,
        "fused_scores": fused,
        "decoded_boxes": clipped.tensor,
    }, boxes.detect(decoded, fused, tuple(config["img"]))


def check_head(golden):
    out = golden.part("out")
    with torch.no_grad():
        head, boxes, base = predictor(golden)
        results, found = head_outputs(golden, head, boxes, base)
        for name, value in results.items():
            if name in out:
                close(golden, name, value, 1e-4 if "boxes" in name else 1e-5)
        assert torch.equal(F.pad(base, (0, 1), value=True), out["base_idx_incl_background"])
        text = torch.cat([boxes.cls_score.text, boxes.cls_score.background])
        close(golden, "text_matrix_DxC1", text.T, 1e-6)
        assert torch.equal(found.pred_classes, out["final_labels"])
        close(
            golden, "final_boxes_scores", torch.cat([found.pred_boxes.tensor, found.scores[:, None]], 1), 1e-4
        )
        whole, _ = head_outputs(golden, *predictor(golden, relu=False))
        assert far(golden, "fused_scores", whole["fused_scores"], 1e-5)  # without the ReLU
        boxes.fusion = get_fusion("fvlm")
        renormalised, _ = head_outputs(golden, head, boxes, base)
        assert far(golden, "fused_scores", renormalised["fused_scores"], 1e-5)
    return head, boxes


@pytest.mark.golden(name="fvit_bbox_head")
def test_box_head(golden):
    head, boxes = check_head(golden)
    inputs, config = golden.part("in"), golden.config
    labels, weight = inputs["labels"], boxes.class_weight
    logits, deltas = boxes(head(inputs["roi_feats"]))
    sampled = inputs["label_weights"] > 0
    loss = open_vocabulary_loss(logits[sampled], labels[sampled], weight)
    close(golden, "loss/loss_cls", loss, 1e-5)
    known = mask_novel_logits(logits, weight)
    expected = golden.part("out")["training_logits_novel_minus_inf"]
    assert torch.equal(known.isneginf(), expected.isneginf())
    torch.testing.assert_close(known[:, weight > 0], expected[:, weight > 0], atol=1e-5, rtol=0)
    accuracy = 100 * (known.argmax(1) == labels).float().mean()
    torch.testing.assert_close(accuracy[None], golden.part("out")["loss/acc"], atol=1e-3, rtol=0)
    foreground = (labels < config["num_classes"]) & (inputs["bbox_weights"] > 0).all(1)
    proposals = inputs["rois"][:, 1:]
    targets = boxes.box2box_transform.apply_deltas(inputs["bbox_targets"], proposals)
    counted = torch.where(foreground, labels, config["num_classes"])
    close(golden, "loss/loss_bbox", boxes.box_reg_loss(proposals, targets, deltas, counted), 1e-5)
    if (weight == 0).any():  # control: novel classes compete
        competing = F.cross_entropy(logits, labels, weight, reduction="none")
        assert far(golden, "loss/loss_cls", (competing * inputs["label_weights"]).mean(), 1e-3)
    if config["bg_weight"] != 1:  # control: divided by the sum of weights
        assert far(golden, "loss/loss_cls", F.cross_entropy(known, labels, weight.clamp(min=1e-9)), 1e-3)


@pytest.mark.golden(name="fvit_transfer_head")
def test_transfer_head(golden):
    head, boxes = check_head(golden)
    assert "cls_score.log_scale" not in boxes.state_dict()


# the fusion


@pytest.mark.golden(name="fvlm_score_fusion_numpy")
def test_score_fusion(golden):
    """The file's class 0 is the background, ours the last."""
    config, t = golden.config, {k: v.double() for k, v in golden.part("in").items()}
    box, text, clip = (F.normalize(t[k], dim=-1) for k in ("box_embedding", "text", "vlm_embedding"))
    detector = box @ text.transpose(1, 2) / (config["temperature_scale"] * config["tau"])
    vlm = clip @ text.transpose(1, 2) / config["clip_sim_temp"]
    close(golden, "detector_logits", detector.float(), 1e-4)
    close(golden, "vlm_logits", vlm.float(), 1e-4)
    p, q = (x.roll(-1, dims=-1).softmax(-1) for x in (detector, vlm))
    base = t["base_indicator"][:, None, 1:] > 0
    for name, (alpha, beta) in config["weights"].items():
        settings = FusionSettings(alpha, beta)
        fused = get_fusion("fvlm")(p, q, base, settings).roll(1, dims=-1).float()
        close(golden, f"fused_{name}", fused, 1e-5)
        alone = get_fusion("fvlm")(p, q, None, settings).roll(1, dims=-1).float()
        close(golden, f"fused_{name}_no_base_indicator", alone, 1e-5)
        if alpha != beta and base.any():
            assert far(golden, f"fused_{name}", alone, 1e-5)
        assert far(golden, f"NEG_fused_{name}_not_renormalised", fused, 1e-5)
        theirs = get_fusion("fvit")(p, q, base, settings).roll(1, dims=-1).float()
        assert far(golden, f"fused_{name}", theirs, 1e-5)


# whole detectors


@pytest.fixture
def detector(golden, tmp_path):
    """Convert the file with the settings of its run, build the model that the result names, load it."""

    def build(**changes):
        config = golden.config
        torch.save({"meta": {}, "state_dict": golden.part("state")}, tmp_path / "published.pth")
        options = {
            "MODEL.CLIP.CONFIG.vision_cfg.head_width": config["vision"]["head_width"],
            "MODEL.FROZEN_CLIP.BLOCKS": config["out_indices"],
            "MODEL.RPN.PRE_NMS_TOPK_TEST": config["nms_pre"],
            "MODEL.RPN.POST_NMS_TOPK_TEST": config["n_prop"],
            "MODEL.ROI_HEADS.SCORE_THRESH_TEST": config["score_thr"],
            "MODEL.ROI_HEADS.NMS_THRESH_TEST": config["nms"],
            "TEST.DETECTIONS_PER_IMAGE": config["max_per_img"],
            "MODEL.FVLM.ALPHA": config["alpha"],
            "MODEL.FVLM.BETA": config["beta"],
            "MODEL.FVLM.CLIP_SCALE": config["T_vlm"],
            "MODEL.FVLM.SQUARE_SIZE": config["size"],
            # the images come normalised
            "MODEL.PIXEL_MEAN": [0.0] * 3,
            "MODEL.PIXEL_STD": [1.0] * 3,
            **changes,
        }
        target = tmp_path / "converted.safetensors"
        conversion = convert_weights(tmp_path / "published.pth", target, options=options)
        assert set(conversion.dropped) >= {"RoPE tables", "unused classifier"}
        (tmp_path / "config.yaml").write_text(
            yaml.safe_dump({"VERSION": 2, "MODEL": {"WEIGHTS": str(target), "DEVICE": "cpu"}})
        )
        model = build_model(load_config(str(tmp_path / "config.yaml"))).eval()
        TrainingCheckpointer(model).load_weights(str(target), complete=True)
        names = Vocabulary.from_names([f"class {i}" for i in range(config["num_classes"])])
        text = {"classes": model.roi_heads.box_predictor.cls_score.text}
        model.set_vocabulary(names.with_novel(config["novel"]), text)
        return model

    return build


def samples(golden):
    """Each image without its padding, as Detectron2's input."""
    images = zip(golden.part("in")["image"], golden.config["img_shapes"], strict=True)
    return [{"image": image[:, :h, :w], "height": h, "width": w} for image, (h, w) in images]


def matched(expected, found, atol):
    """Whether each recorded row (box first) has a counterpart; rows of near-equal scores may trade places.

    Detectron2 drops boxes that are empty after clipping, the recording keeps them: each may be replaced.
    """
    kept = expected[Boxes(expected[:, :4]).nonempty()]
    fits = ((found[:, None] - kept[None]).abs() <= atol).all(2)
    unmatched = int((~fits.any(1)).sum())
    return len(found) <= len(expected) and bool(fits.any(0).all()) and unmatched <= len(expected) - len(kept)


@pytest.mark.golden(name="ckpt_fvit_detector_*")
@torch.no_grad()
def test_every_output(golden, detector):
    model, out, config = detector(), golden.part("out"), golden.config
    images = model.preprocess_image(samples(golden))
    assert torch.equal(images.tensor, golden.part("in")["image"])
    levels = list(model.backbone.bottom_up(images.tensor).values())[:4]
    features = model.backbone(images.tensor)
    rpn, heads = model.proposal_generator, model.roi_heads
    maps = [features[name] for name in rpn.in_features]
    objectness, deltas = rpn.rpn_head(maps)
    close(golden, "backbone.dense", F.normalize(features[JOINT], dim=1), 1e-4)
    for i, anchors in enumerate(rpn.anchor_generator(maps)):
        close(golden, f"anchors.{i}", anchors.tensor, 1e-4)
        close(golden, f"fpn.{i}", maps[i], 1e-4)
        close(golden, f"rpn.objectness.{i}", objectness[i], 1e-4)
        close(golden, f"rpn.deltas.{i}", deltas[i], 1e-4)
    for i, level in enumerate(levels):
        close(golden, f"backbone.level{i}", level, 1e-4)
    tolerance = torch.tensor([1e-2] * 4 + [1e-4])
    for i, found in enumerate(rpn(images, features)[0]):
        rows = torch.cat([found.proposal_boxes.tensor, found.objectness_logits[:, None]], 1)
        assert matched(out[f"proposals.{i}"], rows, tolerance), f"{golden.id} proposals.{i}"

    # the heads are recorded for the recorded proposals, in their order
    sizes = images.image_sizes
    boxes = [out[f"proposals.{i}"][:, :4] for i in range(len(sizes))]
    close(golden, "vlm_roi_feats", clip_features(model, features, boxes), 1e-4)
    x = heads.box_head(heads.box_pooler(maps[:4], [Boxes(b) for b in boxes]))
    text, base = model.evaluation_classes()
    logits, box_deltas = heads.box_predictor(x, text)
    p = logits.softmax(1)
    q = heads.box_predictor.clip_probabilities(model.trunk.embed_regions(features[JOINT], boxes=boxes), text)
    fused = heads.box_predictor.fuse(p, q, base)
    close(golden, "detector_logits", logits, 1e-4)
    close(golden, "bbox_deltas", box_deltas, 1e-4)
    close(golden, "fused_scores", fused, 1e-4)
    found = model.inference(samples(golden), do_postprocess=False)
    scales = torch.tensor(config["scale_factor"]).reshape(-1, 4).expand(len(found), 4)
    for i, instances in enumerate(found):
        recorded = torch.cat([out[f"det.{i}.boxes_scores"], out[f"det.{i}.labels"][:, None]], 1)
        rows = [
            instances.pred_boxes.tensor / scales[i],
            instances.scores[:, None],
            instances.pred_classes[:, None],
        ]
        assert matched(recorded, torch.cat(rows, 1), torch.cat([tolerance, torch.zeros(1)])), golden.id
    if config["mask"]:
        final = [Boxes(out[f"det.{i}.boxes_scores"][:, :4] * scales[i]) for i in range(len(sizes))]
        masks = heads.mask_head.layers(heads.mask_pooler(maps[:4], final))
        close(golden, "det.mask_logits_cat_over_images", masks, 1e-4)

    # control: base and novel classes exchanged
    if config["alpha"] != config["beta"]:
        assert far(golden, "fused_scores", heads.box_predictor.fuse(p, q, ~base), 1e-4)


def clip_features(model, features, boxes):
    """CLIP's region features before their last normalisation, which only their direction needs."""
    return pool_boxes(features[JOINT], boxes, scale=1 / model.trunk.tower.stride, pooling="clipself_raw")


@pytest.mark.golden(name="ckpt_fvit_detector_*")
@torch.no_grad()
def test_negative_controls(golden, detector):
    """Every published rule that has an alternative is told apart from it."""
    sizes = [golden.part("out")[f"proposals.{i}"] for i in range(len(golden.config["img_shapes"]))]
    large = all((Boxes(rows[:, :4]).area().sqrt() >= 8 * 56).all() for rows in sizes)  # on the coarsest level
    model = detector(**{"MODEL.FVLM.FINEST_BOX_SIZE": 1e4 if large else 1.0})
    features = model.backbone(golden.part("in")["image"])
    heads = model.roi_heads
    maps = [features[name] for name in heads.box_in_features]
    boxes = [golden.part("out")[f"proposals.{i}"][:, :4] for i in range(len(golden.config["img_shapes"]))]
    x = heads.box_head(heads.box_pooler(maps, [Boxes(b) for b in boxes]))
    assert far(golden, "detector_logits", heads.box_predictor(x)[0], 1e-4)  # other levels
    moved = [b + 1 for b in boxes]
    assert far(golden, "vlm_roi_feats", clip_features(model, features, moved), 1e-4)


@pytest.mark.golden(name="ckpt_fvit_detector_coco")
def test_transfer_detector(golden, detector):
    """A file without a temperature is that of the transfer head, whose temperature the config fixes."""
    del golden.tensors["state/roi_head.bbox_head.detect_temperature"]
    classifier = detector(**{"MODEL.FVLM.SCALE": 30.0}).roi_heads.box_predictor.cls_score
    assert not classifier.log_scale.requires_grad and classifier.log_scale.exp() == pytest.approx(30)
    options = config_options(convert_model(Checkpoint(golden.path, golden.part("state"), "torch")))
    assert options["MODEL.FVLM.FUSION"] == "fvit_transfer" and options["MODEL.FVLM.SCALE"] == 50


# full size


@pytest.mark.golden(manifest="fvit_*")
def test_full_size_files_map_without_rest(golden):
    state = {key: torch.empty(shape, device="meta") for key, shape in golden.shapes.items()}
    stray = dict.fromkeys(
        ("backbone.visual.rope.flag", "backbone.visual.rope.freqs_cos_1600"), torch.empty(1)
    )
    assert model_layout(state | stray).name == "fvit"
    converted = convert_model(Checkpoint(golden.path, state | stray, "torch"))
    options = config_options(converted)
    cfg = get_cfg()
    add_clipdense_config(cfg)
    set_options(cfg, options, golden.id)
    report = account_model(cfg, converted, model_layout(state).drops)
    assert report.complete, str(report)
    dropped = report.dropped["RoPE tables"] + report.dropped["unused classifier"]
    # one tensor of the file becomes two of the model: text and background
    assert len(report.loaded) == len(state) + len(stray) - len(dropped) + 1
    large, masks = "l14" in golden.id, "lvis" in golden.id
    assert options["MODEL.FROZEN_CLIP.BLOCKS"] == BLOCKS[24 if large else 12]
    assert options["MODEL.ROI_HEADS.NUM_CLASSES"] == (1203 if masks else 65)
    assert (
        masks == cfg.MODEL.MASK_ON
        and ("NormRPNHead" if masks else "StandardRPNHead") == cfg.MODEL.RPN.HEAD_NAME
    )
    vision = cfg.MODEL.CLIP.CONFIG.vision_cfg
    assert vision.image_size == (336 if large else 224) and vision.layers == (24 if large else 12)
    lost = {key: value for key, value in state.items() if key != "neck.fpn_convs.0.bn.weight"}
    report = account_model(
        cfg, convert_model(Checkpoint(golden.path, lost | {"x": stray.popitem()[1]}, "torch"))
    )
    first = 1 if large else 2
    assert report.missing == [f"backbone.fpn_output{first}.norm.weight"] and "x" in report.unexpected
