"""MaskCLIP's refinements of cosines, as its golden files record them."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipdense.inference import denoise_prompts, smooth_by_keys


def refinements(golden: Any, image: str, logits: Tensor, keys: Tensor) -> dict[str, Tensor]:
    """Denoised and smoothed cosines of one run; keys (B, C, h, w) are normalised over the tokens.

    Checks on the way that the paper's norm of keys gives other values than the released code's.
    """
    inputs, size = golden.part("in"), golden.part("in")[image].shape[-2:]
    threshold = float(inputs["pd_thresh"])
    denoised = denoise_prompts(logits, threshold)

    def smooth(logits: Tensor, threshold: float, tokens: bool = True) -> Tensor:
        return smooth_by_keys(logits, keys, threshold, normalize_tokens=tokens)

    both = smooth(denoised, 1.0)
    full = F.interpolate(both[:1], size, mode="bilinear")
    results = {
        "max_class_probability": (100 * logits).softmax(1).amax((2, 3)),
        "logits": logits,
        "logits_full_size_first_image": F.interpolate(logits[:1], size, mode="bilinear"),
        "logits_denoised": denoised,
        "logits_key_smooth_all": smooth(logits, 1.0),
        "logits_key_smooth_partial": smooth(logits, float(inputs["ks_thresh_partial"])),
        "logits_denoised_key_smooth": both,
        "prediction_denoised_key_smooth_first_image": full.argmax(1),
    }
    assert golden.differs(f"{image}.logits_key_smooth_all", smooth(logits, 1.0, tokens=False))
    if bool((results["max_class_probability"] < threshold).any()):
        assert golden.differs(f"{image}.logits_denoised_key_smooth", smooth(logits, 1.0))
        assert golden.differs(f"{image}.logits_denoised", logits)
    return {f"{image}.{name}": value for name, value in results.items()}


def check(golden: Any, results: dict[str, Tensor]) -> None:
    """Every recorded output has an equal result, label maps exactly."""
    expected, (atol, rtol) = golden.part("out"), golden.tolerance
    assert set(expected) == set(results), set(expected) ^ set(results)
    for name, value in expected.items():
        found = results[name]
        if "prediction" in name:
            assert torch.equal(found.to(torch.uint8), value.to(torch.uint8)), name
        else:
            torch.testing.assert_close(
                found, value, atol=atol, rtol=rtol, msg=lambda m, n=name: f"{golden.id} {n}: {m}"
            )
