"""Models, options and tolerances of the golden files of the OVSeg family."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from clipdense.checkpoint import load_strict
from clipdense.clip import ClipModel
from clipdense.clip.layouts import OPENAI_CLIP
from clipdense.clip.mask_prompts import MaskPrompts
from clipdense.clip.model import build_clip
from clipdense.engine.build import build_model
from clipdense.engine.checkpoint import TrainingCheckpointer
from clipdense.regions import CROP_RULES, FusionSettings
from clipdense.run.conversion import convert_weights
from clipdense.run.setup import load_config
from clipdense.systems.two_stage import Scoring

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def whole_state(golden: Any) -> dict[str, Tensor]:
    """Return the file's state with token tables of full size."""
    state = golden.part("state")
    for key, shape in golden.config["sparse_rows"].items():
        state[key] = torch.zeros(shape)
        state[key][golden.tensors[f"state_rows_index/{key}"]] = golden.tensors[f"state_rows/{key}"]
    return state


def below(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def vit_config(clip: dict[str, Any]) -> dict[str, Any]:
    return {
        "layers": clip["vision_layers"],
        "width": clip["vision_width"],
        "head_width": 64,
        "patch_size": clip["vision_patch_size"],
        "image_size": clip.get("image_resolution", 224),
        "mlp_ratio": 4.0,
    }


def load(golden: Any, prefix: str = "") -> tuple[ClipModel, MaskPrompts | None]:
    """Load the file's CLIP and its mask prompts; a missing image tower stays random."""
    sizes = golden.config["clip"]
    text = {"context_length": 77, "vocab_size": 49408, "layers": sizes["text_layers"]}
    text |= {"width": sizes["text_width"], "heads": sizes["text_width"] // 64}
    model = {"embed_dim": sizes.get("embed_dim", 512), "quick_gelu": True, "custom_text": True}
    config = {
        "model_cfg": model | {"vision_cfg": vit_config(sizes), "text_cfg": text},
        "preprocess_cfg": {"mean": MEAN, "std": STD},
    }
    clip = build_clip(golden.id, config).eval()
    state = below(whole_state(golden), prefix)
    table = state.pop("visual.mask_embedding", None)
    prompts = None if table is None else mask_prompts(table)
    state = OPENAI_CLIP.convert(state)
    if not any(key.startswith("visual.") for key in state):
        state |= {f"visual.{key}": value for key, value in clip.visual.state_dict().items()}
    load_strict(clip, state, source=golden.id)
    return clip, prompts


def mask_prompts(table: Tensor) -> MaskPrompts:
    prompts = MaskPrompts(*table.shape)
    load_strict(prompts, {"prompts": table}, source="mask_embedding")
    return prompts.eval()


ZEGFORMER_TEMPLATES = {
    "imagenet": "clip_80",
    "imagenet_select": "zegformer_8",
    "single": "single_scene",
}


def ovseg_scoring(config: dict[str, Any]) -> Scoring:
    """The scoring of an OVSeg recording, whose weight 0 is CLIP alone."""
    weight = config["clip_ensemble_weight"]
    if not config.get("clip_ensemble", True):
        return Scoring("proposals")
    if weight == 0:
        return Scoring("clip")
    return Scoring("ensemble", "ovseg", FusionSettings(weight, weight), "boost")


def zegformer_scoring(config: dict[str, Any]) -> Scoring:
    """The scoring of a ZegFormer recording."""
    settings: dict[str, Any] = {"empty": "boost", "clip_background": True}
    if not config["clip_classification"]:
        return Scoring("proposals")
    if config["ensembling"]:
        return Scoring("ensemble", "zegformer", FusionSettings(1 / 3, 2 / 3), **settings)
    if config["ensembling_all_cls"]:
        return Scoring("ensemble", "zsseg", FusionSettings(2 / 3, 2 / 3), **settings)
    return Scoring("clip", **settings)


def other_source(scoring: Scoring) -> Scoring:
    """A negative control: the classifier that the recording does not use, or one of two alone."""
    return replace(scoring, source="clip" if scoring.source == "proposals" else "proposals")


def _scoring_options(scoring: Scoring) -> dict[str, Any]:
    keys = {"SOURCE": scoring.source, "FUSION": scoring.fusion}
    keys |= {"ALPHA": scoring.settings.alpha, "BETA": scoring.settings.beta}
    return {f"MODEL.TWO_STAGE.SCORES.{key}": value for key, value in keys.items()}


def ovseg_options(config: dict[str, Any]) -> dict[str, Any]:
    """Config keys of a whole OVSeg model that its file does not show."""
    return _scoring_options(ovseg_scoring(config)) | {
        "MODEL.TWO_STAGE.CROP.THRESHOLD": config["adapter"]["mask_thr"],
        "MODEL.TWO_STAGE.MASK_PROMPTS.ENABLED": config["adapter"]["mask_prompt_fwd"],
    }


def zegformer_options(config: dict[str, Any]) -> dict[str, Any]:
    """Config keys of a whole ZegFormer model that its file does not show."""
    rule = CROP_RULES[f"zegformer_{config['clip_cls_style']}"]
    return _scoring_options(zegformer_scoring(config)) | {
        "MODEL.TWO_STAGE.TEMPLATES": ZEGFORMER_TEMPLATES[config["prompt_ensemble_type"]],
        "MODEL.TWO_STAGE.CALIBRATION": config["gzero_calibrate"],
        "MODEL.TWO_STAGE.CROP.SAMPLING": rule.sampling,
        "MODEL.TWO_STAGE.CROP.MASKED": rule.masked,
    }


def converted(
    golden: Any,
    folder: Path,
    options: dict[str, Any],
    *,
    content: dict[str, Any] | None = None,
    layout: str = "",
) -> Any:
    """Build the model of a published file.

    Args:
        options: Config keys that the file does not show.
        content: Content of the file instead of the golden state.
        layout: Expected layout, if it is not the one that the golden file's name begins with.
    """
    torch.save(content or {"model": whole_state(golden)}, folder / "published.pth")
    target = folder / "converted.safetensors"
    options = {"MODEL.MASK_FORMER.NHEADS": golden.config["head"]["nheads"]} | options
    conversion = convert_weights(folder / "published.pth", target, options=options)
    assert conversion.layout == (layout or golden.id.split("/")[1].split("_")[0])
    assert ("CC BY-NC" in conversion.licence) == (conversion.layout != "zsseg")
    (folder / "config.yaml").write_text(
        yaml.safe_dump({"VERSION": 2, "MODEL": {"WEIGHTS": str(target), "DEVICE": "cpu"}})
    )
    left_out = {key: value for key, value in options.items() if key not in conversion.options}
    overrides = [str(word) for pair in left_out.items() for word in pair]
    model = build_model(load_config(str(folder / "config.yaml"), overrides)).eval()
    TrainingCheckpointer(model).load_weights(str(target), complete=True)
    return model


def samples(golden: Any) -> list[dict[str, Any]]:
    return [
        {"image": golden.part("in")[f"image{b}"], "height": h, "width": w}
        for b, (h, w) in enumerate(golden.config["output_hw"])
    ]


def close(golden: Any, name: str, value: Tensor, atol: float) -> None:
    """Compare within `atol`, or ten times the recorded rounding error of the reference."""
    atol = tolerance(golden, name, atol)
    try:
        torch.testing.assert_close(value, golden.part("out")[name], atol=atol, rtol=0)
    except AssertionError as e:
        raise AssertionError(f"{golden.id} {name}: {e}") from None


def far(golden: Any, name: str, value: Tensor, atol: float) -> bool:
    """Return whether a negative control, of the same shape, is outside the tolerance."""
    expected = golden.part("out")[name]
    assert value.shape == expected.shape
    difference = (value.double() - expected.double()).abs()
    return bool((difference > tolerance(golden, name, atol)).any())


def tolerance(golden: Any, name: str, atol: float) -> float:
    noise = golden.config.get("fp32_vs_fp64_max_abs_diff", {})
    return max(atol, 10 * noise.get(name, 0.0)) if atol else 0.0
