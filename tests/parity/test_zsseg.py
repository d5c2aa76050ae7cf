"""zsseg (SimBaseline): its prompt learner, its crop classifier, its fusion."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from clipdense.checkpoint import load_strict
from clipdense.clip.prompts import AffixPrompts
from clipdense.clip.templates import TemplateSet, get
from clipdense.clip.text import TextBank
from clipdense.inference import semantic_map
from clipdense.regions import CROP_RULES, FusionSettings, RegionEncoder, cosine_logits, crop_masks
from clipdense.systems.two_stage import Scoring
from tests.helpers import two_stage_files as files
from tests.helpers.two_stage_files import MEAN, STD, close, far

TEMPLATE = TemplateSet("name and full stop", ("{}.",), names="verbatim")


@pytest.mark.golden(kind="zsseg_prompt_learner")
@torch.no_grad()
def test_prompt_learner(golden):
    clip, _ = files.load(golden, "clip_adapter.clip_model.")
    learner = files.below(golden.part("state"), "clip_adapter.prompt_learner.")
    n_prefix, n_suffix = golden.config["prompt_shape"]
    width = clip.text.width

    def run(prefix, suffix):
        prompts = AffixPrompts(len(prefix), len(suffix), width)
        load_strict(prompts, {"prefix": prefix, "suffix": suffix}, source=golden.id)
        bank = TextBank(clip, TEMPLATE, prompts=prompts.eval(), cache_dir=None)
        return bank.embed_names(golden.config["class_names"])

    prefix = learner.pop("prefix_prompt", torch.zeros(0, width))
    suffix = learner.pop("suffix_prompt", torch.zeros(0, width))
    assert (len(prefix), len(suffix)) == (n_prefix, n_suffix)

    # the stored tokens are those of the table, and the full stop ends the tower's own sentences
    names, inputs = golden.config["class_names"], golden.part("in")
    start, stop, end = clip.tokenize(["."])[0, :3].tolist()
    table = clip.text.token_embedding.weight
    for name, token in (("start", start), ("dot", stop), ("end", end), ("pad", 0)):
        torch.testing.assert_close(learner.pop(f"{name}_signal")[0], table[token], atol=0, rtol=0)
    assert not learner
    for row, name in zip(inputs["name_token_ids"].tolist(), names, strict=True):
        expected = [*row[: row.index(end)], stop, end]
        assert clip.tokenize(TEMPLATE.fill(name))[0, : len(expected)].tolist() == expected

    close(golden, "text_features", run(prefix, suffix), 1e-5)
    controls = {
        "reversed prefix": (n_prefix > 1, prefix.flip(0), suffix),
        "reversed suffix": (n_suffix > 1, prefix, suffix.flip(0)),
        "suffix before the name": (n_suffix > 0, torch.cat([prefix, suffix]), suffix[:0]),
        "prefix behind the name": (n_prefix > 0, prefix[:0], torch.cat([prefix, suffix])),
    }
    for name, (applies, *context) in controls.items():
        assert not applies or far(golden, "text_features", run(*context), 1e-5), name


@pytest.mark.golden(kind="zsseg_adapter")
@torch.no_grad()
def test_adapter(golden):
    clip, _ = files.load(golden, "clip_adapter.clip_model.")
    inputs, names = golden.part("in"), golden.config["class_names"]
    templates = replace(get("ovseg_14"), names="verbatim")
    text = TextBank(clip, templates, cache_dir=None).embed_names(names)
    text = torch.cat([text, F.normalize(golden.part("state")["clip_adapter.non_object_embedding"])])
    close(golden, "text_features", text, 5e-5)
    rule = replace(CROP_RULES["zsseg"], threshold=golden.config["mask_thr"])

    def logits(rule):
        features, valid = RegionEncoder(clip, rule)(inputs["image"], inputs["mask_probs"])
        close(golden, "valid", valid, 0)
        return cosine_logits(features, text)

    close(golden, "clip_logits", logits(rule), 5e-3)
    crops = crop_masks(inputs["image"], inputs["mask_probs"], rule, size=224, pixel_mean=MEAN, pixel_std=STD)
    if (crops.region_masks() == 0).any():
        assert far(golden, "clip_logits", logits(replace(rule, masked=False)), 5e-3)


@pytest.mark.golden(kind="zsseg_fusion")
def test_fusion(golden):
    inputs, weight = golden.part("in"), golden.config["clip_ensemble_weight"]
    flags = golden.config["trainable_flag"]
    base = None if flags is None else torch.tensor(flags, dtype=torch.bool)
    masks = inputs["mask_logits"].sigmoid()

    def run(scoring, base):
        scores = scoring(inputs["pred_logits"], inputs["clip_logits"][:, :-1], inputs["valid"], base)
        return semantic_map(scores[:, :-1], masks, masks.shape[1:])

    settings = FusionSettings(1 - weight, weight)
    scoring = Scoring("ensemble", "zsseg", settings, "boost") if weight else Scoring("clip")
    close(golden, "sem_seg", run(scoring, base), 1e-5)
    if weight:
        swapped = replace(scoring, settings=FusionSettings(weight, 1 - weight))
        if weight != 0.5:
            assert far(golden, "sem_seg", run(swapped, base), 1e-5)
        if not inputs["valid"].all():
            assert far(golden, "sem_seg", run(replace(scoring, empty="neutral"), base), 1e-5)
    else:
        assert far(golden, "sem_seg", run(Scoring("proposals"), base), 1e-5)
