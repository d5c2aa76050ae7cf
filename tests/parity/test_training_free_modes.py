"""Last-block modes: SCLIP, ClearCLIP, NACLIP, GEM, ProxyCLIP, ResCLIP, SC-CLIP and SFP."""

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from clipdense.clip.attention import calibration, correlate, gaussian_window, get_mode
from clipdense.clip.attention.outliers import above_quantile, attended_outliers, local_outlier_factor
from clipdense.clip.attention.residual import raw_feedback, semantic_feedback
from clipdense.clip.towers import TowerRequest
from clipdense.inference import class_probabilities, confident_labels, pamr
from clipdense.inference.patches import patch_modes
from tests.helpers.golden_towers import check_all, golden_tower, runs, wrong_names


def _mode(settings: dict, args: dict) -> tuple[str, dict]:
    """Mode and options of an entry of `args.outputs`."""
    assert settings["residual"] == settings["mlp"]
    if "last_n_layers" in settings:
        assert settings["mode"] == "qq"
        return "clearclip", {"full": settings["residual"], "last_layers": settings["last_n_layers"]}
    options = {"attention": settings["mode"], "full": settings["residual"]}
    return "correlation", options | (
        {"gaussian_std": args["gaussian_std"]} if "gauss" in settings["mode"] else {}
    )


@pytest.mark.golden(case="lastblock")
@torch.no_grad()
def test_last_block(golden, tmp_path):
    args, inputs = golden.args, golden.part("in")
    tower, results, wrong = golden_tower(golden, tmp_path / "a"), {}, {}
    for run in runs(golden):
        image = inputs[run]
        history = tower.history(image)
        for name, settings in args["outputs"].items():
            mode, options = _mode(settings, args)
            if f"{run}.{name}" in golden.part("out"):
                results[f"{run}.{name}"] = tower(image, TowerRequest(dense=mode, options=options)).dense
        if f"{run}.gauss_addition" in golden.part("out"):
            length = history.stream.x.shape[1]
            results[f"{run}.gauss_addition"] = gaussian_window(
                history.stream.grid, length, args["gaussian_std"]
            )
        if f"{run}.cls" in golden.part("out"):
            mode, options = _mode(next(iter(args["outputs"].values())), args)
            tokens = get_mode(mode)(history.block, history.stream, history=history, options=options).x
            results[f"{run}.cls"] = tower.project(tower.norm_tokens(tokens[:, 0]))
        for name in wrong_names(golden):
            if name.startswith(f"{run}."):
                wrong[name] = _wrong_last_block(
                    name.split(".", 1)[1], golden, tower, history, image, tmp_path
                )
    check_all(golden, results, wrong)
    _published_names(golden, tower, results)


def _wrong_last_block(rule, golden, tower, history, image, folder):
    block, stream, args = history.block, history.stream, golden.args
    if rule == "dense_mean_of_softmaxes":
        halves = correlate(block, stream, "qq+kk", full=False).x - block.out(torch.zeros_like(stream.x))
        x = stream.x + halves / 2 + block.out(torch.zeros_like(stream.x))
        return tower.joint_map(replace(stream, x=x + block.mlp(x)))
    if rule == "dense_exact_size_positions":
        other = golden_tower(golden, folder / "b")
        other.position_rule = "bicubic"
        mode, options = _mode(args["outputs"]["dense"], args)
        return other(image, TowerRequest(dense=mode, options=options)).dense
    if rule == "dense_kk_bare":
        return tower.joint_map(correlate(block, stream, "kk", full=False))
    if rule == "dense_qq_bare_without_class_token":
        return tower.joint_map(correlate(block, replace(stream, x=stream.patches), "qq", full=False))
    std = args["gaussian_std"]
    if rule == "dense_twice_the_std":
        return tower.joint_map(correlate(block, stream, "kk+gauss", full=False, gaussian_std=2 * std))
    assert rule == "dense_class_token_with_addition"
    window = gaussian_window(stream.grid, stream.x.shape[1], std)
    window[0] = window[:, 0] = 1
    return tower.joint_map(correlate(block, replace(stream, bias=window), "kk", full=False))


def _published_names(golden, tower, results) -> None:
    """The methods' own modes have the settings of their papers."""
    own = {
        "dense_qq+kk_residual": ("sclip", {}),
        "dense_qq_bare": ("clearclip", {}),
        "dense_kk+gauss_bare": ("naclip", {"gaussian_std": golden.args.get("gaussian_std")}),
    }
    image = golden.part("in")["image_0"]
    for name, (mode, options) in own.items():
        if f"image_0.{name}" in results:
            dense = tower(image, TowerRequest(dense=mode, options=options)).dense
            torch.testing.assert_close(dense, results[f"image_0.{name}"])


@pytest.mark.golden(case="gem")
@torch.no_grad()
def test_gem(golden, tmp_path):
    args, tower, results, wrong = golden.args, golden_tower(golden, tmp_path), {}, {}
    shared = {"blocks": args["gem_blocks"], "iterations": args["iterations"]}
    variants = {
        "dense_residual": {},
        "dense_bare": {"residual": False},
        "dense_residual_fixed_temperature": {"temperature": args["fixed_temperature"]},
    }
    for run in runs(golden):
        history = tower.history(golden.part("in")[run])
        for name, options in variants.items():
            results[f"{run}.{name}"] = tower.dense(history, "gem", options=shared | options)
        other = shared | {"iterations": args["iterations"] + 1}
        wrong[f"{run}.dense_residual_other_iterations"] = tower.dense(history, "gem", options=other)
        if args["iterations"] + 1 != 2:
            wrong.pop(f"{run}.dense_residual_other_iterations")
    if not wrong:  # which other count the file has is not in it: ours is another one, and must differ
        for run in runs(golden):
            history = tower.history(golden.part("in")[run])
            for count in range(args["iterations"] + 3):
                dense = tower.dense(history, "gem", options=shared | {"iterations": count})
                negative = golden.part("out")[f"NEG_{run}.dense_residual_other_iterations"]
                if torch.allclose(dense, negative, atol=golden.tolerance[0], rtol=golden.tolerance[1]):
                    wrong[f"{run}.dense_residual_other_iterations"] = dense
    check_all(golden, results, wrong)


@pytest.mark.golden(case="proxy")
@torch.no_grad()
def test_proxy(golden, tmp_path):
    args, inputs, tower = golden.args, golden.part("in"), golden_tower(golden, tmp_path)
    settings = {"beta": args["beta"], "gamma": args["gamma"], "shared_mean": True}
    results, wrong = {}, {}
    for run in runs(golden):
        image, features = inputs[run], inputs[run.replace("image", "feats")]

        def dense(image=image, features=features, **options):
            request = TowerRequest(dense="proxyclip", guidance=features, options=settings | options)
            return tower(image, request).dense

        results[f"{run}.dense"] = dense()
        for name in wrong_names(golden):
            if name == f"{run}.dense_beta_1":
                wrong[name] = dense(beta=1.0)
            elif name == f"{run}.dense_mean_per_image":
                wrong[name] = dense(shared_mean=False)
            elif name == f"{run}.dense_rows_and_columns_swapped":
                wrong[name] = _swapped(tower, image, features, settings)
    check_all(golden, results, wrong)


def _swapped(tower, image, features, settings):
    """The published code reads the token grid as (columns, rows)."""
    history = tower.history(image)
    h, w = history.stream.grid
    stream = replace(history.stream, grid=(w, h))
    mode = get_mode("proxyclip")
    return tower.joint_map(mode(history.block, stream, features, options=settings))


@pytest.mark.golden(case="resclip")
@torch.no_grad()
def test_resclip(golden, tmp_path):
    """Two passes: labels of the first one steer the second."""
    args, inputs, out = golden.args, golden.part("in"), golden.part("out")
    tower, results, wrong = golden_tower(golden, tmp_path), {}, {}
    published = {"whole_path": False, "std": args["gaussian_std"]}
    for run in runs(golden):
        image, queries = inputs[run], inputs[f"query_features_{run.rsplit('_', 1)[1]}"]
        history = tower.history(image)
        shared = {"blocks": tuple(args["rcs_blocks"]), "gaussian_std": args["gaussian_std"]}
        cross, semantic = tuple(args["rcs_weights"]), tuple(args["sfr_weights"])
        both = partial(_two_passes, tower, history, image, queries, args, shared)
        results[f"{run}.dense"], classes = both()
        results[f"{run}.patch_classes"] = classes
        raw = raw_feedback(classes, **published)
        results[f"{run}.feedback_attention"] = F.pad(raw, (1, 0, 1, 0))
        results[f"{run}.dense_clearclip"] = both("clearclip")[0]
        results[f"{run}.dense_sclip"] = both("sclip", full=True)[0]
        results[f"{run}.dense_same_class_everywhere"] = both(decay=False)[0]
        results[f"{run}.dense_without_cross_correlation"] = both(cross=None)[0]
        only_first = shared | {"cross": cross}
        results[f"{run}.dense_without_feedback"] = tower.dense(history, "rcs", options=only_first)
        wrong[f"{run}.dense_neither"] = tower.dense(history, "rcs", options=shared | {"cross": None})
        wrong[f"{run}.dense_swapped_weights"] = both(cross=semantic, semantic=cross)[0]
        # the published rounding and path test matter
        whole = semantic_feedback(classes, std=args["gaussian_std"])
        assert not torch.equal(whole, semantic_feedback(classes, half_precision=True, **published))
    check_all(golden, {k: v for k, v in results.items() if k in out}, wrong)


def _two_passes(
    tower, history, image, queries, args, shared, base="naclip", full=False, decay=True, **weights
):
    """The dense map of the second pass, and the classes of patches after the first."""
    weights = {"cross": tuple(args["rcs_weights"]), "semantic": tuple(args["sfr_weights"])} | weights
    options = shared | {"base": base, "full": full, "cross": weights["cross"]}
    classes = _patch_classes(tower.dense(history, "rcs", options=options), image, queries, args)
    feedback = semantic_feedback(
        classes, half_precision=True, decay=decay, whole_path=False, std=args["gaussian_std"]
    )
    options = options | {"semantic": weights["semantic"]}
    return tower.dense(history, "resclip", feedback, options), classes


def _patch_classes(dense, image, queries, args):
    logits = torch.einsum("bdhw,qd->bqhw", F.normalize(dense, dim=1), queries)
    logits = F.interpolate(logits, image.shape[-2:], mode="bilinear")
    dilations = tuple(args["feedback_pamr_dilations"])
    logits = pamr(image, logits, steps=args["feedback_pamr_steps"], dilations=dilations)[0]
    count = len(queries)
    scores = class_probabilities(logits, torch.arange(count), count, args["logit_scale"])
    return patch_modes(confident_labels(scores, args["temp_thd"]), args["patch_size"])


@pytest.mark.golden(case="scclip")
@torch.no_grad()
def test_scclip(golden, tmp_path, monkeypatch):
    args, tower, results, wrong = golden.args, golden_tower(golden, tmp_path), {}, {}
    options = {
        "beta": args["beta"],
        "class_weight": args["res_cls"],
        "neighbours": args["lof_neighbors"],
        "contamination": args["lof_contamination"],
        "levels": tuple(
            args[k] for k in ("pre_adjust_idx", "post_adjust_idx", "multi_start_idx", "multi_end_idx")
        ),
    }
    for run in runs(golden):
        history = tower.history(golden.part("in")[run])
        results[f"{run}.dense"] = tower.dense(history, "scclip", options=options)
        scores = local_outlier_factor(history.stream.patches, args["lof_neighbors"])
        results[f"{run}.outlier_scores"] = scores[0]
        marked = above_quantile(scores, args["lof_contamination"])[0]
        results[f"{run}.outliers"] = marked.nonzero()[:, 0]
        without = options | {"class_weight": 0.0}
        wrong[f"{run}.dense_without_class_token"] = tower.dense(history, "scclip", options=without)
        with monkeypatch.context() as patch:
            patch.setattr(calibration, "repair", lambda tokens, *args, **kwargs: tokens)
            wrong[f"{run}.dense_outliers_kept"] = tower.dense(history, "scclip", options=options)
    check_all(golden, results, wrong)


@pytest.mark.golden(case="sfp")
@torch.no_grad()
def test_sfp(golden, tmp_path, monkeypatch):
    args, tower, results, wrong = golden.args, golden_tower(golden, tmp_path), {}, {}
    last = args["layers"] - 2
    chosen = [args[k] for k in ("pre_adjust_idx", "post_adjust_idx", "multi_start_idx", "multi_end_idx")]
    # the published list of outputs has the last one twice, which matters to shorter towers only
    assert max(chosen[0], chosen[1], chosen[3] - 1) <= last
    options = {
        "beta": args["beta"],
        "class_weight": args["res_cls"],
        "outlier_scale": args["res_scale"],
        "max_outliers": args["max_outliers"],
        "levels": tuple(chosen),
    }
    for run in runs(golden):
        history = tower.history(golden.part("in")[run])
        results[f"{run}.dense"] = tower.dense(history, "sfp", options=options)
        weights = history.weights(last).mean(1)
        marked = attended_outliers(weights, 1, args["res_cls"] * args["res_scale"], args["max_outliers"])
        expected = golden.part("out")[f"{run}.outliers"]
        assert set(marked[0].nonzero()[:, 0].tolist()) == set(expected.tolist())
        results[f"{run}.outliers"] = expected
        with monkeypatch.context() as patch:
            patch.setattr(calibration, "repair", lambda tokens, *args, **kwargs: tokens)
            wrong[f"{run}.dense_outliers_kept"] = tower.dense(history, "sfp", options=options)
        # the published factor of the comparison is a multiple of this weight: no patch is an outlier then
        without = options | {"class_weight": 0.0}
        wrong[f"{run}.dense_without_class_token"] = tower.dense(history, "sfp", options=without)
    check_all(golden, results, wrong)
