"""Published rules that fuse a detector's class scores with CLIP's.

Every rule has one signature: (detector scores, CLIP scores, base mask, settings) -> scores, all of them
probabilities with a background entry **last**, as in Detectron2 (F-VLM's own code has it first). The base
mask says which classes were labelled in training; it has no entry for the background.

With detector scores p, CLIP scores q and the exponents alpha (base classes) and beta (novel classes):

    fused = p^(1 - alpha) q^alpha    or    p^(1 - beta) q^beta
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "FUSIONS",
    "Fusion",
    "FusionSettings",
    "fuse_fvit",
    "fuse_fvit_transfer",
    "fuse_fvlm",
    "get_fusion",
]


@dataclass(frozen=True)
class FusionSettings:
    """What a rule is tuned by.

    Attributes:
        alpha: weight of CLIP for base classes, 0 .. 1.
        beta: weight of CLIP for novel classes, 0 .. 1.
    """

    alpha: float
    beta: float

    def __post_init__(self) -> None:
        for name in ("alpha", "beta"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"the fusion weight {name} must lie in 0 .. 1, not {getattr(self, name)}")


Fusion = Callable[[Tensor, Tensor, Tensor | None, FusionSettings], Tensor]


def fuse_fvlm(detector: Tensor, clip: Tensor, base: Tensor | None, settings: FusionSettings) -> Tensor:
    """F-VLM (Kuo et al., ICLR 2023, section 3.3): the background is the detector's alone, and the result is
    normalised to sum 1.

    Args:
        detector, clip: (..., K + 1).
        base: (..., K) bool, or None: every class counts as novel.
        settings: alpha, beta.

    Returns:
        (..., K + 1).
    """
    background = detector[..., -1:]
    fused = _geometric(detector[..., :-1], clip[..., :-1], _exponents(detector[..., :-1], base, settings))
    fused = F.pad(fused, (0, 1)) + F.pad(background, (detector.shape[-1] - 1, 0))
    return fused / fused.sum(-1, keepdim=True)


def fuse_fvit(detector: Tensor, clip: Tensor, base: Tensor | None, settings: FusionSettings) -> Tensor:
    """F-ViT (Wu et al., CLIPSelf, ICLR 2024): the background counts as a base class; nothing is normalised.

    Arguments and result as `fuse_fvlm`.
    """
    exponents = _exponents(detector[..., :-1], base, settings)
    return _geometric(detector, clip, F.pad(exponents, (0, 1), value=settings.alpha))


def fuse_fvit_transfer(
    detector: Tensor, clip: Tensor, base: Tensor | None, settings: FusionSettings
) -> Tensor:
    """F-ViT on other data than it was trained on: alpha for all, whether base or not.

    Arguments and result as `fuse_fvlm`; the base mask and beta are not used.
    """
    return detector ** (1 - settings.alpha) * clip**settings.alpha


FUSIONS: dict[str, Fusion] = {
    "fvlm": fuse_fvlm,
    "fvit": fuse_fvit,
    "fvit_transfer": fuse_fvit_transfer,
}


def get_fusion(name: str) -> Fusion:
    """A rule by name. Raises ValueError for an unknown one."""
    if name not in FUSIONS:
        raise ValueError(f"unknown score fusion '{name}'; known: {', '.join(FUSIONS)}")
    return FUSIONS[name]


def _exponents(scores: Tensor, base: Tensor | None, settings: FusionSettings) -> Tensor:
    """CLIP's exponent for each class, in the shape of the base mask (or of the scores, without one)."""
    if base is None:
        return scores.new_full(scores.shape[-1:], settings.beta)
    return scores.new_full((), settings.beta).where(~base, settings.alpha)


def _geometric(detector: Tensor, clip: Tensor, exponents: Tensor) -> Tensor:
    return detector ** (1 - exponents) * clip**exponents
