"""OVSeg's CLIP branch: crops, mask prompts, text, the scores of both classifiers, semantic maps."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from clipdense.clip import TowerRequest
from clipdense.clip.mask_prompts import MaskPrompts, patch_keep
from clipdense.clip.model import build_clip
from clipdense.clip.templates import TemplateSet, get
from clipdense.clip.text import TextBank
from clipdense.inference import best_masks, semantic_labels, semantic_map
from clipdense.regions import (
    CROP_RULES,
    CropRule,
    FusionSettings,
    RegionEncoder,
    cosine_logits,
    crop_masks,
    mask_extent,
)
from clipdense.systems.two_stage import Scoring
from tests.helpers import two_stage_files as files
from tests.helpers.two_stage_files import MEAN, STD, close, far


def crop_rule(adapter) -> CropRule:
    names = {
        "mask_thr": "threshold",
        "mask_fill": "fill",
        "mask_expand_ratio": "expand",
        "mask_matting": "soft",
    }
    return replace(
        CROP_RULES["ovseg"], **{names[key]: value for key, value in adapter.items() if key in names}
    )


@pytest.mark.golden(kind="ovseg_crop")
@pytest.mark.parametrize("batched", [False, True])
def test_crops(golden, batched):
    inputs, rule = golden.part("in"), crop_rule(golden.config["adapter"])
    step = golden.config.get("store_stride", 1)

    def run(rule):
        sizes = {"size": 224, "pixel_mean": MEAN, "pixel_std": STD}
        crops = crop_masks(inputs["image"], inputs["mask_probs"], rule, **sizes)
        regions, masks = crops.regions(batched=batched), crops.region_masks()
        return {
            "valid": crops.valid,
            "regions": regions[crops.index][..., ::step, ::step],
            "region_masks": masks[crops.index][..., ::step, ::step],
        }

    results, expected = run(rule), golden.part("out")
    extent = mask_extent(inputs["mask_probs"], rule.threshold)
    close(golden, "tight_boxes", extent.boxes[extent.valid].float(), 0)
    close(golden, "valid", results["valid"], 0)
    close(golden, "region_masks", results["region_masks"], 0)
    close(golden, "regions", results["regions"], 3e-4)
    assert (results["regions"] - expected["regions"]).abs().mean() < 1e-5
    if not extent.valid.any():
        return
    averaged = run(CropRule(threshold=rule.threshold, sampling="roi_align"))
    assert far(golden, "regions", averaged["regions"], 3e-4)
    if not (expected["region_masks"] == 1).all():
        assert far(golden, "regions", run(replace(rule, masked=False))["regions"], 3e-4)
    if rule.expand != 1:
        assert far(golden, "regions", run(replace(rule, expand=1.0))["regions"], 3e-4)


@pytest.mark.golden(kind="ovseg_vit_mpt")
@torch.no_grad()
def test_mask_prompts(golden):
    sizes, inputs, state = golden.config, golden.part("in"), golden.part("state")
    names = {"vision_layers": "layers", "vision_width": "width", "vision_patch_size": "patch_size"}
    vision = files.vit_config(sizes | {theirs: sizes[ours] for theirs, ours in names.items()})
    vision |= {"image_size": sizes["image_resolution"], "head_width": sizes["width"] // sizes["heads"]}
    model = {"embed_dim": sizes["output_dim"], "quick_gelu": True, "vision_cfg": vision}
    config = {"model_cfg": model, "preprocess_cfg": {"mean": MEAN, "std": STD}}
    tower = build_clip(golden.id, config, text=False).visual.eval()
    table = state.pop("visual.mask_embedding")
    files.load_strict(tower, files.below(state, "visual."), source=golden.id)
    prompts = files.mask_prompts(table)

    images, masks = inputs["images"], inputs["region_masks"]
    close(golden, "features_plain", tower(images, TowerRequest(pooled=True)).pooled, 5e-5)
    close(golden, "patch_keep", patch_keep(masks, tower.stride), 0)
    close(golden, "features_masked", prompts(tower, images, masks), 5e-5)
    one = prompts(tower, images[:1], masks[:1])
    torch.testing.assert_close(one, golden.part("out")["features_masked"][:1], atol=5e-5, rtol=0)
    keep = patch_keep(masks, tower.stride)
    if not torch.equal(keep, patch_keep(1 - masks, tower.stride)):
        assert far(golden, "features_masked", prompts(tower, images, 1 - masks), 5e-5)
    if keep.all():  # no patch is replaced
        return
    assert far(golden, "features_masked", tower(images, TowerRequest(pooled=True)).pooled, 5e-5)
    if 1 < len(table) <= sizes["layers"]:  # a surplus beyond the tower's blocks has no effect
        shallow = files.mask_prompts(table[:-1])
        assert far(golden, "features_masked", shallow(tower, images, masks), 5e-5)


def text_templates(golden) -> TemplateSet:
    known = {"vild": "ovseg_14", "imagenet": "clip_80"}
    name = golden.config.get("templates", "vild")
    templates = golden.config["custom_templates"] if name == "predefined" else known[name]
    return replace(get(templates), names="verbatim")


@pytest.mark.golden(kind="ovseg_text")
@torch.no_grad()
def test_text(golden):
    clip, _ = files.load(golden)
    names, tokens = golden.config["class_names"], golden.part("in")["token_ids"]
    templates = text_templates(golden)
    assert len(templates) == golden.config["num_templates"]
    prompts = [templates.fill(name) for name in names]
    for row, expected in zip(prompts, tokens, strict=True):
        torch.testing.assert_close(clip.tokenize(row).to(expected), expected)
    close(golden, "first_template_raw", clip.encode_text(clip.tokenize([row[0] for row in prompts])), 1e-5)
    embed = TextBank(clip, templates, cache_dir=None).embed_names
    close(golden, "text_features", embed(names), 1e-5)
    assert far(golden, "text_features", embed([f"{name}s" for name in names]), 1e-5)


@pytest.mark.golden(kind="ovseg_adapter")
@torch.no_grad()
def test_adapter(golden):
    clip, prompts = files.load(golden, "clip_adapter.clip_model.")
    state, inputs, expected = golden.part("state"), golden.part("in"), golden.part("out")
    adapter = golden.config["adapter"]
    text = TextBank(clip, text_templates(golden), cache_dir=None).embed_names(golden.config["class_names"])
    background = F.normalize(state["clip_adapter.non_object_embedding"])
    text = torch.cat([text, background])
    close(golden, "text_features", text, 5e-5)
    prompts = prompts if adapter.get("mask_prompt_fwd", True) else None

    def run(prompts, rule):
        encoder = RegionEncoder(clip, rule, mask_prompts=prompts, batch_size=3)
        features, valid = encoder(inputs["image"], inputs["mask_probs"])
        return {
            "valid": valid,
            "image_features": F.normalize(features, dim=1),
            "clip_logits": cosine_logits(features, text),
        }

    rule = crop_rule(adapter)
    results = run(prompts, rule)
    close(golden, "valid", results["valid"], 0)
    close(golden, "clip_logits", results["clip_logits"], 5e-3)
    if "image_features" not in expected:
        assert not results["valid"].any()
        return
    close(golden, "image_features", results["image_features"], 5e-5)
    crops = crop_masks(inputs["image"], inputs["mask_probs"], rule, size=224, pixel_mean=MEAN, pixel_std=STD)
    keep = patch_keep(crops.region_masks(), clip.visual.stride)
    close(golden, "patch_keep", keep[crops.index], 0)
    if prompts is not None and not keep.all():
        assert far(golden, "image_features", run(None, rule)["image_features"], 5e-5)
        shared = MaskPrompts(len(prompts.prompts), 1, prompts.prompts.shape[2], std=0.0).eval()
        assert far(golden, "image_features", run(shared, rule)["image_features"], 5e-5)
    if unmasking_is_visible(crops, keep, clip.visual.stride, prompts is not None):
        unmasked = run(prompts, replace(rule, masked=False))
        assert far(golden, "image_features", unmasked["image_features"], 5e-5)


def unmasking_is_visible(crops, keep, stride, prompted) -> bool:
    """Return whether a patch that CLIP sees has pixels outside the mask, which the fill would replace."""
    outside = F.max_pool2d((crops.region_masks() <= 0).float(), stride).flatten(1) > 0
    return bool((outside & keep if prompted else outside).any())


@pytest.mark.golden(kind="ovseg_semantic")
def test_semantic(golden):
    inputs, config = golden.part("in"), golden.config
    masks = inputs["mask_logits"].sigmoid()

    def run(scoring):
        scores = scoring(inputs["pred_logits"], inputs["clip_logits"][:, :-1], inputs["valid"], None)
        return scores[:, :-1]

    scoring = files.ovseg_scoring(config)
    scores, size = run(scoring), tuple(config["output_hw"])
    close(golden, "sem_seg", semantic_map(scores, masks, masks.shape[1:]), 1e-5)
    resized = semantic_map(scores, masks, size)
    close(golden, "sem_seg_resized", resized, 1e-5)
    labels, top = semantic_labels(scores, masks, size)
    torch.testing.assert_close(top, resized.amax(0), atol=1e-6, rtol=0)
    assert (labels == resized.argmax(0)).float().mean() > 0.999
    if scoring.source == "ensemble":
        weight = 0.1 if config["clip_ensemble_weight"] > 0.5 else 0.9
        other = replace(scoring, settings=FusionSettings(weight, weight))
        assert far(golden, "sem_seg", semantic_map(run(other), masks, masks.shape[1:]), 1e-5)
        if not inputs["valid"].all():
            neutral = replace(scoring, empty="neutral")
            assert far(golden, "sem_seg", semantic_map(run(neutral), masks, masks.shape[1:]), 1e-5)
    else:
        other = files.other_source(scoring)
        assert far(golden, "sem_seg", semantic_map(run(other), masks, masks.shape[1:]), 1e-5)


@pytest.mark.golden(kind="ovseg_demo")
def test_demo(golden):
    inputs, names = golden.part("in"), golden.config["class_names"]
    inside = (inputs["mask_logits"].sigmoid() > golden.config["mask_thr"]).float()
    scores = Scoring("clip")(inputs["pred_logits"], inputs["clip_logits"][:, :-1], inputs["valid"], None)
    scores = scores[:, :-1]
    others = len(names) - 1 if len(names) == 2 and names[-1] == "others" else None
    chosen = best_masks(scores, others)
    size = inside.shape[1:]
    close(golden, "sem_seg", semantic_map(scores[chosen], inside[chosen], size), 1e-5)
    controls = [torch.ones_like(chosen)] + ([] if others is None else [best_masks(scores)])
    seen = (scores.amax(1) > 0) & inside.flatten(1).any(1)  # masks that change a map
    for control in controls:
        if ((control != chosen) & seen).any():
            assert far(golden, "sem_seg", semantic_map(scores[control], inside[control], size), 1e-5)
