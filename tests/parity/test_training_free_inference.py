"""Post-processing of the training-free line: PAMR, class scores, propagation, refinement by SAM, text."""

import pytest
import torch
import torch.nn.functional as F

from clipdense.clip import load_clip
from clipdense.clip.text import TextBank
from clipdense.clip.vocabulary import Vocabulary
from clipdense.inference import (
    PixelGraph,
    RefineSettings,
    class_probabilities,
    confident_labels,
    pamr,
    patch_graph,
    patch_positions,
    propagate_patches,
    propagate_pixels,
    refine_by_prompts,
    slide_windows,
    suppress_small_classes,
    window_starts,
)
from clipdense.inference.propagation import ALPHA
from tests.helpers.golden_towers import check_all, neighbour, runs, wrong_names


@pytest.mark.golden(case="pamr")
def test_pamr(golden):
    inputs, results, wrong = golden.part("in"), {}, {}
    for run in runs(golden, "case"):
        case = golden.args["cases"][int(run.rsplit("_", 1)[1])]
        image, mask = inputs[f"{run}.image"], inputs[f"{run}.mask"]
        steps, dilations = case["steps"], tuple(case["dilations"])
        results[f"{run}.refined"] = pamr(image, mask, steps=steps, dilations=dilations)
        for name in wrong_names(golden):
            rule = name.removeprefix(f"{run}.refined_")
            if rule == "one_step_more":
                wrong[name] = pamr(image, mask, steps=steps + 1, dilations=dilations)
            elif rule == "align_corners_false":
                resized = F.interpolate(mask, image.shape[-2:], mode="bilinear")
                wrong[name] = pamr(image, resized, steps=steps, dilations=dilations)
            elif rule == "std_per_dilation":
                wrong[name] = neighbour(golden, name, _std_per_dilation(image, mask, steps, dilations))
    check_all(golden, results, wrong)


def _std_per_dilation(image, mask, steps, dilations):
    """The neighbouring rule: a standard deviation for each distance."""

    def neighbours(maps, d):
        height, width = maps.shape[-2:]
        padded = F.pad(maps, (d, d, d, d), mode="replicate")
        places = [(y, x) for y in (0, d, 2 * d) for x in (0, d, 2 * d)]
        return torch.stack([padded[..., y : y + height, x : x + width] for y, x in places])

    logits = []
    for d in dilations:
        around = neighbours(image, d)
        sigma = around.std(0)
        others = torch.cat([around[:4], around[5:]])
        logits.append(-((image - others).abs() / (1e-8 + 0.1 * sigma)).mean(2))
    weights = torch.cat(logits).softmax(0)
    mask = F.interpolate(mask, image.shape[-2:], mode="bilinear", align_corners=True)
    for _ in range(steps):
        around = torch.cat([torch.cat([n[:4], n[5:]]) for n in (neighbours(mask, d) for d in dilations)])
        mask = (weights[:, :, None] * around).sum(0)
    return mask


def _scores(logits, classes, case, *, area=True, scale=1.0):
    count = int(classes.max()) + 1
    scores = class_probabilities(logits, classes, count, case["logit_scale"] * scale)
    return suppress_small_classes(scores, case["area_thd"]) if area and case["area_thd"] else scores


@pytest.mark.golden(case="postprocess")
def test_postprocess(golden):
    inputs, results, wrong = golden.part("in"), {}, {}
    for run in runs(golden, "case"):
        case = golden.args["cases"][int(run.rsplit("_", 1)[1])]
        logits, classes = inputs[f"{run}.logits"], inputs[f"{run}.query_idx"]

        def output(scores):
            return scores / scores.sum(0) if golden.args["renormalise"] else scores

        scores = _scores(logits, classes, case)
        results[f"{run}.class_scores"] = output(scores)
        results[f"{run}.prediction"] = confident_labels(scores, case["prob_thd"])
        no_area = _scores(logits, classes, case, area=False)
        rules = {
            "class_scores_half_scale": lambda c=case, a=logits, b=classes: output(
                _scores(a, b, c, scale=0.5)
            ),
            "class_scores_softmax_after_max": lambda c=case, a=logits, b=classes: _softmax_after_max(a, b, c),
            "class_scores_without_area_rule": lambda s=no_area: s,
            "prediction_without_area_rule": lambda s=no_area, c=case: confident_labels(s, c["prob_thd"]),
            "prediction_without_threshold": lambda s=scores: confident_labels(s, 0),
        }
        for name in wrong_names(golden):
            if name.startswith(f"{run}."):
                found = rules[name.split(".", 1)[1]]()
                wrong[name] = neighbour(golden, name, found) if "after_max" in name else found
    check_all(golden, results, wrong)


def _softmax_after_max(logits, classes, case):
    count = int(classes.max()) + 1
    best = torch.stack([logits[classes == c].amax(0) for c in range(count)])
    scores = (case["logit_scale"] * best).softmax(0)
    return suppress_small_classes(scores, case["area_thd"]) if case["area_thd"] else scores


@pytest.mark.golden(case="lposs")
def test_lposs(golden):
    args, inputs = golden.args, golden.part("in")
    results, wrong = {}, {}
    clip = F.normalize(inputs["clip_feats"], dim=3).flatten(0, 2)
    dino = F.normalize(inputs["dino_feats"], dim=3).flatten(0, 2)
    (height, width), crop, stride = args["image_hw"], args["crop"], args["stride"]
    starts = [window_starts(n, c, s) for n, c, s in zip((height, width), crop, stride, strict=True)]
    corners = [(y, x) for y in starts[0] for x in starts[1]]
    assert [len(s) for s in starts] == args["windows"]
    grid = tuple(args["window_grid"])
    positions = patch_positions(corners, grid, args["patch_size"])
    cosines = clip @ inputs["classifier"].T

    def graph(features=dino, places=positions, k=args["k"], gamma=args["gamma"]):
        power = args["pix_dist_pow"]
        return patch_graph(
            features, places, neighbours=k, gamma=gamma, sigma=args["sigma"], power=power, alpha=args["alpha"]
        )

    laplacian = graph()
    propagated = propagate_patches(laplacian, cosines, args["iterations"])
    results |= {
        "patch_cosines": cosines,
        "patch_laplacian": laplacian.to_dense(),
        "patch_propagated": propagated,
    }

    def fold(scores):
        maps = iter(scores.reshape(len(corners), *grid, -1).permute(0, 3, 1, 2))
        image = inputs["image"]
        return slide_windows(
            lambda crops: torch.stack([next(maps) for _ in crops]), image, tuple(crop), tuple(stride)
        )

    def finish(pixels, size=tuple(args["ori_shape"])):
        rows = args["background_rows"]
        classes = torch.cat([pixels[:, :rows].amax(1, keepdim=True), pixels[:, rows:]], 1)
        return F.interpolate(classes, size, mode="bilinear")

    results["masks"] = finish(fold(propagated))
    pixels = fold(propagated)[0]
    image = inputs["image"][0]
    solved = propagate_pixels(image, pixels, size=args["r"], tau=args["tau"])
    results["pixel_propagated"] = solved.flatten(1).T
    results["masks_pixel_refined"] = finish(solved[None])
    results["pixel_laplacian_diagonal_band"] = _band(golden, image)
    assert args["alpha"] == ALPHA
    one = slice(0, grid[0] * grid[1])
    whole = propagate_patches(graph(dino[one], positions[one], args["whole_k"]), cosines[one])
    whole = whole.T.reshape(1, -1, *grid)
    results["whole_masks_window_0"] = finish(F.interpolate(whole, tuple(crop), mode="bilinear"), tuple(crop))

    for name in wrong_names(golden):
        if name == "patch_propagated_solved_exactly":
            wrong[name] = torch.linalg.solve(laplacian.to_dense().double(), cosines.double())
    if "masks_other_gamma" in wrong_names(golden):
        wrong["masks_other_gamma"] = golden.part("out")["NEG_masks_other_gamma"]
        # which other gamma the file has is not in it
        other = propagate_patches(graph(gamma=args["gamma"] + 1), cosines, args["iterations"])
        assert golden.differs("masks", finish(fold(other)).float())
    check_all(golden, results, wrong)


def _band(golden, image):
    """The first rows and columns of the matrix of the pixel graph."""
    args, count = golden.args, len(golden.part("out")["pixel_laplacian_diagonal_band"])
    graph = PixelGraph(image, size=args["r"], tau=args["tau"], alpha=args["alpha"])
    return graph.apply(torch.eye(image[0].numel(), count, dtype=torch.float64))[:count]


@pytest.mark.golden(case="sam_refine")
def test_sam_refine(golden):
    inputs, results, wrong = golden.part("in"), {}, {}
    for run in runs(golden, "case"):
        case = golden.args["cases"][int(run.rsplit("_", 1)[1])]
        calls = []

        def decode(prompts, run=run, calls=calls):
            name = f"{run}.call_{len(calls)}"
            calls.append(name)
            results[f"{name}.points"] = prompts.points
            results[f"{name}.point_labels"] = prompts.point_labels
            results[f"{name}.boxes"] = prompts.boxes
            results[f"{name}.mask_input_every_4th"] = prompts.mask_input[:, ::4, ::4]
            low = F.interpolate(inputs[f"{name}.low16"], (256, 256), mode="bilinear")
            return low[:, 0], inputs[f"{name}.iou"][:, 0]

        settings = RefineSettings(
            case["coarse_thresh"],
            case["minimal_area"],
            case["sam_iou_thresh"],
            case["sam_mask_coff"],
            golden.args["downsample"],
            golden.args["sam_image_size"],
        )
        prediction, scores = inputs[f"{run}.prediction"], inputs[f"{run}.class_scores"]
        labels, maps = refine_by_prompts(prediction, scores, decode, settings)
        assert len(calls) == case["calls"]
        results[f"{run}.refined_prediction"], results[f"{run}.refined_scores"] = labels, maps
        wrong[f"{run}.unrefined_prediction"] = prediction
        same = refine_by_prompts(
            prediction,
            scores,
            lambda p: (p.boxes.new_ones(len(p.boxes), 256, 256), p.boxes[:, 0] * 0),
            settings,
        )
        assert torch.equal(same[0], prediction) and torch.equal(same[1], scores)
    outputs = golden.part("out")
    for run in runs(golden, "case"):  # the coarse labels are the negative of the refined ones
        name = f"{run}.unrefined_prediction"
        assert torch.equal(wrong[name].to(torch.uint8), outputs[f"NEG_{name}"])
        assert not torch.equal(outputs[f"NEG_{name}"], outputs[f"{run}.refined_prediction"])
    assert set(wrong) == wrong_names(golden)
    atol, rtol = golden.tolerance
    right = {k: v for k, v in outputs.items() if not k.startswith("NEG_")}
    assert set(right) == set(results)
    for name, value in right.items():
        torch.testing.assert_close(results[name].to(value.dtype), value, atol=atol, rtol=rtol, msg=name)


@pytest.mark.golden(case="text_classifier")
@torch.no_grad()
def test_text_classifier(golden):
    """The text bank over a tower that reads the file's token ids."""
    import open_clip

    args, ids = golden.args, golden.part("in")["token_ids"]
    text_cfg = open_clip.CLIPTextCfg(
        context_length=args["context_length"],
        vocab_size=args["vocab"],
        width=args["text_width"],
        heads=args["text_heads"],
        layers=args["text_layers"],
    )
    vision_cfg = open_clip.CLIPVisionCfg(layers=1, width=64, patch_size=8, image_size=8)
    module = open_clip.CLIP(
        args["embed_dim"], vision_cfg, text_cfg, quick_gelu=args["activation"] == "quick_gelu"
    )
    rest = {k: v for k, v in module.state_dict().items() if k.startswith(("visual.", "logit_scale"))}
    module.load_state_dict({**rest, **golden.part("state")}, strict=True)
    clip = load_clip(module.eval())
    templates = tuple(f"{i} {{}}" for i in range(ids.shape[1]))
    table = {f"{t} q{q}": ids[q, t] for q in range(ids.shape[0]) for t in range(ids.shape[1])}
    clip.tokenizer = _Lookup(table, args["context_length"])
    names = Vocabulary.from_names([f"q{q}" for q in range(len(ids))])
    queries, classes = TextBank(clip, templates, cache_dir=None).per_synonym(names)
    assert classes.tolist() == list(range(len(ids)))
    features = clip.encode_text(ids.flatten(0, 1)).reshape(*ids.shape[:2], -1)
    results = {"query_features": queries, "template_features": features}
    raw_mean = F.normalize(features.mean(1), dim=-1)
    check_all(golden, results, {"query_features_templates_not_normalised": raw_mean})


class _Lookup:
    """Tokenizer of a table of texts."""

    def __init__(self, table, context_length):
        self.table, self.context_length = table, context_length
        self.clean_fn = str

    def __call__(self, texts, context_length=None):
        zeros = torch.zeros(self.context_length, dtype=torch.long)
        return torch.stack([self.table.get(text, zeros) for text in texts])

    def tokenizer(self, text):
        return {"input_ids": [i for i in self([text])[0].tolist() if i]}
