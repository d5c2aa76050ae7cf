"""Published rules that fuse the class scores of a detector or of mask proposals with CLIP's.

All rules share one signature: (detector scores, CLIP scores, base mask, settings) -> scores. Scores are
probabilities whose **last** entry is the background, as in Detectron2 (F-VLM's code has it first). The base
mask marks the classes that were labelled in training and has no entry for the background. For mask proposals
the background is the papers' "no object".

With detector scores p, CLIP scores q and the exponents alpha (base classes) and beta (novel classes):

    fused = p^(1 - alpha) q^alpha    or    p^(1 - beta) q^beta
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "FUSIONS",
    "Fusion",
    "FusionSettings",
    "calibrated_stacking",
    "fuse_fvit",
    "fuse_fvit_transfer",
    "fuse_fvlm",
    "fuse_valid",
    "fuse_zegformer",
    "fuse_zsseg",
    "get_fusion",
]


@dataclass(frozen=True)
class FusionSettings:
    """Weights of CLIP's scores.

    Attributes:
        alpha: Exponent of CLIP's scores for base classes, 0 .. 1.
        beta: Exponent of CLIP's scores for novel classes, 0 .. 1.

    Raises:
        ValueError: If a weight lies outside 0 .. 1.
    """

    alpha: float
    beta: float

    def __post_init__(self) -> None:
        for name in ("alpha", "beta"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"the fusion weight {name} must lie in 0 .. 1, not {getattr(self, name)}")


Fusion = Callable[[Tensor, Tensor, Tensor | None, FusionSettings], Tensor]


def fuse_fvlm(detector: Tensor, clip: Tensor, base: Tensor | None, settings: FusionSettings) -> Tensor:
    """Fuse as F-VLM (Kuo et al., ICLR 2023, section 3.3): the background score is the detector's, and the
    result sums to 1.

    Args:
        detector: (..., K + 1) probabilities, background last.
        clip: (..., K + 1) probabilities, background last.
        base: (..., K) bool, True for base classes; None: every class uses beta.
        settings: alpha and beta.

    Returns:
        (..., K + 1) scores, background last.
    """
    background = detector[..., -1:]
    fused = _geometric(detector[..., :-1], clip[..., :-1], _exponents(detector[..., :-1], base, settings))
    fused = F.pad(fused, (0, 1)) + F.pad(background, (detector.shape[-1] - 1, 0))
    return fused / fused.sum(-1, keepdim=True)


def fuse_fvit(detector: Tensor, clip: Tensor, base: Tensor | None, settings: FusionSettings) -> Tensor:
    """Fuse as F-ViT (Wu et al., CLIPSelf, ICLR 2024): the background counts as a base class, and the result
    is not normalised. Same arguments and return value as `fuse_fvlm`.
    """
    exponents = _exponents(detector[..., :-1], base, settings)
    return _geometric(detector, clip, F.pad(exponents, (0, 1), value=settings.alpha))


def fuse_fvit_transfer(
    detector: Tensor, clip: Tensor, base: Tensor | None, settings: FusionSettings
) -> Tensor:
    """Fuse as F-ViT on datasets that it was not trained on: every class uses alpha. Same arguments and
    return value as `fuse_fvlm`; the base mask and beta are ignored.
    """
    return detector ** (1 - settings.alpha) * clip**settings.alpha


def fuse_zsseg(detector: Tensor, clip: Tensor, base: Tensor | None, settings: FusionSettings) -> Tensor:
    """Fuse as zsseg (Xu et al., ECCV 2022) and OVSeg (Liang et al., CVPR 2023): the background score is the
    proposals', and the result is not normalised.

    With the published weight w, zsseg has alpha = 1 - w and beta = w, and OVSeg has alpha = beta = w. CLIP's
    background entry is ignored. Same arguments and return value as `fuse_fvlm`.
    """
    classes = detector[..., :-1]
    fused = _geometric(classes, clip[..., :-1], _exponents(classes, base, settings))
    return torch.cat([fused, detector[..., -1:]], dim=-1)


def fuse_zegformer(detector: Tensor, clip: Tensor, base: Tensor | None, settings: FusionSettings) -> Tensor:
    """Fuse as ZegFormer (Ding et al., CVPR 2022): like `fuse_zsseg`, after each base class has taken the mean
    of CLIP's scores over the base classes.

    Published weights: alpha = 1/3 and beta = 2/3. The published variant with 2/3 for all classes and without
    the mean is `fuse_zsseg`. Same arguments and return value as `fuse_fvlm`.
    """
    if base is not None:
        classes = clip[..., :-1]
        mean = (classes * base).sum(-1, keepdim=True) / base.sum(-1, keepdim=True).clamp(min=1)
        clip = torch.cat([torch.where(base, mean, classes), clip[..., -1:]], dim=-1)
    return fuse_zsseg(detector, clip, base, settings)


FUSIONS: dict[str, Fusion] = {
    "fvlm": fuse_fvlm,
    "fvit": fuse_fvit,
    "fvit_transfer": fuse_fvit_transfer,
    "ovseg": fuse_zsseg,
    "zsseg": fuse_zsseg,
    "zegformer": fuse_zegformer,
}


def get_fusion(name: str) -> Fusion:
    """Return a rule by name.

    Raises:
        ValueError: If the name is unknown.
    """
    if name not in FUSIONS:
        raise ValueError(f"unknown score fusion '{name}'; known: {', '.join(FUSIONS)}")
    return FUSIONS[name]


def fuse_valid(
    fusion: Fusion,
    detector: Tensor,
    clip: Tensor,
    valid: Tensor,
    base: Tensor | None,
    settings: FusionSettings,
    empty: str = "neutral",
) -> Tensor:
    """Fuse the scores of mask proposals, some of which have no CLIP scores.

    Args:
        fusion: A rule.
        detector: (Q, K + 1) scores of all proposals.
        clip: (V, K + 1) scores of the proposals where `valid` is True.
        valid: (Q,) bool, the proposals that have CLIP scores.
        base: The rule's base mask.
        settings: The rule's weights.
        empty: Policy for the other proposals. "neutral" keeps their detector scores. "boost" fuses them with
            CLIP scores of 1, which raises them above the others (OVSeg's and zsseg's code).

    Returns:
        (Q, K + 1).

    Raises:
        ValueError: If the policy is unknown.
    """
    if empty not in ("neutral", "boost"):
        raise ValueError(f"empty must be neutral or boost, not '{empty}'")
    if empty == "boost":
        return fusion(
            detector, torch.ones_like(detector).masked_scatter(valid[:, None], clip), base, settings
        )
    return detector.masked_scatter(valid[:, None], fusion(detector[valid], clip, base, settings))


def calibrated_stacking(scores: Tensor, base: Tensor | None, gamma: float) -> Tensor:
    """Subtract gamma from the score maps of base classes (Chao et al., ECCV 2016).

    Args:
        scores: (K, ...) score maps.
        base: (K,) bool; None returns the scores unchanged.
        gamma: Amount to subtract; 0 or less returns the scores unchanged. ZegFormer subtracts 0.1 after
            resizing the maps.

    Returns:
        (K, ...).
    """
    if base is None or gamma <= 0:
        return scores
    return scores - gamma * base.to(scores.dtype).reshape(-1, *[1] * (scores.dim() - 1))


def _exponents(scores: Tensor, base: Tensor | None, settings: FusionSettings) -> Tensor:
    """Compute CLIP's exponent of each class, in the shape of the base mask or, without one, (K,)."""
    if base is None:
        return scores.new_full(scores.shape[-1:], settings.beta)
    return scores.new_full((), settings.beta).where(~base, settings.alpha)


def _geometric(detector: Tensor, clip: Tensor, exponents: Tensor) -> Tensor:
    return detector ** (1 - exponents) * clip**exponents
