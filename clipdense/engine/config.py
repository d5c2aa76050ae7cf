"""Configuration keys of `clipdense.engine`.

Detectron2's own ``SOLVER`` and ``TEST`` keys keep their meaning; what follows is added to them. An iteration
is one optimizer step on ``SOLVER.IMS_PER_BATCH`` images, however many processes and parts share them.
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
    # Weight decay of parameters with fewer than two axes that are neither norms nor biases (class tokens,
    # layer scale, temperatures); None follows WEIGHT_DECAY.
    cfg.SOLVER.WEIGHT_DECAY_VECTORS = None
    # Rules for parameters by name, the later one wins: a list of dicts with MATCH (regex, searched in the
    # full name) and any of LR (multiplier of BASE_LR), WEIGHT_DECAY, LAYER_DECAY (times this rate per ViT
    # block from the top), FREEZE (bool).
    cfg.SOLVER.PARAM_GROUPS = []

    # LR at the end of WarmupCosineLR and WarmupPolyLR, absolute like BASE_LR.
    cfg.SOLVER.BASE_LR_END = 0.0
    # WarmupPolyLR: the LR is BASE_LR * (1 - progress) ** POLY_LR_POWER.
    cfg.SOLVER.POLY_LR_POWER = 0.9
    # Wall-clock cap on training in seconds, evaluation during training included; 0 for none. Whichever of
    # MAX_ITER and MAX_SECONDS comes first ends training, and the LR schedule follows the one that is closer
    # to its end.
    cfg.SOLVER.MAX_SECONDS = 0.0

    # CLIP_GRADIENTS.CLIP_TYPE also takes "full_model": one norm over all gradients.
    # Type of autocast where AMP.ENABLED: "float16" (with loss scaling) or "bfloat16".
    cfg.SOLVER.AMP.DTYPE = "float16"
    # Split each process's batch into this many parts, one forward and backward each, one optimizer step
    # together.
    cfg.SOLVER.ACCUMULATION_STEPS = 1
    # DistributedDataParallel(find_unused_parameters=...): for models whose forward does not use every
    # parameter.
    cfg.SOLVER.FIND_UNUSED_PARAMETERS = False
    # Exponential moving average of the weights: its decay, e.g. 0.9998; 0 for none. It is what is evaluated
    # and exported.
    cfg.SOLVER.EMA_DECAY = 0.0
    # How many periodic checkpoints stay on disk; 0 for all. The final and the best one always stay.
    cfg.SOLVER.CHECKPOINT_KEEP = 0
    # Iterations between two log lines (and rows of metrics.json).
    cfg.SOLVER.LOG_PERIOD = 20

    # Metric that decides about model_best.pth, e.g. "bbox/AP50" ("name/bbox/AP50" with several test sets); ""
    # for none.
    cfg.TEST.BEST_METRIC = ""
    # Whether the best is the "max" or the "min".
    cfg.TEST.BEST_MODE = "max"

    # Turn every BatchNorm of the model into one whose statistics span all processes (CPU and GPU).
    cfg.MODEL.SYNC_BN = False
    # Glob patterns of parameters that MODEL.WEIGHTS may lack, hold in another shape, or hold in vain, e.g.
    # "roi_heads.box_predictor.*" for another class list. Anything else that does not fit is an error.
    cfg.MODEL.WEIGHTS_SKIP = ()
