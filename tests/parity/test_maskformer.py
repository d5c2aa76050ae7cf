"""MaskFormer and Mask2Former: decoders, matching, losses and post-processing alone, then published file ->
converter -> our model -> every recorded number.
"""

import pytest
import torch
import torch.nn.functional as F
import yaml

from clipdense.checkpoint import Checkpoint, config_options, convert_model, model_layout
from clipdense.engine.build import build_model
from clipdense.engine.checkpoint import TrainingCheckpointer
from clipdense.inference import instance_inference, panoptic_inference, semantic_map
from clipdense.maskformer import (
    PIXEL_DECODER_REGISTRY,
    EmbeddingHead,
    HungarianMatcher,
    LinearClassHead,
    MaskFormerHead,
    MaskPrediction,
    MSDeformAttnPixelDecoder,
    MultiScaleMaskedTransformerDecoder,
    SetCriterion,
    StandardTransformerDecoder,
    Targets,
    deformable_attention,
)
from clipdense.maskformer.matcher import class_cost, dice_cost, focal_cost
from clipdense.maskformer.points import uncertain_points
from clipdense.run.config import add_clipdense_config
from clipdense.run.conversion import account_model, convert_weights
from clipdense.run.keys import set_options
from clipdense.run.setup import load_config

from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec

HEAD = {"norm": "GN", "pixel_decoder": "BasePixelDecoder", "transformer_in_feature": "res5"}
HEAD |= {"enc_layers": 0, "pre_norm": False, "enforce_input_project": False}


def tolerance(golden, name, atol):
    """No tighter than ten times the rounding of the published code itself."""
    return max(atol, 10 * golden.config.get("fp32_vs_fp64_max_abs_diff", {}).get(name, 0.0))


def close(golden, name, value, atol=0.0, rtol=0.0):
    """Within the tolerance of the recorded output of that name."""
    try:
        torch.testing.assert_close(
            value, golden.part("out")[name], atol=tolerance(golden, name, atol), rtol=rtol
        )
    except AssertionError as e:
        raise AssertionError(f"{golden.id} {name}: {e}") from None


def far(golden, name, value, atol):
    """A negative control is outside the tolerance, and not by its shape alone."""
    expected = golden.part("out")[name]
    assert value.shape == expected.shape
    return (value - expected).abs().max() > tolerance(golden, name, atol)


def below(state, prefix):
    """The entries below a prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def level_shapes(channels):
    return {f"res{i + 2}": ShapeSpec(channels=c, stride=2 ** (i + 2)) for i, c in enumerate(channels)}


# MaskFormer's head


def head(golden, class_embed, **changes):
    """Pixel decoder and predictor with the file's state, in training mode so that every layer predicts."""
    h = HEAD | golden.config["head"] | changes
    sizes = {"mask_dim": h["mask_dim"], "norm": h["norm"], "conv_dim": h["conv_dim"]}
    attention = {k: h[k] for k in ("nheads", "dim_feedforward", "pre_norm")} | {"dropout": 0.0}
    extra = (
        attention | {"enc_layers": h["pixel_enc_layers"]}
        if h["pixel_decoder"] == "TransformerEncoderPixelDecoder"
        else {}
    )
    pixel = PIXEL_DECODER_REGISTRY.get(h["pixel_decoder"])(level_shapes(h["in_channels"]), **sizes, **extra)
    in_feature = "" if h["transformer_in_feature"] == "transformer_encoder" else h["transformer_in_feature"]
    channels = h["in_channels"][int(in_feature[3]) - 2] if in_feature else h["conv_dim"]
    others = {k: h[k] for k in ("hidden_dim", "mask_dim", "num_queries", "enc_layers", "dec_layers")}
    others["enforce_input_project"] = h["enforce_input_project"]
    predictor = StandardTransformerDecoder(channels, class_embed, **attention, **others)
    model = MaskFormerHead(pixel, predictor, in_feature).train()
    model.load_state_dict(below(golden.part("state"), "sem_seg_head."), strict=True)
    return model


def check_layers(golden, prediction, classified, field="class_logits"):
    """Compare the last prediction and those before it; `classified` names the recording of a `field`."""
    for prefix, p in [("", prediction), *((f"aux{i}/", p) for i, p in enumerate(prediction.aux))]:
        close(golden, f"{prefix}{classified}", getattr(p, field), 1e-4)
        close(golden, f"{prefix}pred_masks", p.mask_logits, 1e-4)
    assert f"aux{len(prediction.aux)}/pred_masks" not in golden.part("out")


@pytest.mark.golden(kind="ovseg_head")
@torch.no_grad()
def test_head_with_text(golden):
    h, features = golden.config["head"], golden.part("in")
    embed = EmbeddingHead(h["hidden_dim"], h["embed_hidden_dim"], h["embedding_dim"], h["embed_layers"])
    model = head(golden, embed)
    mask_features, levels = model.pixel_decoder(features)
    close(golden, "mask_features", mask_features, 1e-4)
    if levels:
        close(golden, "transformer_encoder_features", levels[0], 1e-4)
    prediction = model(features)
    check_layers(golden, prediction, "pred_embeddings", "query_embeddings")
    text = torch.cat([features["text_features"], golden.part("state")["clip_adapter.non_object_embedding"]])
    for prefix, p in [("", prediction), *((f"aux{i}/", p) for i, p in enumerate(prediction.aux))]:
        logits = 100 * F.normalize(p.query_embeddings, dim=2) @ F.normalize(text, dim=1).T
        close(golden, f"{prefix}pred_logits", logits, 2e-3)
    single = model.eval()(features)
    assert single.aux == []
    close(golden, "pred_masks", single.mask_logits, 1e-4)
    for layer in model.predictor.transformer.decoder.layers:
        layer.pre_norm = not layer.pre_norm
    assert far(golden, "pred_masks", model(features).mask_logits, 1e-4)


@pytest.mark.golden(kind="mf1_head")
@torch.no_grad()
def test_head_with_linear_classifier(golden):
    h = golden.config["head"]
    model = head(golden, LinearClassHead(h["hidden_dim"], h["num_classes"]))
    check_layers(golden, model(golden.part("in")), "pred_logits")
    coarsest = max(golden.part("in"))
    swapped = golden.part("in") | {coarsest: golden.part("in")[coarsest].flip(3)}
    assert far(golden, "pred_logits", model(swapped).class_logits, 1e-4)


# Mask2Former's head


@pytest.mark.golden(kind="m2f_msda_core")
def test_deformable_attention(golden):
    x = golden.part("in")
    sizes = [tuple(size) for size in golden.config["spatial_shapes"]]
    output = deformable_attention(x["value"], sizes, x["sampling_locations"], x["attention_weights"])
    close(golden, "output", output, 1e-5)
    transposed = x["sampling_locations"].flip(5)  # y, x
    control = deformable_attention(x["value"], sizes, transposed, x["attention_weights"])
    assert far(golden, "output", control, 1e-5)


def deformable_decoder(golden, **changes):
    c = golden.config | changes
    sizes = {k: c[k] for k in ("conv_dim", "mask_dim", "nheads", "dim_feedforward", "enc_layers")}
    model = MSDeformAttnPixelDecoder(level_shapes(c["in_channels"]), **sizes).eval()
    model.load_state_dict(below(golden.part("state"), "sem_seg_head.pixel_decoder."), strict=True)
    return model


@pytest.mark.golden(kind="m2f_pixel_decoder")
@torch.no_grad()
def test_deformable_pixel_decoder(golden):
    model = deformable_decoder(golden)
    with torch.autocast("cpu", torch.bfloat16):  # which it leaves alone
        mask_features, levels = model(golden.part("in"))
    close(golden, "mask_features", mask_features, 1e-4)
    close(golden, "transformer_encoder_features", levels[0], 1e-4)
    for i, level in enumerate(levels):
        close(golden, f"multi_scale{i}", level, 1e-4)
    for layer in model.transformer.encoder["layers"]:
        heads, levels_, points = layer.self_attn.shape
        layer.self_attn.shape = heads // 2, levels_, points * 2
    assert far(golden, "mask_features", model(golden.part("in")).mask_features, 1e-4)


@pytest.mark.golden(kind="m2f_decoder")
@torch.no_grad()
def test_masked_decoder(golden):
    c, x = golden.config, golden.part("in")
    names = ("hidden_dim", "mask_dim", "num_queries", "nheads", "dim_feedforward", "dec_layers")
    sizes = {k: c[k] for k in (*names, "pre_norm", "enforce_input_project")}
    model = MultiScaleMaskedTransformerDecoder(
        c["in_channels"], LinearClassHead(c["hidden_dim"], c["num_classes"]), **sizes
    )
    model.load_state_dict(below(golden.part("state"), "sem_seg_head.predictor."), strict=True)
    levels = [x["x0"], x["x1"], x["x2"]]
    check_layers(golden, model.train()(levels, x["mask_features"]), "pred_logits")
    single = model.eval()(levels, x["mask_features"])
    assert single.aux == []
    close(golden, "pred_logits", single.class_logits, 1e-4)
    for layer in [*model.transformer_cross_attention_layers, *model.transformer_ffn_layers]:
        layer.pre_norm = not layer.pre_norm
    assert far(golden, "pred_logits", model(levels, x["mask_features"]).class_logits, 1e-4)


# matching and losses


def predictions(golden):
    """The recorded prediction, whose tensors want gradients, by layer."""
    layers = {}
    for name in ("main", *(f"aux{i}" for i in range(golden.config["num_aux"]))):
        logits, masks = (golden.part("in")[f"{name}/pred_{k}"].clone() for k in ("logits", "masks"))
        layers[name] = MaskPrediction(
            mask_logits=masks.requires_grad_(), class_logits=logits.requires_grad_()
        )
    layers["main"].aux = [layer for name, layer in layers.items() if name != "main"]
    return layers


def truth(golden):
    inputs = golden.part("in")
    return [
        Targets(inputs[f"target{b}/labels"], inputs[f"target{b}/masks"].bool())
        for b in range(golden.config["batch"])
    ]


def check_losses(golden, criterion, layers, targets):
    losses = criterion(layers["main"], targets)
    assert len(losses) == len([k for k in golden.part("out") if k.startswith("loss/")])
    for name, loss in losses.items():
        weight = golden.config["loss_weights"]["_".join(name.split("_")[:2])]
        close(golden, f"loss/{name}", loss / weight, rtol=1e-5)
    total = torch.stack(list(losses.values())).sum()
    close(golden, "loss_total", total, rtol=1e-5)
    total.backward()
    for name, layer in layers.items():
        close(golden, f"{name}/grad_pred_logits", layer.class_logits.grad, 1e-6)
        close(golden, f"{name}/grad_pred_masks", layer.mask_logits.grad, 1e-6)
    return losses


def check_matches(golden, name, matches):
    for b, (query, target) in enumerate(matches):
        close(golden, f"{name}/match_query/{b}", query)
        close(golden, f"{name}/match_target/{b}", target)


def criterion_of(golden, matcher, **points):
    c = golden.config
    weights = {f"{k}_weight": c["loss_weights"][f"loss_{v}"] for k, v in WEIGHTS.items()}
    return SetCriterion(
        c["num_classes"], matcher, **weights, no_object_weight=c["no_object_weight"], **points
    )


WEIGHTS = {"class": "ce", "mask": "mask", "dice": "dice"}


@pytest.mark.golden(kind="maskformer_criterion")
def test_criterion(golden):
    c, layers, targets = golden.config, predictions(golden), truth(golden)
    matcher = HungarianMatcher(**{f"cost_{k}": c[f"cost_{k}"] for k in WEIGHTS})
    size = c["pred_hw"]
    for name, layer in layers.items():
        for b, target in enumerate(targets):
            logits, masks = layer.class_logits[b].detach(), layer.mask_logits[b].detach()
            small = F.interpolate(target.masks[:, None].float(), size, mode="nearest").flatten(1)
            close(golden, f"{name}/cost_class/{b}", class_cost(logits, target.labels), rtol=1e-5)
            close(golden, f"{name}/cost_mask/{b}", focal_cost(masks.flatten(1), small), rtol=1e-5)
            close(golden, f"{name}/cost_dice/{b}", dice_cost(masks.flatten(1), small), rtol=1e-5)
            close(golden, f"{name}/cost_total/{b}", matcher.costs(logits, masks, target), rtol=1e-5)
        check_matches(golden, name, matcher(layer.class_logits, layer.mask_logits, targets))
    criterion = criterion_of(golden, matcher)
    if c["no_object_weight"] > 0:
        close(golden, "criterion.empty_weight", criterion.empty_weight)
    check_losses(golden, criterion, layers, targets)
    other = criterion_of(golden, matcher)
    other.empty_weight = torch.ones(c["num_classes"] + 1)
    assert far(golden, "loss/loss_ce", other(layers["main"], targets)["loss_ce"], 1e-4)


@pytest.mark.golden(kind="m2f_criterion")
def test_point_criterion(golden, monkeypatch):
    c, inputs, targets = golden.config, golden.part("in"), truth(golden)
    weights = {f"cost_{k}": c["loss_weights"][f"loss_{v}"] for k, v in WEIGHTS.items()}
    matcher = HungarianMatcher(**weights, num_points=c["num_points"])
    sampling = c["num_points"], c["oversample_ratio"], c["importance_sample_ratio"]
    criterion = criterion_of(
        golden,
        matcher,
        num_points=sampling[0],
        oversample_ratio=sampling[1],
        importance_ratio=sampling[2],
    )
    drawn = []

    def replay(*size, device=None):
        points = drawn.pop(0)
        assert points.shape == size
        return points

    def points_of(name):
        matching = [inputs[f"{name}/match_points/{b}"] for b in range(len(targets))]
        return matching, [inputs[f"{name}/uniform_{kind}"] for kind in ("oversample", "random")]

    monkeypatch.setattr(torch, "rand", replay)
    layers = predictions(golden)
    for name, layer in layers.items():
        matching, uniform = points_of(name)
        drawn[:] = [*matching, *matching, *uniform]
        for b, image in enumerate(
            zip(layer.class_logits.detach(), layer.mask_logits.detach(), targets, strict=True)
        ):
            close(golden, f"{name}/cost_total/{b}", matcher.costs(*image), rtol=1e-5)
        matches = matcher(layer.class_logits, layer.mask_logits, targets)
        check_matches(golden, name, matches)
        matched = torch.cat([m[q] for m, (q, _) in zip(layer.mask_logits, matches, strict=True)])
        close(golden, f"{name}/loss_points", uncertain_points(matched, *sampling), 1e-6)
    drawn[:] = [p for name in layers for kind in points_of(name) for p in kind]
    check_losses(golden, criterion, layers, targets)
    assert not drawn
    drawn[:] = [p.flip(-1) for name in layers for kind in points_of(name) for p in kind]
    assert far(golden, "loss/loss_mask", criterion(layers["main"], targets)["loss_mask"], 1e-4)


# post-processing


def check_panoptic(golden, suffix, found, exact=True):
    seg, segments = found
    expected = golden.part("out")[f"panoptic_seg{suffix}"]
    assert seg.dtype == expected.dtype == torch.int32
    assert (seg == expected).float().mean() >= (1.0 if exact else 0.999)
    for key, name in (("id", "ids"), ("category_id", "category"), ("isthing", "isthing")):
        recorded = golden.part("out")[f"panoptic_{name}{suffix}"]
        assert [int(s[key]) for s in segments] == recorded.int().tolist()


def check_instances(golden, suffix, found, atol, exact=True):
    """As a set: every recorded instance has its own counterpart."""
    out = golden.part("out")
    classes, scores, masks = (out[f"inst_{k}{suffix}"] for k in ("classes", "scores", "masks"))
    assert len(found) == len(classes)
    overlap = (found.pred_masks[:, None] == masks[None]).float().mean((2, 3)) >= (1.0 if exact else 0.999)
    fits = overlap & (found.pred_classes[:, None] == classes)
    fits &= (found.scores[:, None] - scores).abs() <= tolerance(golden, f"inst_scores{suffix}", atol)
    assert fits.any(0).all() and fits.any(1).all(), golden.id


def panoptic_arguments(config):
    thresholds = {k: config[k] for k in ("object_mask_threshold", "overlap_threshold")}
    return {"things": config["thing_ids"], **thresholds}


def check_pixel_threshold(config, scores, masks):
    """The thresholds of both versions differ exactly if a segment has pixels of low probability."""
    lenient, strict = (
        panoptic_inference(scores, masks, **panoptic_arguments(config), pixel_threshold=threshold)[0]
        for threshold in (0.0, 0.5)
    )
    top, labels = scores.max(1)
    kept = (labels < scores.shape[1] - 1) & (top > config["object_mask_threshold"])
    if not kept.any():
        assert not lenient.any() and not strict.any()
        return
    probabilities = masks[kept].sigmoid()
    winner = (top[kept, None, None] * probabilities).argmax(0, keepdim=True)
    low = probabilities.gather(0, winner)[0] < 0.5
    assert torch.equal(lenient, strict) == (not (low & (lenient > 0)).any())


def semantic(scores, masks):
    return semantic_map(scores[:, :-1], masks.sigmoid(), masks.shape[1:])


@pytest.mark.golden(kind="mf1_inference")
def test_inference_of_maskformer(golden):
    c, masks = golden.config, golden.part("in")["mask_logits"]
    scores = golden.part("in")["pred_logits"].softmax(1)
    close(golden, "sem_seg", semantic(scores, masks), 1e-5)
    check_panoptic(golden, "", panoptic_inference(scores, masks, **panoptic_arguments(c)))
    assert far(golden, "sem_seg", semantic(scores, masks - 0.1), 1e-5)
    check_pixel_threshold(c, scores, masks)


@pytest.mark.golden(kind="m2f_inference")
def test_inference_of_mask2former(golden):
    c, masks = golden.config, golden.part("in")["mask_logits"]
    scores = golden.part("in")["pred_logits"].softmax(1)
    close(golden, "sem_seg", semantic(scores, masks), 1e-5)
    check_panoptic(
        golden, "", panoptic_inference(scores, masks, **panoptic_arguments(c), pixel_threshold=0.5)
    )
    things = c["thing_ids"] if c["panoptic_on"] else None
    check_instances(golden, "", instance_inference(scores, masks, topk=c["topk"], things=things), 1e-5)
    check_pixel_threshold(c, scores, masks)
    all_classes = instance_inference(scores, masks, topk=c["topk"])
    assert len(all_classes) == min(c["topk"], len(scores) * c["num_classes"])


# whole models


@pytest.mark.golden(kind="m2f_full")
@torch.no_grad()
def test_every_output_of_a_published_file(golden, tmp_path):
    c, inputs = golden.config, golden.part("in")
    options = {
        "MODEL.MASK_FORMER.NHEADS": c["nheads"],
        "MODEL.MASK_FORMER.PIXEL_DECODER.POINTS": 4,
        "MODEL.MASK_FORMER.TEST.OBJECT_MASK_THRESHOLD": c["object_mask_threshold"],
        "MODEL.MASK_FORMER.TEST.OVERLAP_THRESHOLD": c["overlap_threshold"],
        "MODEL.MASK_FORMER.TEST.SEMANTIC_ON": True,
        "MODEL.MASK_FORMER.TEST.PANOPTIC_ON": True,
        "MODEL.MASK_FORMER.TEST.INSTANCE_ON": True,
        "TEST.DETECTIONS_PER_IMAGE": c["topk"],
    }
    torch.save({"model": golden.part("state")}, tmp_path / "published.pth")
    target = tmp_path / "converted.safetensors"
    conversion = convert_weights(tmp_path / "published.pth", target, options=options)
    assert conversion.layout == "mask2former" and "class weights" in conversion.dropped
    (tmp_path / "config.yaml").write_text(
        yaml.safe_dump({"VERSION": 2, "MODEL": {"WEIGHTS": str(target), "DEVICE": "cpu"}})
    )
    model = build_model(load_config(str(tmp_path / "config.yaml"))).eval()
    TrainingCheckpointer(model).load_weights(str(target), complete=True)
    model.things = frozenset(c["thing_ids"])
    sizes = zip(c["image_hw"], c["output_hw"], strict=True)
    samples = [
        {"image": inputs[f"image{b}"], "height": out[0], "width": out[1]} for b, (_, out) in enumerate(sizes)
    ]
    images = model.preprocess_image(samples)
    prediction = model.head(model.backbone(images.tensor))
    close(golden, "pred_logits", prediction.class_logits, 1e-3)
    close(golden, "pred_masks", prediction.mask_logits, 1e-3)
    for b, output in enumerate(model(samples)):
        close(golden, f"sem_seg{b}", output["sem_seg"], 1e-3)
        check_panoptic(golden, str(b), output["panoptic_seg"], exact=False)
        check_instances(golden, str(b), output["instances"], 1e-3, exact=False)
    swapped = model.head(model.backbone(images.tensor.flip(1)))  # channels in another order
    assert far(golden, "pred_logits", swapped.class_logits, 1e-3)


LOST = "head.predictor.mask_embed.layers.2.bias"


@pytest.mark.golden(manifest="mask*former_*")
def test_full_size_files_map_without_rest(golden):
    state = {key: torch.empty(shape, device="meta") for key, shape in golden.shapes.items()}
    layout = model_layout(state)
    assert layout.name == golden.id.split("/")[1].split("_")[0]
    converted = convert_model(Checkpoint(golden.path, state, "torch"))
    options = config_options(converted)
    cfg = get_cfg()
    add_clipdense_config(cfg)
    set_options(cfg, options, golden.id)
    report = account_model(cfg, converted, layout.drops)
    assert report.complete, str(report)
    dropped = sum(map(len, report.dropped.values()))
    assert len(report.loaded) == len(state) - dropped
    assert dropped == 1 + len([k for k in state if k.endswith("relative_position_index")])
    keys = cfg.MODEL.MASK_FORMER
    assert (keys.NHEADS, keys.DIM_FEEDFORWARD, keys.MASK_DIM) == (8, 2048, 256)
    panoptic = "panoptic" in golden.id
    assert (133 if panoptic else 150) == cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    assert keys.TEST.PANOPTIC_ON == keys.TEST.INSTANCE_ON == panoptic
    assert (9 if layout.name == "mask2former" else 6) == keys.DEC_LAYERS
    if "swinl" in golden.id:
        assert dict(cfg.MODEL.TIMM.KWARGS) == {
            "embed_dim": 192,
            "depths": [2, 2, 18, 2],
            "num_heads": [6, 12, 24, 48],
            "window_size": 12,
        }
    lost = {key: value for key, value in state.items() if key != f"sem_seg_{LOST}"}
    stray = lost | {"sem_seg_head.stray": torch.empty(1)}
    if layout.name == "maskformer":  # whose oldest files lack the pixel decoder's name
        old = {k.replace("sem_seg_head.pixel_decoder.", "sem_seg_head."): v for k, v in state.items()}
        assert convert_model(Checkpoint(golden.path, old, "torch")).state.keys() == converted.state.keys()
    else:
        old = {k.replace("query_feat", "static_query"): v for k, v in state.items()}
        assert convert_model(Checkpoint(golden.path, old, "torch")).state.keys() == converted.state.keys()
    report = account_model(cfg, convert_model(Checkpoint(golden.path, stray, "torch")), layout.drops)
    assert report.missing == [LOST]
    assert report.unexpected == ["head.stray"]
