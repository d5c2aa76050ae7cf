"""Published rules that fuse a detector's class scores, or those of a mask proposal, with CLIP's.

Every rule has one signature: (detector scores, CLIP scores, base mask, settings) -> scores, all of them
probabilities with a background entry **last**, as in Detectron2 (F-VLM's own code has it first). The base
mask says which classes were labelled in training; it has no entry for the background. For mask proposals the
background is what the papers call no-object.

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


def fuse_zsseg(detector: Tensor, clip: Tensor, base: Tensor | None, settings: FusionSettings) -> Tensor:
    """zsseg (Xu et al., ECCV 2022), OVSeg (Liang et al., CVPR 2023): the background is the proposals' alone,
    and nothing is normalised.

    With the published weight w, zsseg has alpha = 1 - w and beta = w, OVSeg alpha = beta = w. CLIP's
    background entry is not used. Arguments and result as `fuse_fvlm`.
    """
    classes = detector[..., :-1]
    fused = _geometric(classes, clip[..., :-1], _exponents(classes, base, settings))
    return torch.cat([fused, detector[..., -1:]], dim=-1)


def fuse_zegformer(detector: Tensor, clip: Tensor, base: Tensor | None, settings: FusionSettings) -> Tensor:
    """ZegFormer (Ding et al., CVPR 2022): as `fuse_zsseg`, but CLIP gives every base class the mean of its
    scores for base classes.

    Published: alpha = 1/3 and beta = 2/3; the variant with 2/3 for all classes and without the mean is
    `fuse_zsseg`. Arguments and result as `fuse_fvlm`.
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
    """A rule by name. Raises ValueError for an unknown one."""
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
    """A fusion of mask proposals of which CLIP has seen some.

    Args:
        fusion: a rule.
        detector: (Q, K + 1).
        clip: (V, K + 1), of the proposals where `valid` (Q,) is true.
        base, settings: the rule's.
        empty: what becomes of the others: "neutral" leaves their scores as they are; "boost" fuses them with
            CLIP scores of 1, which raises them above those that CLIP has seen (OVSeg's and zsseg's code).

    Returns:
        (Q, K + 1).

    Raises:
        ValueError: another policy.
    """
    if empty not in ("neutral", "boost"):
        raise ValueError(f"the policy for empty masks is neutral or boost, not '{empty}'")
    if empty == "boost":
        return fusion(
            detector, torch.ones_like(detector).masked_scatter(valid[:, None], clip), base, settings
        )
    return detector.masked_scatter(valid[:, None], fusion(detector[valid], clip, base, settings))


def calibrated_stacking(scores: Tensor, base: Tensor | None, gamma: float) -> Tensor:
    """Class maps (K, ...) with gamma taken from those of base classes (Chao et al., ECCV 2016; ZegFormer:
    0.1, after the maps were resized). Unchanged without a base mask (K,), or where gamma is not above 0.
    """
    if base is None or gamma <= 0:
        return scores
    return scores - gamma * base.to(scores.dtype).reshape(-1, *[1] * (scores.dim() - 1))


def _exponents(scores: Tensor, base: Tensor | None, settings: FusionSettings) -> Tensor:
    """CLIP's exponent for each class, in the shape of the base mask (or of the scores, without one)."""
    if base is None:
        return scores.new_full(scores.shape[-1:], settings.beta)
    return scores.new_full((), settings.beta).where(~base, settings.alpha)


def _geometric(detector: Tensor, clip: Tensor, exponents: Tensor) -> Tensor:
    return detector ** (1 - exponents) * clip**exponents
