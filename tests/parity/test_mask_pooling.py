"""FC-CLIP's and ODISE's classifiers, ensembles and losses on given tensors."""

import math

import pytest
import torch
from torch import nn

from clipdense.clip.layouts import OPENAI_CLIP, config_from_tensors
from clipdense.clip.model import build_clip
from clipdense.clip.vocabulary import Vocabulary
from clipdense.inference import MergeSettings, merge_queries
from clipdense.maskformer import MaskPrediction
from clipdense.regions import LazyMaps
from clipdense.systems.mask_pooling.ensemble import Ensemble
from clipdense.systems.mask_pooling.grounding import grounding_loss
from clipdense.systems.mask_pooling.pooling import pool_logits, region_masks
from clipdense.systems.mask_pooling.queries import PooledQueryHead, SynonymClassifier, max_logits
from clipdense.systems.mask_pooling.region_heads import embed_token_regions

FUSED_EPS = 1e-8
"""Added to the fused probabilities before their recorded logarithm."""


def close(golden, name, value, atol=1e-5):
    try:
        torch.testing.assert_close(value, golden.part("out")[name], atol=atol, rtol=0)
    except AssertionError as e:
        raise AssertionError(f"{golden.id} {name}: {e}") from None


def far(golden, name, value, atol=1e-5):
    expected = golden.part("out")[name]
    assert value.shape == expected.shape
    return not torch.allclose(value, expected, atol=atol, rtol=0)


def classes_of(counts):
    return torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))


def fcclip_classifier(golden, log_scale):
    void = golden.part("state")["void_embedding.weight"]
    classifier = SynonymClassifier(void.shape[1])
    classifier.void = nn.Parameter(void)
    classifier.logit_scale = nn.Parameter(torch.tensor(log_scale))
    return classifier


def check_outputs(golden, prefix, scores, mask_logits, image, size, atol=1e-5):
    """Compare the merged outputs of one image with those of FC-CLIP; instances are a set."""
    c, out = golden.config, golden.part("out")
    settings = MergeSettings(
        panoptic_on=True,
        instance_on=True,
        object_mask_threshold=c["test"]["obj"],
        overlap_threshold=c["test"]["overlap"],
        pixel_threshold=0.5,
        topk=c["test"]["topk"],
        resize_masks_first=True,
    )
    close(golden, f"{prefix}.fused_class_logits", (scores + FUSED_EPS).log(), atol)
    masks = LazyMaps.of(mask_logits)
    close(golden, f"{prefix}.mask_logits_at_output_size", masks.crop(image).resize(size).compute(), atol)
    merged = merge_queries(
        scores, masks, settings, image_size=image, output_size=size, things=c["test_things"]
    )
    close(golden, f"{prefix}.sem_seg", merged["sem_seg"], atol)
    ids, segments = merged["panoptic_seg"]
    assert torch.equal(ids, out[f"{prefix}.panoptic_seg"])
    rows = [[s["id"], int(s["isthing"]), s["category_id"]] for s in segments]
    assert rows == out[f"{prefix}.panoptic_rows_id_isthing_category"].tolist()
    check_instances(golden, prefix, merged["instances"], atol)


def check_instances(golden, prefix, instances, atol):
    out = golden.part("out")
    scores, classes = out[f"{prefix}.inst_scores"], out[f"{prefix}.inst_classes"]
    masks = out[f"{prefix}.inst_masks"].bool()
    assert len(instances) == len(scores)
    left = list(range(len(scores)))
    for score, label, mask in zip(
        instances.scores, instances.pred_classes, instances.pred_masks, strict=True
    ):
        same = [
            i
            for i in left
            if classes[i] == label and abs(scores[i] - score) <= atol and torch.equal(masks[i], mask)
        ]
        assert same, f"{golden.id}: {prefix} has no instance of class {label} with score {score}"
        left.remove(same[0])


@pytest.mark.golden(name="fcclip_ensemble_inference*")
@torch.no_grad()
def test_fcclip_classifier(golden):
    c, given, out = golden.config, golden.part("in"), golden.part("out")
    classes, rows = classes_of(c["test_num_synonyms"]), given["text_classifier_per_synonym"]
    close(golden, "pooled_mask_features", pool_logits(given["mask_features"], given["pred_masks"]))
    size = given["clip_vis_dense"].shape[-2:]
    small = nn.functional.interpolate(given["pred_masks"], size, mode="bilinear", align_corners=False)
    close(golden, "pooled_mask_features_from_lowres_masks", pool_logits(given["mask_features"], small))
    dense = pool_logits(given["clip_vis_dense"], given["pred_masks"])
    filled = region_masks(given["pred_masks"], size).flatten(2).any(2)
    torch.testing.assert_close(dense[filled], out["pooled_clip_dense"][filled], atol=1e-5, rtol=0)
    classifier = fcclip_classifier(golden, c["in_logit_scale_log"])
    logits = classifier(given["class_embed"], rows, classes)
    close(golden, "in_vocab_logits_from_class_embed", logits)
    clamped = fcclip_classifier(golden, 2 * math.log(100))
    logits = clamped(given["class_embed"], rows, classes)
    close(golden, "in_vocab_logits_scale_clamped_100", logits, 2e-5)
    if len(classes) > len(c["test_num_synonyms"]):  # negative control: the mean over synonyms
        cosines = nn.functional.normalize(given["class_embed"], dim=-1) @ rows.T * classifier.scale
        mean = torch.stack([cosines[..., classes == k].mean(-1) for k in range(classes[-1] + 1)], -1)
        assert not torch.allclose(mean, out["in_vocab_logits_from_class_embed"][..., :-1], atol=1e-5)


def out_of_vocabulary(golden):
    """The recording's second classifier: its projection stands in for the tower's head."""
    given, state = golden.part("in"), golden.part("state")
    pooled = golden.part("out")["pooled_clip_dense"]
    projection = (state["backbone.proj.weight"], state["backbone.proj.bias"])
    classifier = fcclip_classifier(golden, state["backbone.clip_model.logit_scale"].item())
    embeddings = nn.functional.linear(pooled, *projection)
    return classifier(
        embeddings, given["text_classifier_per_synonym"], classes_of(golden.config["test_num_synonyms"])
    )


@pytest.mark.golden(name="fcclip_ensemble_inference*")
@torch.no_grad()
def test_fcclip_ensemble_and_outputs(golden):
    c, given, out = golden.config, golden.part("in"), golden.part("out")
    second = out_of_vocabulary(golden)
    close(golden, "out_vocab_logits_with_void", second)
    valid = region_masks(given["pred_masks"], given["clip_vis_dense"].shape[-2:]).flatten(2).any(2)
    base = torch.tensor(c["category_overlapping_mask"]).bool()
    padded = nn.functional.interpolate(
        given["pred_masks"], tuple(c["pad_hw"]), mode="bilinear", align_corners=False
    )
    rules = {
        "valid_mask_off": Ensemble(c["alpha"], c["beta"], empty="pooled"),
        "valid_mask_on": Ensemble(c["alpha"], c["beta"]),
    }
    recorded = [name for name in rules if f"{name}.img0.fused_class_logits" in out]
    assert recorded
    for name in recorded:
        for b, (image, size) in enumerate(zip(c["images"], c["out_hw"], strict=True)):
            logits = given["pred_logits_with_void"][b], second[b, :, :-1], valid[b], base
            check_outputs(
                golden, f"{name}.img{b}", rules[name](*logits), padded[b], tuple(image), tuple(size)
            )
            swapped = Ensemble(c["beta"], c["alpha"], empty=rules[name].empty)(*logits)
            assert c["alpha"] == c["beta"] or far(
                golden, f"{name}.img{b}.fused_class_logits", (swapped + FUSED_EPS).log()
            )


def odise_head(golden):
    """ODISE's query head and classifier with the recorded weights."""
    c, state = golden.config, golden.part("state")
    mask_dim = golden.part("in")["mask_features"].shape[1]
    layers = len({k for k in state if k.startswith("post_mask_embed.mask_embed.1.layers.") and "bias" in k})
    head = PooledQueryHead(c["hidden"], mask_dim, c["proj"], num_layers=layers, norm=True)
    names = {"pool_proj.": "pool_proj.", "mask_embed.0.": "norm.", "mask_embed.1.": "mlp."}
    head.load_state_dict(
        {
            ours + key.removeprefix(f"post_mask_embed.{theirs}"): value
            for theirs, ours in names.items()
            for key, value in state.items()
            if key.startswith(f"post_mask_embed.{theirs}")
        }
    )
    classifier = SynonymClassifier(c["D"], project_to=c["proj"])
    classifier.load_state_dict(
        {
            "void": state["null_embed"],
            "logit_scale": state["post_mask_embed.logit_scale"],
            "text_proj.weight": state["text_proj.weight"],
            "text_proj.bias": state["text_proj.bias"],
        }
    )
    return head, classifier


@pytest.mark.golden(name="odise_category_logits*")
@torch.no_grad()
def test_odise_category_logits(golden):
    c, given = golden.config, golden.part("in")
    head, classifier = odise_head(golden)
    arguments = given["decoder_output"], given["pred_masks"], given["mask_features"]
    close(golden, "pooled_plus_decoder", head.fuse(*arguments))
    prediction = head(*arguments)
    assert isinstance(prediction, MaskPrediction) and prediction.class_logits is None
    close(golden, "mask_embed", prediction.query_embeddings)
    close(golden, "logit_scale_exp_capped", classifier.scale)
    logits = classifier(
        prediction.query_embeddings, given["text_embed_per_synonym"], classes_of(c["synonyms"])
    )
    close(golden, "class_logits_null_last", logits)
    merge = Ensemble(source="out_of_vocabulary")
    valid = torch.ones(logits.shape[1], dtype=torch.bool)
    merged = torch.stack(
        [merge(a, b, valid, None) for a, b in zip(logits, given["open_logits"], strict=True)]
    )
    close(golden, "merged_log_probs_null_last", (merged + FUSED_EPS).log())
    classifier.text_proj.bias.zero_()  # negative control: the text's projection without its bias
    wrong = classifier(
        prediction.query_embeddings, given["text_embed_per_synonym"], classes_of(c["synonyms"])
    )
    assert far(golden, "class_logits_null_last", wrong)


@pytest.mark.golden(name="odise_caption_grounding_loss*")
def test_odise_grounding_loss(golden):
    c, given = golden.config, golden.part("in")
    queries = given["mask_embed"].clone().requires_grad_()
    words = given["word_embed"].clone().requires_grad_()
    valid = given["word_valid_mask"].any(1)
    loss = grounding_loss(queries, words, valid, given["logit_scale"], c["loss_weight"])
    close(golden, "loss_mask_word", loss.detach())
    loss.backward()
    close(golden, "grad/mask_embed", queries.grad)
    close(golden, "grad/word_embed", words.grad)
    # negative control: captions of other images
    shifted = grounding_loss(queries, words.roll(1, 0), valid.roll(1), given["logit_scale"], c["loss_weight"])
    assert far(golden, "loss_mask_word", shifted.detach())


@pytest.mark.golden(name="odise_pooling_clip_head*")
@torch.no_grad()
def test_odise_mask_tokens(golden):
    c, given = golden.config, golden.part("in")
    prefix = "clip_head.clip.clip."
    state = OPENAI_CLIP.convert(
        {k.removeprefix(prefix): v for k, v in golden.part("state").items() if k.startswith(prefix)}
    )
    config = config_from_tensors(state, head_width=64, text_heads=c["text"]["heads"]) | {"quick_gelu": True}
    statistics = {"mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.26130258, 0.27577711]}
    clip = build_clip(golden.id, {"model_cfg": config, "preprocess_cfg": statistics}).eval()
    clip.load_state_dict(state)
    text = clip.encode_text(given["text_tokens_first_template"])
    close(golden, "text_embed_per_synonym", text)
    regions = embed_token_regions(clip, given["images_0_1"] * 255, given["pred_masks"])
    close(golden, "mask_embed", regions.embeddings)
    counts = [len(names) for names in c["test_labels"]]
    cosines = nn.functional.normalize(regions.embeddings, dim=-1) @ nn.functional.normalize(text, dim=-1).T
    logits = max_logits(cosines * clip.logit_scale.exp().clamp(max=100), classes_of(counts))
    close(golden, "mask_pred_open_logits", logits, 1e-4)
    train, test = (Vocabulary.from_names(c[f"{split}_labels"]) for split in ("train", "test"))
    base = torch.tensor(test.with_base_from(train).base)
    everywhere = torch.ones(c["Q"], dtype=torch.bool)
    for preset, alpha, beta in c["presets"]:
        for rule in ("probability", "logit"):
            name = f"ensembled.{preset}.{'prob' if rule == 'probability' else 'logit'}_mode"
            pairs = list(
                zip(given["pred_open_logits"], golden.part("out")["mask_pred_open_logits"], strict=True)
            )
            fuse = Ensemble(alpha, beta, rule).fuse
            close(golden, name, torch.stack([fuse(p, q, everywhere, base) for p, q in pairs]))
            swapped = Ensemble(beta, alpha, rule).fuse
            assert far(golden, name, torch.stack([swapped(p, q, everywhere, base) for p, q in pairs]))
    # negative control: masks that a majority of a patch's pixels decides
    wrong = embed_token_regions(clip, given["images_0_1"] * 255, given["pred_masks"], "fcclip")
    assert far(golden, "mask_embed", wrong.embeddings)
