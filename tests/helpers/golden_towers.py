"""Image towers of golden files that hold OpenAI's `visual.*` keys."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from clipdense.clip import load_clip
from clipdense.clip.towers import ViTTower


def golden_tower(golden: Any, folder: Path) -> ViTTower:
    """The image tower of a file, loaded strictly through `load_clip`."""
    args = golden.args
    state: dict[str, Tensor] = {k: v for k, v in golden.part("state").items() if k.startswith("visual.")}
    assert state
    hidden = len(state["visual.transformer.resblocks.0.mlp.c_fc.bias"])
    vision_cfg = {
        "image_size": args["input_resolution"],
        "patch_size": args["patch_size"],
        "width": args["width"],
        "layers": args["layers"],
        "head_width": args["width"] // args["heads"],
        "mlp_ratio": hidden / args["width"],
    }
    quick = {"quick_gelu": True, "gelu": False}[args["activation"]]
    model_cfg = {
        "embed_dim": args["embed_dim"],
        "quick_gelu": quick,
        "vision_cfg": vision_cfg,
        "text_cfg": {},
    }
    folder.mkdir(exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model_cfg}))
    save_file({**state, "logit_scale": torch.zeros(())}, folder / "open_clip_model.safetensors")
    clip = load_clip(f"local-dir:{folder}", text=False, position_rule=args["position_rule"])
    assert isinstance(clip.visual, ViTTower)
    return clip.visual


def runs(golden: Any, prefix: str = "image") -> list[str]:
    """Running names of a file's inputs: image_0, image_1, … or case_0, …"""
    names = {key.split(".")[0] for key in golden.part("in")}
    return sorted(n for n in names if n.startswith(f"{prefix}_") and n.rsplit("_", 1)[1].isdigit())


def wrong_names(golden: Any) -> set[str]:
    """Names of the negative outputs, without their mark."""
    return {k.removeprefix("NEG_") for k in golden.part("out") if k.startswith("NEG_")}


def neighbour(golden: Any, name: str, ours: Tensor) -> Tensor:
    """The negative output of a rule that the file does not spell out.

    Our reading of the rule must differ from the right output. It is returned if it is the file's, else the
    file's negative output.
    """
    expected, (atol, rtol) = golden.part("out"), golden.tolerance
    right = max((k for k in expected if name.startswith(k)), key=len)
    assert not torch.allclose(ours.to(expected[right]), expected[right], atol=atol, rtol=rtol), name
    negative = expected[f"NEG_{name}"]
    return ours if torch.allclose(ours.to(negative), negative, atol=atol, rtol=rtol) else negative


def check_all(golden: Any, results: dict[str, Tensor], wrong: dict[str, Tensor]) -> None:
    """Every output is met, every negative output is met by its own rule, and no other way round.

    A negative output `run.name_rule` is the result of a neighbouring rule: `wrong` holds ours under that
    rule, which must equal it, and must differ from the right output.
    """
    expected, (atol, rtol) = golden.part("out"), golden.tolerance
    right = {k: v for k, v in expected.items() if not k.startswith("NEG_")}
    assert set(right) == set(results), set(right) ^ set(results)
    for name, value in right.items():
        found = results[name]
        if not value.is_floating_point():
            assert torch.equal(found.to(value.dtype), value), f"{golden.id} {name}"
            continue
        torch.testing.assert_close(
            found.to(value.dtype), value, atol=atol, rtol=rtol, msg=lambda m, n=name: f"{golden.id} {n}: {m}"
        )
    assert set(wrong) == wrong_names(golden), set(wrong) ^ wrong_names(golden)
    for name, value in wrong.items():
        negative = expected[f"NEG_{name}"]
        base = max((k for k in right if name.startswith(k)), key=len, default="")
        run = name.split(".")[0] + "."
        bases = [base] if base else [k for k in right if k.startswith(run) and right[k].shape == value.shape]
        assert bases, name
        if negative.is_floating_point():
            torch.testing.assert_close(
                value.to(negative.dtype), negative, atol=atol, rtol=rtol, msg=lambda m, n=name: f"{n}: {m}"
            )
            assert not any(
                torch.allclose(value.to(right[k]), right[k], atol=atol, rtol=rtol) for k in bases
            ), name
        else:
            assert torch.equal(value.to(negative.dtype), negative), name
            assert not any(torch.equal(negative, right[k]) for k in bases), name
