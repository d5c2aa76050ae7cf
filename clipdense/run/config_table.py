"""The range or the choices of every config key that has any."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, get_args

from clipdense.backbone.prompting import METHODS
from clipdense.clip.attention import MODES
from clipdense.clip.model import PRECISIONS
from clipdense.clip.position import POSITION_RULES
from clipdense.clip.prompts import NamePosition
from clipdense.clip.templates import get as template_set
from clipdense.data.image import ImageFormat
from clipdense.data.mappers import MAPPER_REGISTRY
from clipdense.engine.optimizer import ParamRule
from clipdense.evaluation.average_precision import BACKENDS
from clipdense.maskformer.prediction import PIXEL_DECODER_REGISTRY, TRANSFORMER_DECODER_REGISTRY
from clipdense.maskformer.targets import TARGETS
from clipdense.regions.crops import Fill, Sampling
from clipdense.regions.fusion import FUSIONS
from clipdense.run.config_checks import (
    Check,
    choice,
    device,
    either,
    item_of,
    items,
    matches_type,
    nothing,
    number,
    parsed,
    shown,
    text,
    whole,
)
from clipdense.run.config_table_captions import CAPTION_CHECKS
from clipdense.run.config_table_mask_pooling import MASK_POOLING_CHECKS
from clipdense.run.config_table_runs import RUN_CHECKS
from clipdense.run.config_zero_shot import ZERO_SHOT_CHECKS
from clipdense.systems.catseg.loss import IgnoredPixels
from clipdense.systems.catseg.meta_arch import FineTune
from clipdense.systems.denseclip.loss import LOSSES, SOURCES, Average
from clipdense.systems.fvlm.text import TextSource
from clipdense.systems.two_stage.scores import Empty, Source

from detectron2.modeling import (
    ANCHOR_GENERATOR_REGISTRY,
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    PROPOSAL_GENERATOR_REGISTRY,
    ROI_BOX_HEAD_REGISTRY,
    ROI_HEADS_REGISTRY,
    ROI_KEYPOINT_HEAD_REGISTRY,
    ROI_MASK_HEAD_REGISTRY,
    RPN_HEAD_REGISTRY,
)

__all__ = ["CHECKS"]

_POSITIVE, _COUNT, _SHARE = whole(1), whole(0), number(0, 1)
_AT_LEAST_0, _ABOVE_0 = number(0), number(above=0)
_NAMES = items(text())
_NORMS = (
    "BN",
    "SyncBN",
    "FrozenBN",
    "GN",
    "nnSyncBN",
    "naiveSyncBN",
    "naiveSyncBN_N",
    "LN",
)
_NORM = choice("", *_NORMS)
_BOX_LOSS = choice("smooth_l1", "giou", "diou", "ciou")
_POOLER = choice("ROIAlignV2", "ROIAlign", "ROIPool", "ROIAlignRotated")
_TEMPLATES = parsed(template_set, "a template set or a sentence with {} in it")
_OPTIONAL_TEMPLATES = either(choice(""), _TEMPLATES)
_RANGE = items(_ABOVE_0, length=2)
_RULES = choice("detectron2", "mmdetection")
_OPTIONAL_RULES = choice("", "detectron2", "mmdetection")
# Modes that take a guidance tensor need code that makes one.
_MODES = [name for name, mode in MODES.items() if not mode.guidance]


def _entries(registry: Iterable[tuple[str, Any]], *others: str) -> Check:
    return item_of(lambda: [*others, *(name for name, _ in registry)])


def _param_groups(value: Any) -> str | None:
    """Check SOLVER.PARAM_GROUPS."""
    ranges = {"lr": _AT_LEAST_0, "weight_decay": _AT_LEAST_0, "layer_decay": number(above=0, most=1)}
    if not isinstance(value, list | tuple) or not all(isinstance(rule, dict) for rule in value):
        return "a list of dicts, such as [{'MATCH': 'backbone', 'LR': 0.1}]"
    for rule in value:
        for name, check in {**ranges, "freeze": matches_type(True)}.items():
            entry = getattr(ParamRule.parse(rule), name)
            if entry is not None and (expected := check(entry)) is not None:
                return f"{expected} for {name.upper()} instead of {shown(entry)}"
    return None


def _crop_views(value: Any) -> str | None:
    """Check INPUT.CROP_CAPTION.VIEWS."""
    whole, share = _POSITIVE, _SHARE
    ranges = {"SIZE": whole, "PER_IMAGE": whole, "SHARE": _AT_LEAST_0, "OBJECTS": share, "WINDOWS": share}
    if not isinstance(value, list | tuple) or not value or not all(isinstance(view, dict) for view in value):
        return f"a list of one or more views, dicts with the keys {', '.join(ranges)}"
    for view in value:
        for key, check in ranges.items():
            if key in view and (expected := check(view[key])) is not None:
                return f"{expected} for {key} instead of {shown(view[key])}"
    return None if any(view.get("SHARE") for view in value) else "a SHARE above 0 for at least one view"


_TRAINING: dict[str, Check] = {
    "SEED": whole(),
    "OUTPUT_DIR": text(r"(?s)\s*\S.*", "the path of a folder"),
    "VIS_PERIOD": _COUNT,
    "SOLVER.IMS_PER_BATCH": whole(1, 100_000),
    "SOLVER.REFERENCE_WORLD_SIZE": _COUNT,
    "SOLVER.MAX_ITER": _POSITIVE,
    "SOLVER.MAX_SECONDS": _AT_LEAST_0,
    "SOLVER.BASE_LR": _AT_LEAST_0,
    "SOLVER.BASE_LR_END": _AT_LEAST_0,
    "SOLVER.BIAS_LR_FACTOR": either(nothing, _AT_LEAST_0),
    "SOLVER.MOMENTUM": number(0, below=1),
    "SOLVER.BETAS": items(number(0, below=1), length=2),
    "SOLVER.EPS": _ABOVE_0,
    "SOLVER.WEIGHT_DECAY": _AT_LEAST_0,
    "SOLVER.WEIGHT_DECAY_NORM": either(nothing, _AT_LEAST_0),
    "SOLVER.WEIGHT_DECAY_BIAS": either(nothing, _AT_LEAST_0),
    "SOLVER.WEIGHT_DECAY_VECTORS": either(nothing, _AT_LEAST_0),
    "SOLVER.PARAM_GROUPS": _param_groups,
    "SOLVER.OPTIMIZER": choice("SGD", "AdamW"),
    "SOLVER.LR_SCHEDULER_NAME": choice("WarmupMultiStepLR", "WarmupCosineLR", "WarmupPolyLR"),
    "SOLVER.GAMMA": _AT_LEAST_0,
    "SOLVER.STEPS": items(_COUNT),
    "SOLVER.POLY_LR_POWER": _AT_LEAST_0,
    "SOLVER.WARMUP_FACTOR": _AT_LEAST_0,
    "SOLVER.WARMUP_ITERS": _COUNT,
    "SOLVER.WARMUP_METHOD": choice("linear", "constant", "scaled_linear"),
    "SOLVER.MIN_LR": _AT_LEAST_0,
    "SOLVER.ACCUMULATION_STEPS": _POSITIVE,
    "SOLVER.EMA_DECAY": number(0, below=1),
    "SOLVER.CHECKPOINT_PERIOD": _POSITIVE,
    "SOLVER.CHECKPOINT_KEEP": _COUNT,
    "SOLVER.AMP.DTYPE": choice("float16", "bfloat16"),
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": choice("value", "norm", "full_model"),
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": _ABOVE_0,
    "SOLVER.CLIP_GRADIENTS.NORM_TYPE": either(_ABOVE_0, choice("inf")),
}

_DATA: dict[str, Check] = {
    "DATALOADER.NUM_WORKERS": _COUNT,
    "DATALOADER.SAMPLER_TRAIN": choice("TrainingSampler", "RepeatFactorTrainingSampler"),
    "DATALOADER.REPEAT_THRESHOLD": _AT_LEAST_0,
    "INPUT.MAPPER": _entries(MAPPER_REGISTRY),
    "INPUT.FORMAT": choice(*get_args(ImageFormat)),
    "INPUT.MASK_FORMAT": choice("polygon", "bitmask"),
    "INPUT.RANDOM_FLIP": choice("none", "horizontal", "vertical"),
    "INPUT.MIN_SIZE_TRAIN": either(items(_COUNT, least=1), _COUNT),
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": choice("choice", "range"),
    "INPUT.MAX_SIZE_TRAIN": _POSITIVE,
    "INPUT.MIN_SIZE_TEST": _COUNT,
    "INPUT.MAX_SIZE_TEST": _POSITIVE,
    "INPUT.CROP.TYPE": choice("relative_range", "relative", "absolute", "absolute_range"),
    "INPUT.CROP.SIZE": items(_ABOVE_0, length=2),
    "INPUT.CROP.SINGLE_CATEGORY_MAX_AREA": number(above=0, most=1),
    "INPUT.SCALE_JITTER.SIZE": _POSITIVE,
    "INPUT.SCALE_JITTER.RANGE": _RANGE,
    "INPUT.CROP_CAPTION.VIEWS": _crop_views,
    "INPUT.CLIPSELF.REGIONS": choice("patches", "proposals", "concepts"),
    "INPUT.CLIPSELF.IMAGE_SIZE": _POSITIVE,
    "INPUT.CLIPSELF.CROP_SIZE": _POSITIVE,
    "INPUT.CLIPSELF.MAX_BOXES": _POSITIVE,
    "INPUT.CLIPSELF.MAX_SPLIT": _POSITIVE,
    "INPUT.CLIPSELF.JITTER": _COUNT,
    "INPUT.CLIPSELF.CROP_SCALE": _AT_LEAST_0,
    "INPUT.OBJECT_CROP.SIZE": _POSITIVE,
    "INPUT.OBJECT_CROP.CONTEXT": _ABOVE_0,
    "INPUT.OBJECT_CROP.SCALE": _RANGE,
    "INPUT.MASK_PAIRS.SIZE": _POSITIVE,
    "INPUT.MASK_PAIRS.CROP_SCALE": _RANGE,
    "INPUT.MASK_PAIRS.CROP_RATIO": _RANGE,
}

_EVALUATION: dict[str, Check] = {
    "TEST.DETECTIONS_PER_IMAGE": whole(-1),
    "TEST.METRIC_BACKEND": choice(*BACKENDS),
    "TEST.MAX_DETS": _COUNT,
    "TEST.MAX_DENSE_CLASSES": _COUNT,
    "TEST.SEMANTIC.ALLOWED_PAIRS": _NAMES,
    "TEST.DENSE_REGIONS.MODE": choice("", *_MODES),
    "TEST.DENSE_REGIONS.IMAGE_SIZE": _COUNT,
    "TEST.DENSE_REGIONS.TEMPLATES": _TEMPLATES,
    "TEST.MASK_CLASSIFICATION.TEMPLATES": _TEMPLATES,
}

_MODEL: dict[str, Check] = {
    "MODEL.DEVICE": device,
    "MODEL.WEIGHTS_SKIP": _NAMES,
    "MODEL.META_ARCHITECTURE": _entries(META_ARCH_REGISTRY),
    "MODEL.PIXEL_MEAN": items(number(), length=(1, 3)),
    "MODEL.PIXEL_STD": items(_ABOVE_0, length=(1, 3)),
    "MODEL.BACKBONE.NAME": _entries(BACKBONE_REGISTRY),
    "MODEL.BACKBONE.FREEZE_AT": whole(0, 5),
    "MODEL.FPN.IN_FEATURES": _NAMES,
    "MODEL.FPN.OUT_CHANNELS": _POSITIVE,
    "MODEL.FPN.NORM": _NORM,
    "MODEL.FPN.FUSE_TYPE": choice("sum", "avg"),
    "MODEL.FPN.TOP_BLOCK": choice("", "LastLevelMaxPool", "LastLevelP6P7", "LastLevelP6P7NoReLU"),
    "MODEL.PROPOSAL_GENERATOR.NAME": _entries(PROPOSAL_GENERATOR_REGISTRY, "PrecomputedProposals"),
    "MODEL.PROPOSAL_GENERATOR.MIN_SIZE": _COUNT,
    "MODEL.ANCHOR_GENERATOR.NAME": _entries(ANCHOR_GENERATOR_REGISTRY),
    "MODEL.ANCHOR_GENERATOR.SIZES": items(either(items(_ABOVE_0, least=1), _ABOVE_0), least=1),
    "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": items(either(items(_ABOVE_0, least=1), _ABOVE_0), least=1),
    "MODEL.ANCHOR_GENERATOR.OFFSET": number(0, below=1),
    "MODEL.RPN.HEAD_NAME": _entries(RPN_HEAD_REGISTRY),
    "MODEL.RPN.IN_FEATURES": items(text(), least=1),
    "MODEL.RPN.IOU_THRESHOLDS": items(_SHARE, least=1),
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": _POSITIVE,
    "MODEL.RPN.POSITIVE_FRACTION": _SHARE,
    "MODEL.RPN.BBOX_REG_LOSS_TYPE": _BOX_LOSS,
    "MODEL.RPN.BBOX_REG_WEIGHTS": items(_ABOVE_0, length=(4, 5)),
    "MODEL.RPN.SMOOTH_L1_BETA": _AT_LEAST_0,
    "MODEL.RPN.LOSS_WEIGHT": _AT_LEAST_0,
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": _POSITIVE,
    "MODEL.RPN.PRE_NMS_TOPK_TEST": _POSITIVE,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": _POSITIVE,
    "MODEL.RPN.POST_NMS_TOPK_TEST": _POSITIVE,
    "MODEL.RPN.NMS_THRESH": _SHARE,
    "MODEL.RPN.NORM": _NORM,
    "MODEL.ROI_HEADS.NAME": _entries(ROI_HEADS_REGISTRY),
    "MODEL.ROI_HEADS.NUM_CLASSES": _POSITIVE,
    "MODEL.ROI_HEADS.IN_FEATURES": items(text(), least=1),
    "MODEL.ROI_HEADS.IOU_THRESHOLDS": items(_SHARE, least=1),
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": _POSITIVE,
    "MODEL.ROI_HEADS.POSITIVE_FRACTION": _SHARE,
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": _SHARE,
    "MODEL.ROI_HEADS.NMS_THRESH_TEST": _SHARE,
    "MODEL.ROI_BOX_HEAD.NAME": _entries(ROI_BOX_HEAD_REGISTRY, ""),
    "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE": _BOX_LOSS,
    "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS": items(_ABOVE_0, length=(4, 5)),
    "MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA": _AT_LEAST_0,
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": _POSITIVE,
    "MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO": _COUNT,
    "MODEL.ROI_BOX_HEAD.POOLER_TYPE": _POOLER,
    "MODEL.ROI_BOX_HEAD.NUM_FC": _COUNT,
    "MODEL.ROI_BOX_HEAD.FC_DIM": _POSITIVE,
    "MODEL.ROI_BOX_HEAD.NUM_CONV": _COUNT,
    "MODEL.ROI_BOX_HEAD.CONV_DIM": _POSITIVE,
    "MODEL.ROI_BOX_HEAD.NORM": _NORM,
    "MODEL.ROI_BOX_CASCADE_HEAD.IOUS": items(_SHARE, least=1),
    "MODEL.ROI_MASK_HEAD.NAME": _entries(ROI_MASK_HEAD_REGISTRY, ""),
    "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION": _POSITIVE,
    "MODEL.ROI_MASK_HEAD.POOLER_SAMPLING_RATIO": _COUNT,
    "MODEL.ROI_MASK_HEAD.NUM_CONV": _COUNT,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": _POSITIVE,
    "MODEL.ROI_MASK_HEAD.NORM": _NORM,
    "MODEL.ROI_KEYPOINT_HEAD.NAME": _entries(ROI_KEYPOINT_HEAD_REGISTRY, ""),
    "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS": _POSITIVE,
    "MODEL.SEM_SEG_HEAD.IN_FEATURES": items(text(), least=1),
    "MODEL.SEM_SEG_HEAD.IGNORE_VALUE": whole(-1),
    "MODEL.SEM_SEG_HEAD.NUM_CLASSES": _POSITIVE,
    "MODEL.SEM_SEG_HEAD.NORM": _NORM,
    "MODEL.SEM_SEG_HEAD.LOSS_WEIGHT": _AT_LEAST_0,
    "MODEL.SEM_SEG_HEAD.LOSS_AVERAGE": choice(*get_args(Average)),
    "MODEL.SEM_SEG_HEAD.LOSS_TYPE": choice("cross_entropy", "hard_pixel_mining"),
    "MODEL.SEM_SEG_HEAD.DROPOUT": number(0, below=1),
    "MODEL.SEM_SEG_HEAD.ASPP_DROPOUT": number(0, below=1),
    "MODEL.PANOPTIC_FPN.INSTANCE_LOSS_WEIGHT": _AT_LEAST_0,
    "MODEL.PANOPTIC_FPN.COMBINE.OVERLAP_THRESH": _SHARE,
    "MODEL.PANOPTIC_FPN.COMBINE.STUFF_AREA_LIMIT": _AT_LEAST_0,
    "MODEL.PANOPTIC_FPN.COMBINE.INSTANCES_CONFIDENCE_THRESH": _SHARE,
    "MODEL.RETINANET.NUM_CLASSES": _POSITIVE,
    "MODEL.RETINANET.IN_FEATURES": items(text(), least=1),
    "MODEL.RETINANET.NUM_CONVS": _COUNT,
    "MODEL.RETINANET.IOU_THRESHOLDS": items(_SHARE, least=1),
    "MODEL.RETINANET.PRIOR_PROB": number(above=0, below=1),
    "MODEL.RETINANET.SCORE_THRESH_TEST": _SHARE,
    "MODEL.RETINANET.TOPK_CANDIDATES_TEST": _POSITIVE,
    "MODEL.RETINANET.NMS_THRESH_TEST": _SHARE,
    "MODEL.RETINANET.BBOX_REG_WEIGHTS": items(_ABOVE_0, length=4),
    "MODEL.RETINANET.FOCAL_LOSS_GAMMA": _AT_LEAST_0,
    "MODEL.RETINANET.FOCAL_LOSS_ALPHA": either(_SHARE, whole(-1, -1)),
    "MODEL.RETINANET.SMOOTH_L1_LOSS_BETA": _AT_LEAST_0,
    "MODEL.RETINANET.BBOX_REG_LOSS_TYPE": _BOX_LOSS,
    "MODEL.RETINANET.NORM": _NORM,
    "MODEL.RETINANET.RULES": _RULES,
    "MODEL.RETINANET.RULE_OVERRIDES.LOW_QUALITY_MATCHES": _OPTIONAL_RULES,
    "MODEL.RETINANET.RULE_OVERRIDES.LOSS_NORMALIZER": _OPTIONAL_RULES,
    "MODEL.RETINANET.RULE_OVERRIDES.DELTA_CLAMP": _OPTIONAL_RULES,
    "MODEL.RETINANET.RULE_OVERRIDES.TEST_CANDIDATES": _OPTIONAL_RULES,
    "MODEL.RETINANET.RULE_OVERRIDES.CLIP_BEFORE_NMS": _OPTIONAL_RULES,
    "MODEL.RESNETS.DEPTH": whole(1),
    "MODEL.RESNETS.OUT_FEATURES": items(text(), least=1),
    "MODEL.RESNETS.NORM": _NORM,
    "MODEL.RESNETS.STEM_TYPE": choice("deeplab", "basic"),
}

_CLIP: dict[str, Check] = {
    "MODEL.CLIP.POSITION_RULE": choice(*POSITION_RULES),
    "MODEL.CLIP.POSITION_GRID": _COUNT,
    "MODEL.CLIP.PATCH_STRIDE": _COUNT,
    "MODEL.CLIP.DROP_PATH": number(0, below=1),
    "MODEL.TRUNK.BLOCKS": items(_COUNT),
    "MODEL.TRUNK.NAME": _entries(BACKBONE_REGISTRY),
    "MODEL.TRUNK.OUT_FEATURES": _NAMES,
    "MODEL.TRUNK.NORM": choice("BN", "FrozenBN"),
    "MODEL.TRUNK.WINDOW_SIZE": _COUNT,
    "MODEL.TRUNK.GLOBAL_BLOCKS": items(_COUNT),
    "MODEL.SIMPLE_PYRAMID.SCALE_FACTORS": items(_ABOVE_0, least=1),
    "MODEL.SIMPLE_PYRAMID.NORM": _NORM,
    "MODEL.FROZEN_CLIP.BLOCKS": items(_COUNT),
    "MODEL.FROZEN_CLIP.LAST_BLOCK": choice(*_MODES),
    "MODEL.FROZEN_CLIP.JOINT": choice("pooling", *_MODES),
    "MODEL.INTERPOLATED.SCALE_FACTORS": items(_ABOVE_0, least=1),
    "MODEL.INTERPOLATED.NORM": _NORM,
    "MODEL.LANGUAGE.TRUNK": _entries(BACKBONE_REGISTRY),
    "MODEL.LANGUAGE.BESIDE": _entries(BACKBONE_REGISTRY),
    "MODEL.LANGUAGE.CLASSES": _NAMES,
    "MODEL.LANGUAGE.CLASSES_FROM": choice("thing_classes", "stuff_classes"),
    "MODEL.LANGUAGE.TEXT": choice("tower", "table"),
    "MODEL.LANGUAGE.TABLE_DIM": _COUNT,
    "MODEL.LANGUAGE.N_CONTEXTS": _COUNT,
    "MODEL.LANGUAGE.CONTEXT_STD": _AT_LEAST_0,
    "MODEL.LANGUAGE.CONTEXT_DECODER.WIDTH": _POSITIVE,
    "MODEL.LANGUAGE.CONTEXT_DECODER.HEADS": _POSITIVE,
    "MODEL.LANGUAGE.CONTEXT_DECODER.LAYERS": _COUNT,
    "MODEL.LANGUAGE.CONTEXT_DECODER.DROPOUT": number(0, below=1),
    "MODEL.LANGUAGE.TAU": _ABOVE_0,
    "MODEL.LANGUAGE.SCORE": choice("scaled", "cosine", "centred"),
    "MODEL.LANGUAGE.LAST_MAP": choice("trunk", "dense"),
    "MODEL.PROMPT.METHOD": choice(*METHODS),
    "MODEL.PROMPT.N_CONTEXTS": _POSITIVE,
    "MODEL.PROMPT.POSITION": choice(*get_args(NamePosition)),
    "MODEL.PROMPT.CONTEXT_STD": _AT_LEAST_0,
    "MODEL.PROMPT.INSTANCE_TOKENS": _POSITIVE,
    "MODEL.PROMPT.PRE_MODEL.WIDTH": _POSITIVE,
    "MODEL.PROMPT.PRE_MODEL.HEADS": _POSITIVE,
    "MODEL.PROMPT.PRE_MODEL.LAYERS": _COUNT,
    "MODEL.PROMPT.PRE_MODEL.DROPOUT": number(0, below=1),
    "MODEL.PROMPT.VISUAL.N_TOKENS": _COUNT,
    "MODEL.PROMPT.VISUAL.PROJECT": _COUNT,
    "MODEL.PROMPT.VISUAL.DROPOUT": number(0, below=1),
    "MODEL.CONTRASTIVE_CLIP.CENTRING_WEIGHT": _AT_LEAST_0,
    "MODEL.CONTRASTIVE_CLIP.INIT_LOGIT_SCALE": _AT_LEAST_0,
    "MODEL.CONTRASTIVE_CLIP.MAX_LOGIT_SCALE": number(1),
}

_MASK_FORMER: dict[str, Check] = {
    "IN_FEATURES": items(text(), least=1),
    "SIZE_DIVISIBILITY": _COUNT,
    "PIXEL_DECODER.NAME": _entries(PIXEL_DECODER_REGISTRY),
    "PIXEL_DECODER.CONV_DIM": _POSITIVE,
    "PIXEL_DECODER.NORM": _NORM,
    "PIXEL_DECODER.ENC_LAYERS": _COUNT,
    "PIXEL_DECODER.DIM_FEEDFORWARD": _POSITIVE,
    "PIXEL_DECODER.POINTS": _POSITIVE,
    "TRANSFORMER_DECODER": _entries(TRANSFORMER_DECODER_REGISTRY),
    "MASK_DIM": _POSITIVE,
    "HIDDEN_DIM": _POSITIVE,
    "NUM_OBJECT_QUERIES": _POSITIVE,
    "NHEADS": _POSITIVE,
    "DIM_FEEDFORWARD": _POSITIVE,
    "DROPOUT": number(0, below=1),
    "ENC_LAYERS": _COUNT,
    "DEC_LAYERS": _POSITIVE,
    "TARGETS": choice(*TARGETS),
    "CLASS_WEIGHT": _AT_LEAST_0,
    "MASK_WEIGHT": _AT_LEAST_0,
    "DICE_WEIGHT": _AT_LEAST_0,
    "NO_OBJECT_WEIGHT": _AT_LEAST_0,
    "TRAIN_NUM_POINTS": _COUNT,
    "OVERSAMPLE_RATIO": number(1),
    "IMPORTANCE_SAMPLE_RATIO": _SHARE,
    "TEST.MASK_SOURCE": text(r"(?s)\s*\S.*", "network, ground_truth, or the path of masks"),
    "TEST.OBJECT_MASK_THRESHOLD": _SHARE,
    "TEST.OVERLAP_THRESHOLD": _SHARE,
    "TEST.PIXEL_THRESHOLD": _SHARE,
}

_CROP: dict[str, Check] = {
    "MASK_PROMPTS.DEPTH": _COUNT,
    "CROP.THRESHOLD": _SHARE,
    "CROP.SAMPLING": choice(*get_args(Sampling)),
    "CROP.FILL": choice(*get_args(Fill)),
    "CROP.EXPAND": _ABOVE_0,
    "CROP_BATCH_SIZE": _POSITIVE,
}

_SYSTEMS: dict[str, Check] = {
    "MODEL.CAT_SEG.RESOLUTION": _POSITIVE,
    "MODEL.CAT_SEG.DENSE": choice(*_MODES),
    "MODEL.CAT_SEG.GUIDANCE": items(_COUNT, length=(2, 3)),
    "MODEL.CAT_SEG.GUIDANCE_DIMS": items(_POSITIVE, length=2),
    "MODEL.CAT_SEG.DECODER_GUIDANCE_DIMS": items(_POSITIVE, length=(2, 3)),
    "MODEL.CAT_SEG.DECODER_DIMS": items(_POSITIVE, length=(2, 3)),
    "MODEL.CAT_SEG.FINETUNE": choice(*get_args(FineTune)),
    "MODEL.CAT_SEG.TEMPLATES": _TEMPLATES,
    "MODEL.CAT_SEG.SYNONYMS": choice("first", "mean"),
    "MODEL.CAT_SEG.HIDDEN_DIM": _POSITIVE,
    "MODEL.CAT_SEG.HEADS": _POSITIVE,
    "MODEL.CAT_SEG.LAYERS": _COUNT,
    "MODEL.CAT_SEG.KERNELS": items(_POSITIVE, length=3),
    "MODEL.CAT_SEG.WINDOW": _POSITIVE,
    "MODEL.CAT_SEG.IMAGE_GUIDANCE_DIM": _POSITIVE,
    "MODEL.CAT_SEG.TEXT_GUIDANCE_DIM": _POSITIVE,
    "MODEL.CAT_SEG.MAX_CLASSES": _POSITIVE,
    "MODEL.CAT_SEG.POOLING": items(_POSITIVE, length=2),
    "MODEL.CAT_SEG.IGNORED_PIXELS": choice(*get_args(IgnoredPixels)),
    "MODEL.CAT_SEG.REJECTION.SCORES": choice("cost", "heads"),
    "MODEL.CAT_SEG.REJECTION.TOPK": _COUNT,
    "MODEL.CAT_SEG.TEST.POOLING": items(_POSITIVE, length=2),
    "MODEL.CAT_SEG.TEST.WINDOWS.IMAGE_SIZE": _POSITIVE,
    "MODEL.CAT_SEG.TEST.WINDOWS.SIZE": _POSITIVE,
    "MODEL.CAT_SEG.TEST.WINDOWS.STRIDE": _POSITIVE,
    "MODEL.CAT_SEG.TEST.VIEWS_PER_FORWARD": _POSITIVE,
    "MODEL.CAT_SEG.TEST.MAX_MAPS": _COUNT,
    "MODEL.CLIPSELF.MODE": choice(*_MODES),
    "MODEL.CLIPSELF.UNLOCKED_GROUPS": whole(-1),
    "MODEL.CLIPSELF.ALPHA": _AT_LEAST_0,
    "MODEL.CLIPSELF.WEIGHT": _AT_LEAST_0,
    "MODEL.CLIPSELF.MULTISCALE": items(_POSITIVE),
    "MODEL.CLIPSELF.EMBEDDING_WEIGHT": _AT_LEAST_0,
    "MODEL.CLIPSELF.WINDOW": _COUNT,
    "MODEL.CLIPSELF.NUM_CONCEPTS": _POSITIVE,
    "MODEL.SEMANTIC_SEGMENTOR.WINDOW": items(_POSITIVE),
    "MODEL.SEMANTIC_SEGMENTOR.STRIDE": items(_POSITIVE),
    "MODEL.SEMANTIC_SEGMENTOR.BATCH_SIZE": _POSITIVE,
    "MODEL.SEMANTIC_SEGMENTOR.MEMORY_LIMIT": _COUNT,
    "MODEL.SEMANTIC_SEGMENTOR.SCALES": items(_ABOVE_0, least=1),
    "MODEL.PIXEL_TEXT.BASE": _entries(META_ARCH_REGISTRY),
    "MODEL.PIXEL_TEXT.SOURCE": choice(*SOURCES),
    "MODEL.PIXEL_TEXT.LOSS": choice(*LOSSES),
    "MODEL.PIXEL_TEXT.WEIGHT": _AT_LEAST_0,
    "MODEL.PIXEL_TEXT.ALIGNMENT_WEIGHT": _AT_LEAST_0,
    "MODEL.FVLM.TEXT_SOURCE": choice(*get_args(TextSource)),
    "MODEL.FVLM.TEMPLATES": _TEMPLATES,
    "MODEL.FVLM.SYNONYMS": choice("mean", "first"),
    "MODEL.FVLM.BACKGROUND": choice("text", "learned"),
    "MODEL.FVLM.BACKGROUND_WEIGHT": _AT_LEAST_0,
    "MODEL.FVLM.SCALE": _ABOVE_0,
    "MODEL.FVLM.BOX_FC_DIM": _COUNT,
    "MODEL.FVLM.CLIP_SCALE": _ABOVE_0,
    "MODEL.FVLM.FUSION": choice(*FUSIONS),
    "MODEL.FVLM.ALPHA": _SHARE,
    "MODEL.FVLM.BETA": _SHARE,
    "MODEL.FVLM.FINEST_BOX_SIZE": _ABOVE_0,
    "MODEL.FVLM.SQUARE_SIZE": _COUNT,
    "MODEL.TEXT_RCNN.TEMPLATES": _TEMPLATES,
    "MODEL.TEXT_RCNN.BACKGROUND": choice("learned", "zero"),
    "MODEL.TEXT_RCNN.TEMPERATURE": _ABOVE_0,
    "MODEL.TWO_STAGE.TEMPLATES": _TEMPLATES,
    "MODEL.TWO_STAGE.TRAIN_TEMPLATES": _OPTIONAL_TEMPLATES,
    "MODEL.TWO_STAGE.CROP_TEMPLATES": _OPTIONAL_TEMPLATES,
    "MODEL.TWO_STAGE.PROMPT_CONTEXT": items(_COUNT, length=2),
    "MODEL.TWO_STAGE.EMBED_LAYERS": _POSITIVE,
    "MODEL.TWO_STAGE.EMBED_HIDDEN_DIM": _POSITIVE,
    "MODEL.TWO_STAGE.CROP_SCALE": _AT_LEAST_0,
    "MODEL.TWO_STAGE.PRECISION": choice(*PRECISIONS),
    "MODEL.TWO_STAGE.SCORES.SOURCE": choice(*get_args(Source)),
    "MODEL.TWO_STAGE.SCORES.EMPTY": choice(*get_args(Empty)),
    "MODEL.TWO_STAGE.SCORES.FUSION": choice(*FUSIONS),
    "MODEL.TWO_STAGE.SCORES.ALPHA": _SHARE,
    "MODEL.TWO_STAGE.SCORES.BETA": _SHARE,
    "MODEL.TWO_STAGE.SCORES.MIN_QUERY_SCORE": _SHARE,
    "MODEL.TWO_STAGE.CALIBRATION": number(),
    "MODEL.PROMPTED_CLIP.TEMPLATES": _TEMPLATES,
    "MODEL.PROMPTED_CLIP.DENSE": choice(*MODES),
    "MODEL.PROMPTED_CLIP.ALIGNMENT_WEIGHT": _AT_LEAST_0,
    "MODEL.MASK_ADAPTED_CLIP.TRAINABLE": choice("image", "prompts", "both"),
    "MODEL.MASK_ADAPTED_CLIP.TEMPLATES": _TEMPLATES,
    "MODEL.MASK_ADAPTED_CLIP.MAX_LOGIT_SCALE": number(1),
}

CHECKS: dict[str, Check] = {
    **_TRAINING,
    **_DATA,
    **_EVALUATION,
    **_MODEL,
    **_CLIP,
    **{f"MODEL.MASK_FORMER.{key}": check for key, check in _MASK_FORMER.items()},
    **{f"MODEL.TWO_STAGE.{key}": check for key, check in _CROP.items()},
    **{f"MODEL.MASK_ADAPTED_CLIP.{key}": check for key, check in _CROP.items()},
    **ZERO_SHOT_CHECKS,
    **CAPTION_CHECKS,
    **MASK_POOLING_CHECKS,
    **RUN_CHECKS,
    **_SYSTEMS,
}
"""Full name of a key -> the check of its value."""
