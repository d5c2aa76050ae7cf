"""Whole forwards of the training-free line: sliding windows, ProxyCLIP, Trident and CorrCLIP."""

import pytest
import torch
import torch.nn.functional as F
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from clipdense.clip.towers import TowerRequest
from clipdense.inference import (
    class_probabilities,
    confident_labels,
    pad_windows,
    pamr,
    slide_windows,
    suppress_small_classes,
    text_cosines,
    window_starts,
)
from clipdense.systems.training_free import corrclip
from clipdense.systems.training_free.corrclip import (
    corrclip_dense,
    correct_labels,
    merge_regions,
    region_attention,
)
from clipdense.systems.training_free.features import renormalize
from clipdense.systems.training_free.trident import sam_affinity, splice, trident_dense, window_tokens
from tests.helpers.golden_towers import check_all, golden_tower, neighbour, runs, wrong_names

MODES = {("qq+kk", True): "sclip", ("qq", False): "clearclip", ("kk+gauss", False): "naclip"}


def _resize(maps, size):
    return F.interpolate(maps, tuple(size), mode="bilinear", align_corners=False)


def _mode(args):
    assert args["residual"] == args["mlp"]
    options = {"gaussian_std": args["gaussian_std"]} if "gauss" in args["mode"] else {}
    return TowerRequest(dense=MODES[args["mode"], args["residual"]], options=options)


def _cosines(golden, tower, crops, padding=None):
    """Cosines of windows, padded to the file's multiple."""
    padding = golden.args["window_padding"] if padding is None else padding
    text = golden.part("in")["query_features"]

    def dense(images):
        return text_cosines(tower(images, _mode(golden.args)).dense, text)

    return pad_windows(dense, crops, padding or 1)


def _scores(golden, logits):
    args, classes = golden.args, golden.part("in")["query_idx"]
    scores = class_probabilities(logits[0], classes, int(classes.max()) + 1, args["logit_scale"])
    return suppress_small_classes(scores, args["area_thd"]) if args.get("area_thd") else scores


@pytest.mark.golden(case="slide")
@torch.no_grad()
def test_slide(golden, tmp_path):
    args, image = golden.args, golden.part("in")["image"]
    tower, size = golden_tower(golden, tmp_path), args["ori_shape"]
    dilations = tuple(args["pamr_dilations"])

    def logits(function, steps=args["pamr_steps"]):
        maps = _resize(slide_windows(function, image, args["crop"], args["stride"]), size)
        return pamr(_resize(image, size), maps, steps=steps, dilations=dilations) if steps else maps

    found = logits(lambda crops: _cosines(golden, tower, crops))
    scores = _scores(golden, found)
    crop = image[..., : args["crop"], : args["crop"]]
    window = _cosines(golden, tower, crop)
    results = {
        "logits": found,
        "class_scores": scores,
        "prediction": confident_labels(scores, args["prob_thd"]),
        "window_0_logits": _resize(window, crop.shape[-2:]),
    }

    def aligned(crops):
        maps = _cosines(golden, tower, crops)
        return F.interpolate(maps, crops.shape[-2:], mode="bilinear", align_corners=True)

    def corner(crops):
        multiple, (h, w) = args["window_padding"], crops.shape[-2:]
        padded = F.pad(crops, (0, -w % multiple, 0, -h % multiple))
        maps = _resize(_cosines(golden, tower, padded), padded.shape[-2:])
        return maps[..., :h, :w]

    rules = {
        "logits_align_corners": lambda: F.interpolate(
            slide_windows(aligned, image, args["crop"], args["stride"]), tuple(size), mode="bilinear"
        ),
        "logits_whole_image": lambda: _resize(_cosines(golden, tower, image), size),
        "logits_no_padding": lambda: logits(lambda crops: _cosines(golden, tower, crops, padding=1)),
        "logits_corner_padding": lambda: logits(corner),
        "logits_without_pamr": lambda: logits(lambda crops: _cosines(golden, tower, crops), steps=0),
    }
    wrong = {name: rules[name]() for name in wrong_names(golden)}
    if (name := "logits_align_corners") in wrong:
        wrong[name] = neighbour(golden, name, wrong[name])
    check_all(golden, {k: v for k, v in results.items() if k in golden.part("out")}, wrong)


@pytest.mark.golden(case="predict")
@torch.no_grad()
def test_predict(golden, tmp_path):
    """The whole image at once: two resizings, PAMR, and scores that sum to 1 after the labels are taken."""
    args, image = golden.args, golden.part("in")["image"]
    tower, size, variant = golden_tower(golden, tmp_path), args["ori_shape"], args["slide_variant"]

    def function(crops):
        return _cosines(golden, tower, crops)

    def output(scores):
        return scores / scores.sum(0) if args["renormalise"] else scores

    whole = _resize(_resize(function(image), image.shape[-2:]), size)
    refined = pamr(
        _resize(image, size), whole, steps=args["pamr_steps"], dilations=tuple(args["pamr_dilations"])
    )
    slid = _resize(slide_windows(function, image, variant["crop"], variant["stride"]), size)
    scores = _scores(golden, refined)
    slide_name = f"class_scores_slide_{variant['crop']}_{variant['stride']}_without_pamr"
    results = {
        "class_scores": output(scores),
        "class_scores_without_pamr": output(_scores(golden, whole)),
        slide_name: output(_scores(golden, slid)),
        "prediction": confident_labels(scores, args["prob_thd"]),
    }
    half = _scores(golden, refined / 2)
    check_all(golden, results, {"class_scores_half_logit_scale": output(half)})


@pytest.mark.golden(case="slide_proxy")
@torch.no_grad()
def test_slide_proxy(golden, tmp_path):
    args, inputs = golden.args, golden.part("in")
    tower, image, text = golden_tower(golden, tmp_path), inputs["image"], inputs["query_features"]
    seen = []

    def logits(beta):
        features = iter(inputs["window_feats"])

        def dense(crops):
            seen.append(crops)
            guidance = torch.stack([next(features) for _ in crops])
            options = {"beta": beta, "gamma": args["gamma"]}
            request = TowerRequest(dense="proxyclip", guidance=guidance, options=options)
            return text_cosines(tower(crops, request).dense, text)

        maps = slide_windows(
            lambda crops: pad_windows(dense, crops, args["window_padding"]),
            image,
            args["crop"],
            args["stride"],
        )
        return _resize(maps, args["ori_shape"])

    found = logits(args["beta"])
    scores = _scores(golden, found)
    clip, imagenet = (
        (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD),
        (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
    )
    results = {
        "logits": found,
        "class_scores": scores,
        "prediction": confident_labels(scores, args["prob_thd"]),
        "window_0_dino_input": renormalize(seen[0][:1], clip, imagenet)[..., :16, :16],
    }
    check_all(golden, results, {"logits_beta_1": logits(1.0)})


@pytest.mark.golden(case="trident")
@torch.no_grad()
def test_trident(golden, tmp_path):
    args, inputs = golden.args, golden.part("in")
    tower, results, wrong = golden_tower(golden, tmp_path), {}, {}
    p = args["patch_size"]
    for run in runs(golden, "case"):
        case = args["cases"][int(run.rsplit("_", 1)[1])]
        image, (height, width) = inputs[f"{run}.image"], case["image_hw"]
        crop, stride = case["crop"], case["stride"]
        starts = [
            (y, x) for y in window_starts(height, crop, stride) for x in window_starts(width, crop, stride)
        ]
        crops = torch.cat([image[..., y : y + crop, x : x + crop] for y, x in starts])
        features = inputs[f"{run}.window_feats"]
        tokens = window_tokens(tower, crops, features, beta=args["beta"], gamma=args["gamma"])
        places = [(y // p, x // p) for y, x in starts]
        side = crop // p
        results[f"{run}.proxy_out"] = tokens
        results[f"{run}.windows_locations"] = torch.tensor([(y, x, y + side, x + side) for y, x in places])

        def dense(tokens, factor, run=run, case=case, places=places, side=side):
            canvas = splice(tokens, places, (side, side), tuple(n // p for n in case["image_hw"]))
            affinities, grids = [], []
            for half in ("_left", "_right") if case["halves"] else ("",):
                v = inputs[f"{run}.sam_v{half}"][0]
                grids.append(tuple(v.shape[1:3]))
                attention = inputs[f"{run}.sam_attn{half}"][0]
                keep = case["refine_neg_cos"]
                affinities.append(sam_affinity(attention, v.flatten(1, 2), factor=factor, keep_negative=keep))
            result = trident_dense(tower, canvas, affinities, grids)
            assert list(result.shape[2:]) == case["sam_grid"]
            return result, affinities[0]

        results[f"{run}.dense"], affinity = dense(tokens, case["cos_fac"])
        if f"{run}.sam_affinity" in golden.part("out"):
            results[f"{run}.sam_affinity"] = affinity
        alone = torch.cat(
            [
                window_tokens(
                    tower, crops[i : i + 1], features[i : i + 1], beta=args["beta"], gamma=args["gamma"]
                )
                for i in range(len(crops))
            ]
        )
        wrong[f"{run}.dense_mean_per_window"] = dense(alone, case["cos_fac"])[0]
        negative = golden.part("out")[f"NEG_{run}.dense_other_cos_fac"]
        others = [dense(tokens, factor)[0] for factor in (0.0, 0.5, 0.6, 1.0, 1.2, 1.5, 2.0, 2.4, 3.0)]
        atol, rtol = golden.tolerance
        close = [d for d in others if torch.allclose(d, negative, atol=atol, rtol=rtol)]
        wrong[f"{run}.dense_other_cos_fac"] = close[0] if close else negative
    check_all(golden, results, {k: v for k, v in wrong.items() if k in wrong_names(golden)})


def _corrclip_settings(args):
    return {
        "spatial": args["alpha"],
        "semantic": args["beta"],
        "temperature": args["tau"],
        "distance": args["eps"],
        "num_spatial": args["num_spatial"],
    }


@pytest.mark.golden(case="corrclip")
@torch.no_grad()
def test_corrclip(golden, tmp_path):
    args, inputs = golden.args, golden.part("in")
    tower, settings, results, wrong = golden_tower(golden, tmp_path), _corrclip_settings(args), {}, {}
    assert args["min_samples"] == 1
    for run in runs(golden, "case"):
        grid = tuple(args["cases"][int(run.rsplit("_", 1)[1])]["feature_grid"])
        flat, regions = inputs[f"{run}.dino_feats"], inputs[f"{run}.regions"].long()
        features = flat.transpose(1, 2).reshape(1, -1, *grid)

        def dense(run=run, features=features, regions=regions, **switches):
            return corrclip_dense(tower, inputs[f"{run}.image"], features, regions, **settings, **switches)

        results[f"{run}.dense"] = dense()
        merged = merge_regions(corrclip._nearest(regions, grid), flat[0], distance=args["eps"])
        results[f"{run}.attention"] = region_attention(flat[0], merged.flatten(), temperature=args["tau"])
        wrong[f"{run}.dense_without_merging"] = dense(merge=False)
        name = f"{run}.dense_without_regions"
        if name in wrong_names(golden):
            wrong[name] = neighbour(golden, name, dense(restrict=False))
    check_all(golden, results, {k: v for k, v in wrong.items() if k in wrong_names(golden)})


@pytest.mark.golden(case="slide_corrclip")
@torch.no_grad()
def test_slide_corrclip(golden, tmp_path):
    """Regions travel through the windows as a fourth channel of the image."""
    args, inputs = golden.args, golden.part("in")
    tower, settings = golden_tower(golden, tmp_path), _corrclip_settings(args)
    image, text, padding = inputs["image"], inputs["query_features"], args["region_padding_id"]
    assert padding == corrclip.PADDING_REGION
    ids = F.interpolate(inputs["regions"][None, None].float(), image.shape[-2:], mode="nearest")
    grid = tuple(args["feature_grid"])

    def logits(**switches):
        qk = iter(inputs["window_q"] + inputs["window_k"])

        def dense(stacked):
            maps = []
            for window in stacked:
                features = next(qk)[1:].T.reshape(1, -1, *grid)
                regions = (window[3] + padding).round().long()
                maps.append(
                    corrclip_dense(tower, window[None, :3], features, regions, **settings, **switches)
                )
            return text_cosines(torch.cat(maps), text)

        # zeros pad the ids of regions, too: shifted by the padding's own id
        stacked = torch.cat([image, ids - padding], 1)
        maps = slide_windows(
            lambda crops: pad_windows(dense, crops, args["window_padding"]),
            stacked,
            args["crop"],
            args["stride"],
        )
        return _resize(maps, args["ori_shape"])

    found = logits()
    scores = _scores(golden, found)
    labels = confident_labels(scores, args["prob_thd"])
    results = {
        "logits": found,
        "class_scores": scores,
        "prediction": correct_labels(labels, inputs["regions"].long()),
    }
    name = "logits_without_regions"
    wrong = {name: neighbour(golden, name, logits(restrict=False)), "prediction_uncorrected": labels}
    check_all(golden, results, wrong)
