"""CLIPs of golden files of the OVSeg family, and tolerances that follow its README."""

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
from clipdense.run.conversion import convert_weights
from clipdense.run.setup import load_config

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def whole_state(golden: Any) -> dict[str, Tensor]:
    """The file's state, token tables at their full size."""
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
    """The file's CLIP, its image tower random where the file has none, and its mask prompts."""
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
    return prompts


def converted(
    golden: Any,
    folder: Path,
    options: dict[str, Any],
    *,
    content: dict[str, Any] | None = None,
    layout: str = "",
) -> Any:
    """The model that a published file builds.

    Args:
        options: config keys that the file cannot tell.
        content: of the file, where it is not the golden one's state; layout: then the file's.
    """
    torch.save(content or {"model": whole_state(golden)}, folder / "published.pth")
    target = folder / "converted.safetensors"
    options = {"MODEL.DEVICE": "cpu", "MODEL.MASK_FORMER.NHEADS": golden.config["head"]["nheads"]} | options
    conversion = convert_weights(folder / "published.pth", target, options=options)
    assert conversion.layout == (layout or golden.id.split("/")[1].split("_")[0])
    assert ("CC BY-NC" in conversion.licence) == (conversion.layout != "zsseg")
    (folder / "config.yaml").write_text(yaml.safe_dump({"VERSION": 2, "MODEL": {"WEIGHTS": str(target)}}))
    model = build_model(load_config(str(folder / "config.yaml"))).eval()
    TrainingCheckpointer(model).load_weights(str(target), complete=True)
    return model


def samples(golden: Any) -> list[dict[str, Any]]:
    return [
        {"image": golden.part("in")[f"image{b}"], "height": h, "width": w}
        for b, (h, w) in enumerate(golden.config["output_hw"])
    ]


def close(golden: Any, name: str, value: Tensor, atol: float) -> None:
    """Within the README's tolerance, or ten times the recorded rounding of the reference."""
    atol = tolerance(golden, name, atol)
    try:
        torch.testing.assert_close(value, golden.part("out")[name], atol=atol, rtol=0)
    except AssertionError as e:
        raise AssertionError(f"{golden.id} {name}: {e}") from None


def far(golden: Any, name: str, value: Tensor, atol: float) -> bool:
    """A negative control is outside of it, and not by its shape alone."""
    expected = golden.part("out")[name]
    assert value.shape == expected.shape
    difference = (value.double() - expected.double()).abs()
    return bool((difference > tolerance(golden, name, atol)).any())


def tolerance(golden: Any, name: str, atol: float) -> float:
    noise = golden.config.get("fp32_vs_fp64_max_abs_diff", {})
    return max(atol, 10 * noise.get(name, 0.0)) if atol else 0.0
