"""ZegFormer: text with synonyms, crops of padded images, fusion with the mean over seen classes."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from clipdense.clip.text import TextBank
from clipdense.clip.vocabulary import Vocabulary
from clipdense.inference import semantic_labels, semantic_map
from clipdense.regions import CROP_RULES, CropRule, cosine_logits, crop_masks
from tests.helpers import two_stage_files as files
from tests.helpers.two_stage_files import MEAN, STD, close, far


@pytest.mark.golden(kind="zegformer_text")
@torch.no_grad()
def test_text(golden):
    clip, _ = files.load(golden)
    query = files.ZEGFORMER_TEMPLATES[golden.config["prompt_ensemble_type"]]
    for vocabulary, suffix in (("train_classes", ""), ("test_classes", "_test")):
        classes = Vocabulary.from_names(golden.config[vocabulary])
        for templates, branch in ((query, ""), ("zegformer_32", "_clip")):
            name = f"text_features{suffix}{branch}"
            close(golden, name, TextBank(clip, templates, cache_dir=None)(classes), 1e-5)
            if any("," in name_list for name_list in golden.config[vocabulary]):
                whole = Vocabulary.from_names(golden.config[vocabulary], separator=None)
                assert far(golden, name, TextBank(clip, templates, cache_dir=None)(whole), 1e-5)
            swapped = classes.names[::-1]
            swapped_text = TextBank(clip, templates, cache_dir=None)(Vocabulary.from_names(swapped))
            assert len(classes) == 1 or far(golden, name, swapped_text, 1e-5)


@pytest.mark.golden(kind="zegformer_fusion")
def test_fusion_and_crops(golden):
    config, inputs = golden.config, golden.part("in")
    base = torch.ones(config["num_classes"], dtype=torch.bool)
    base[config["unseen_ids"]] = False
    text, scale = inputs["clip_text_features"], inputs["clip_logit_scale"].exp()
    for b, output in enumerate(config["output_hw"]):
        image = inputs[f"image{b}"]
        logits = F.interpolate(inputs["pred_masks"], scale_factor=4, mode="bilinear", align_corners=False)[b]
        clip = cosine_logits(inputs["clip_image_features"][b], text, scale)
        valid = torch.ones(len(clip), dtype=torch.bool)
        masks = logits.sigmoid()[:, : image.shape[1], : image.shape[2]]

        def run(scoring, gamma, fuse=semantic_map, b=b, clip=clip, valid=valid, masks=masks, output=output):
            scores = scoring(inputs["pred_logits"][b], clip, valid, base)[:, :-1]
            return fuse(scores, masks, tuple(output), base=base, calibration=gamma)

        rule, gamma = files.zegformer_scoring(config), config["gzero_calibrate"]
        maps = run(rule, gamma)
        close(golden, f"sem_seg{b}", maps, 2e-5)
        labels, _ = run(rule, gamma, semantic_labels)
        assert (labels == maps.argmax(0)).float().mean() > 0.999
        if base.any():
            assert far(golden, f"sem_seg{b}", run(rule, 0.0 if gamma > 0 else 0.1), 2e-5)
        assert far(golden, f"sem_seg{b}", run(files.other_source(rule), gamma), 2e-5)
        if config.get("record_crops"):
            check_crops(golden, f"clip_input{b}", image, logits)


def check_crops(golden, name, image, logits):
    style = golden.config["clip_cls_style"]

    def run(rule):
        crops = crop_masks(image, logits, rule, size=224, pixel_mean=MEAN, pixel_std=STD)
        assert crops.valid.all()
        return crops.regions()[crops.index][..., ::2, ::2]

    rule = CROP_RULES[f"zegformer_{style}"]
    close(golden, name, run(rule), 1e-4)
    if not (logits > rule.threshold).all():
        assert far(golden, name, run(replace(rule, masked=not rule.masked)), 1e-4)
    assert far(golden, name, run(CropRule(threshold=0.0, keep_empty=True)), 1e-4)
