"""dino.txt and Talk2DINO: heads, text sides and dense inference over given backbone tokens."""

import pytest
import torch
import torch.nn.functional as F

from clipdense.clip.dinotxt import build_dinotxt, patch_text, stretch_to_patches
from clipdense.clip.talk2dino import (
    TextProjection,
    class_token_logits,
    clean_background,
    head_embeddings,
    pair_similarity,
    soft_masks,
    talk2dino_loss,
)
from clipdense.clip.towers.base import to_map
from clipdense.inference import slide_windows, text_cosines
from tests.helpers.golden_towers import check_all, neighbour, wrong_names


@pytest.mark.golden(case="dinotxt")
@torch.no_grad()
def test_dinotxt(golden):
    args, inputs, state = golden.args, golden.part("in"), golden.part("state")
    parts = build_dinotxt(state, heads=args["vision_heads"], text_heads=args["text_heads"])
    head, prefix, results, wrong = parts.head, 1 + args["registers"], {}, {}
    for i, grid in enumerate(args["grids"]):
        tokens = inputs[f"tokens_{i}"]
        y = head(tokens)
        run = f"tokens_{i}"
        results[f"{run}.class_token"] = y[:, 0]
        results[f"{run}.patch_map"] = to_map(y[:, prefix:], tuple(grid))
        results[f"{run}.image_features"] = head.image_features(y, prefix)
        wrong[f"{run}.patch_map_without_blocks"] = to_map(head.ln_final(tokens)[:, prefix:], tuple(grid))
        bare = head(torch.cat([tokens[:, :1], tokens[:, prefix:]], 1))
        wrong[f"{run}.patch_map_without_registers"] = to_map(bare[:, 1:], tuple(grid))
    text = parts.text(inputs["token_ids"])
    results["text_features"] = text
    image = F.normalize(results["tokens_0.image_features"], dim=1)
    results["image_text_logits"] = parts.logit_scale.exp() * image @ F.normalize(text, dim=1).T
    per_class = text.reshape(args["classes"], args["templates"], -1)
    results["seg_classifier"] = patch_text(per_class)
    wrong["seg_classifier_first_half"] = patch_text(per_class.roll(per_class.shape[2] // 2, 2))
    if args["segmentation"]:
        _segment(golden, head, results, wrong)
    outputs = golden.part("out")
    check_all(golden, {k: v for k, v in results.items() if k in outputs}, wrong)


def _segment(golden, head, results, wrong) -> None:
    settings, inputs, text = golden.args["segmentation"], golden.part("in"), results["seg_classifier"]
    p, prefix = golden.args["patch_size"], inputs["seg_prefix_tokens"]
    image = inputs["seg_image"][None]

    def cosines(images, with_head=True):
        images = stretch_to_patches(images, p)
        patches = F.unfold(images, p, stride=p).transpose(1, 2) @ inputs["seg_patch_embedding"].T
        tokens = torch.cat([prefix.expand(len(images), -1, -1), patches], 1)
        tokens = (head(tokens) if with_head else tokens)[:, len(prefix) :]
        return text_cosines(to_map(tokens, (images.shape[2] // p, images.shape[3] // p)), text)

    def slide(with_head):
        def function(crops):
            maps = F.interpolate(cosines(crops, with_head), crops.shape[-2:], mode="bilinear")
            return maps.softmax(1)

        return slide_windows(function, image, settings["side"], settings["stride"])[0]

    results["seg_slide"], results["seg_slide_published"] = slide(True), slide(False)
    size = tuple(settings["out_hw"])
    results["seg_slide_resized"] = F.interpolate(results["seg_slide"][None], size, mode="bilinear")[0]
    results["seg_whole_lowres"] = cosines(image)[0]
    name = "seg_slide_resized_whole"
    if name in wrong_names(golden):
        wrong[name] = golden.part("out")[f"NEG_{name}"]
        whole = F.interpolate(cosines(image), size, mode="bilinear")[0].softmax(0)
        assert golden.differs("seg_slide_resized", whole)


@pytest.mark.golden(case="talk2dino")
@torch.no_grad()
def test_talk2dino(golden):
    args, inputs, state = golden.args, golden.part("in"), golden.part("state")
    assert args["activation"] == "tanh"
    projection = TextProjection.from_state(state)
    older = {k.replace("hidden_layers.0.", "linear_layer2."): v for k, v in state.items()}
    templates, features = inputs["text_template_features"], inputs["patch_features"]
    results = {"text_projected": projection(templates.mean(1))}
    text = results["text_embedding"] = projection.embed_classes(templates)
    assert torch.equal(TextProjection.from_state(older).embed_classes(templates), text)
    logits = class_token_logits(
        inputs["qkv_last_block"], args["dino_heads"], args["prefix_tokens"], args["scale"]
    )
    cosines, masks = soft_masks(features, text)
    clean = clean_background(masks, logits, features, text, args["lambda_bg"])
    size = tuple(args["out_hw"])
    resized = F.interpolate(clean, size, mode="bilinear", align_corners=True)
    plane = torch.full((1, 1, *size), args["bg_thresh"])
    results |= {
        "class_token_logits": logits,
        "cosines": cosines,
        "soft_masks": masks,
        "soft_masks_background_clean": clean,
        "masks_resized": resized,
        "prediction_with_background": torch.cat([plane, resized], 1)[0].argmax(0),
    }
    captions = projection(inputs["train_caption_features"])
    attention = class_token_logits(
        inputs["train_qkv"], args["dino_heads"], args["prefix_tokens"], args["scale"]
    )
    heads = results["train_head_embeddings"] = head_embeddings(attention, inputs["train_patch_features"])
    similarity = results["train_similarity"] = pair_similarity(captions, heads)
    results["train_loss"] = talk2dino_loss(similarity, args["loss_scale"])
    wrong = {
        "masks_resized_align_corners_false": F.interpolate(clean, size, mode="bilinear"),
        "soft_masks_background_clean_lambda_1": clean_background(masks, logits, features, text, 1.0),
        "text_projected_normalised_first": neighbour(
            golden, "text_projected_normalised_first", projection(F.normalize(templates, dim=-1).mean(1))
        ),
        "train_similarity_weighted_avg": golden.part("out")["NEG_train_similarity_weighted_avg"],
    }
    check_all(golden, results, {k: v for k, v in wrong.items() if k in wrong_names(golden)})
