"""Configuration keys of `clipdense.engine`.

Detectron2's own ``SOLVER`` keys keep their meaning; what follows is added to them.
"""

from detectron2.config import CfgNode as CN


def add_engine_config(cfg: CN) -> None:
    """Add the keys of `clipdense.engine` to ``cfg`` (in place)."""
    # "SGD" (with MOMENTUM, NESTEROV) or "AdamW" (with BETAS, EPS).
    cfg.SOLVER.OPTIMIZER = "SGD"
    # AdamW: decay rates of the two moments.
    cfg.SOLVER.BETAS = (0.9, 0.999)
    # AdamW: added to the denominator.
    cfg.SOLVER.EPS = 1e-8
    # LR at the end of WarmupCosineLR and WarmupPolyLR, absolute like BASE_LR.
    cfg.SOLVER.BASE_LR_END = 0.0
    # WarmupPolyLR: the LR is (1 - progress) ** POLY_LR_POWER.
    cfg.SOLVER.POLY_LR_POWER = 0.9
