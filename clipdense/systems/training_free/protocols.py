"""Published settings of the methods on the eight benchmarks of training-free segmentation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["DATASETS", "PROTOCOLS", "protocol_overrides"]

DATASETS: dict[str, str] = {
    "voc21": "pascalvoc21_sem_seg_val",
    "voc20": "pascalvoc20_sem_seg_val",
    "context60": "pascal_context_60_sem_seg_val",
    "context59": "pascal_context_59_sem_seg_val",
    "coco_object": "coco_object_sem_seg_val",
    "coco_stuff": "coco_2017_val_stuff_sem_seg",
    "cityscapes": "cityscapes_fine_sem_seg_val",
    "ade20k": "ade20k_sem_seg_val",
}
"""Benchmark -> registered dataset."""

Settings = Mapping[str, Any]

_SCLIP_NAMES = {"voc21": "voc21_sclip", "voc20": "voc20_sclip", "coco_object": "coco_object_sclip"}
_PROXY_NAMES = {"voc21": "voc21_proxyclip", "coco_object": "coco_object_proxyclip"}
_CLEAR_NAMES = {"voc21": "voc21_clearclip", "coco_object": "coco_object_clearclip"}


def _protocol(
    names: Mapping[str, str],
    common: Settings,
    by_dataset: Mapping[str, Settings],
    sides: Mapping[str, int],
    side: int,
) -> dict[str, dict[str, Any]]:
    """Settings of one method by benchmark.

    Args:
        names: benchmark -> list of class names; the benchmark's own name is the default.
        common: keys of MODEL.ZERO_SHOT for all benchmarks.
        by_dataset: those of single benchmarks.
        sides: short side of the images by benchmark.
        side: that of the others.
    """
    return {
        name: {
            **{
                f"MODEL.ZERO_SHOT.{key}": value
                for key, value in {**common, **by_dataset.get(name, {})}.items()
            },
            "MODEL.ZERO_SHOT.CLASS_NAMES": names.get(name, name),
            "INPUT.MIN_SIZE_TEST": sides.get(name, side),
        }
        for name in DATASETS
    }


_BACKGROUND_01 = {name: {"PROB_THRESHOLD": 0.1} for name in ("voc21", "context60", "coco_object")}
_WINDOWS_224 = {"WINDOW": 224, "STRIDE": 112, "LOGIT_SCALE": 40.0}

_SCLIP = _protocol(
    _SCLIP_NAMES,
    _WINDOWS_224,
    {
        "voc21": {"LOGIT_SCALE": 65.0, "PROB_THRESHOLD": 0.1, "AREA_THRESHOLD": 0.1},
        "context60": {"LOGIT_SCALE": 50.0, "PROB_THRESHOLD": 0.1},
        "coco_object": {"LOGIT_SCALE": 50.0, "PROB_THRESHOLD": 0.1},
    },
    {"cityscapes": 560, "coco_stuff": 448},
    336,
)
_CLEARCLIP = _protocol(
    _CLEAR_NAMES,
    {"WINDOW": 448, "STRIDE": 224, "LOGIT_SCALE": 50.0},
    {
        "voc21": {"PROB_THRESHOLD": 0.5},
        "context60": {"PROB_THRESHOLD": 0.15},
        "coco_object": {"PROB_THRESHOLD": 0.4},
        "cityscapes": {"WINDOW": 224},
    },
    {},
    448,
)
_NACLIP = _protocol(
    _SCLIP_NAMES,
    {**_WINDOWS_224, "PAMR_STEPS": 10, "NORMALIZE_SCORES": True},
    {
        **_BACKGROUND_01,
        "voc21": {"WINDOW": 0, "PROB_THRESHOLD": 0.1},
        "voc20": {"WINDOW": 0},
    },
    {"cityscapes": 560},
    336,
)


def _resclip() -> dict[str, dict[str, Any]]:
    weights = {  # share of the cross-correlation; tau and share of the feedback; its threshold
        "voc21": (0.3, (2.2, 0.7), 0.5),
        "context60": (0.3, (1.8, 0.7), 0.3),
        "coco_object": (0.4, (1.8, 0.7), 0.11),
        "voc20": (0.6, (2.1, 0.6), 0.1),
        "cityscapes": (0.2, (2.1, 0.6), 0.1),
        "context59": (0.4, (1.8, 0.7), 0.25),
        "ade20k": (0.3, (2.1, 0.7), 0.25),
        "coco_stuff": (0.4, (1.8, 0.7), 0.11),
    }
    single = {}
    for name, (share, semantic, threshold) in weights.items():
        options = ["cross", [2.0, share], "semantic", list(semantic), "feedback_threshold", threshold]
        whole = {"WINDOW": 0} if name.startswith("voc") else {}
        single[name] = {"OPTIONS": options, **whole, **_BACKGROUND_01.get(name, {})}
    return _protocol(
        _SCLIP_NAMES, {**_WINDOWS_224, "NORMALIZE_SCORES": True}, single, {"cityscapes": 560}, 336
    )


_SCCLIP_SCORES: dict[str, Settings] = {
    "voc21": {"LOGIT_SCALE": 50.0, "PROB_THRESHOLD": 0.15, "AREA_THRESHOLD": 0.1},
    "context60": {"PROB_THRESHOLD": 0.15},
    "coco_object": {"LOGIT_SCALE": 55.0, "PROB_THRESHOLD": 0.35},
}
_PROXYCLIP = _protocol(
    _PROXY_NAMES,
    {"WINDOW": 336, "STRIDE": 112, "LOGIT_SCALE": 40.0, "FEATURES.NAME": "vit_base_patch8_224.dino"},
    {
        "voc21": {"PROB_THRESHOLD": 0.2},
        "context60": {"PROB_THRESHOLD": 0.15},
        "coco_object": {"PROB_THRESHOLD": 0.25},
        "cityscapes": {"WINDOW": 224},
    },
    {"ade20k": 448, "cityscapes": 448},
    336,
)


def _trident() -> dict[str, dict[str, Any]]:
    rows: dict[str, tuple[float, bool, float, float]] = {
        "voc21": (1.2, True, 0.2, 0.2),
        "context60": (1.2, True, 0.15, 0.15),
        "context59": (1.2, True, 0.15, 0.0),
        "coco_object": (1.2, True, 0.25, 0.25),
        "voc20": (0.0, True, 0.2, 0.0),
        "cityscapes": (3.0, False, 0.1, 0.0),
        "ade20k": (1.2, False, 0.05, 0.0),
        "coco_stuff": (1.2, True, 0.05, 0.0),
    }
    single = {}
    for name, (factor, negative, coarse, threshold) in rows.items():
        options: list[Any] = ["cos_fac", factor, "refine_neg_cos", negative]
        options += ["halves", True] if name == "cityscapes" else []
        stride = {"STRIDE": 112} if name == "voc20" else {}
        single[name] = {
            "OPTIONS": options,
            "SAM.COARSE_THRESHOLD": coarse,
            "PROB_THRESHOLD": threshold,
            **stride,
        }
    common = {
        "WINDOW": 336,
        "STRIDE": 224,
        "LOGIT_SCALE": 40.0,
        "FEATURES.NAME": "vit_base_patch16_224.dino",
        "SAM.NAME": "facebook/sam-vit-base",
        "SAM.REFINE": True,
        "SAM.IOU_THRESHOLD": 0.8,
    }
    sides = {"context60": 576, "context59": 576, "voc20": 336, "cityscapes": 688, "ade20k": 576}
    return _protocol(_PROXY_NAMES, common, single, sides, 448)


_LPOSS = _protocol(
    _PROXY_NAMES,
    {"WINDOW": 224, "STRIDE": 112, "FEATURES.NAME": "vit_base_patch16_224.dino"},
    {},
    {},
    448,
)

PROTOCOLS: dict[str, dict[str, dict[str, Any]]] = {
    "clip": _SCLIP,
    "maskclip": _SCLIP,
    "sclip": _SCLIP,
    "clearclip": _CLEARCLIP,
    "gem": _CLEARCLIP,
    "naclip": _NACLIP,
    "resclip": _resclip(),
    "scclip": _protocol(_SCLIP_NAMES, _WINDOWS_224, _SCCLIP_SCORES, {"cityscapes": 560}, 336),
    "sfp": _protocol(_SCLIP_NAMES, _WINDOWS_224, _SCCLIP_SCORES, {"cityscapes": 560, "ade20k": 384}, 336),
    "radseg": _SCLIP,
    "proxyclip": _PROXYCLIP,
    "trident": _trident(),
    "corrclip": {
        name: {**settings, "INPUT.MIN_SIZE_TEST": 448 if name in ("ade20k", "cityscapes") else 336}
        for name, settings in _PROXYCLIP.items()
    },
    "lposs": _LPOSS,
}
"""Method -> benchmark -> config overrides. Methods whose papers have no settings for CLIP of their own (clip,
maskclip, gem, radseg) take those of the nearest method."""


def protocol_overrides(method: str, benchmark: str) -> list[Any]:
    """Return the config overrides of a method on a benchmark, KEY VALUE in turn.

    Raises:
        ValueError: If there are none.
    """
    if method not in PROTOCOLS or benchmark not in DATASETS:
        raise ValueError(
            f"no settings of {method!r} on {benchmark!r}; methods: {', '.join(PROTOCOLS)}; benchmarks: "
            f"{', '.join(DATASETS)}"
        )
    settings = {
        "MODEL.ZERO_SHOT.METHOD": method,
        "DATASETS.TEST": [DATASETS[benchmark]],
        **PROTOCOLS[method][benchmark],
    }
    return [entry for pair in settings.items() for entry in pair]
