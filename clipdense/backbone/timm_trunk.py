"""Timm models as trunks."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import timm
import torch
from torch import Tensor, nn

from clipdense.backbone.timm_weights import is_local, load_timm_weights
from clipdense.backbone.trunk import NUM_STAGES, PixelConversion, Trunk, feature_name

from detectron2.config import CfgNode as CN
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY

logger = logging.getLogger(__name__)


@BACKBONE_REGISTRY.register()
class TimmTrunk(Trunk):
    """A timm model without its head.

    Models with several strides return "res2" to "res5" (strides 4 to 32, as far as they have them). Models
    with one stride, such as ViTs, return their last map, named by its stride (16 -> "res4"), for the simple
    feature pyramid.
    """

    @configurable
    def __init__(
        self,
        name: str,
        *,
        pretrained: str = "",
        out_features: Sequence[str] = (),
        freeze_at: int = 0,
        norm: str = "BN",
        allow_pickle: bool = False,
        kwargs: Mapping[str, Any] | None = None,
        pixels: PixelConversion | None = None,
    ) -> None:
        """
        Args:
            name: timm model name, without tag.
            pretrained: a timm tag ("": the model's default tag), a weight file in timm's layout, the name of
                a package of the Python index that ships weights for this model, or "random".
            out_features: names of the maps to return, e.g. ("res2", "res3"); empty: all. Later stages are not
                built.
            freeze_at, norm: see :class:`Trunk`.
            allow_pickle: whether a weight file may be a pickle, which can run code on loading.
            kwargs: further arguments of ``timm.create_model``.
            pixels: see :class:`Trunk`.

        Raises:
            ValueError: If the model is unknown, lacks one of the maps, or has no separate stages to freeze.
                See also `load_timm_weights`.
        """
        kwargs = dict(kwargs or {})
        probe, kwargs = _probe(name, kwargs)
        info: list[dict[str, Any]] = list(probe.feature_info)
        strides = [stage["reduction"] for stage in info]
        single = len(set(strides)) == 1
        # Of several maps with one stride (the last two of a DenseNet), the last one is used.
        indices = {feature_name(s): i for i, s in enumerate(strides) if single or s >= 4}
        chosen = [f for f in indices if f in out_features] if out_features else list(indices)
        if missing := [f for f in out_features if f not in indices]:
            raise ValueError(
                f"MODEL.TRUNK.OUT_FEATURES {missing}: the maps of timm model {name!r} are {list(indices)}"
            )
        super().__init__(
            {f: ShapeSpec(channels=info[indices[f]]["num_chs"], stride=strides[indices[f]]) for f in chosen},
            pixels,
        )
        kwargs |= {"features_only": True, "out_indices": [indices[f] for f in chosen]}
        self.model = load_timm_weights(probe, name, pretrained, allow_pickle=allow_pickle, kwargs=kwargs)
        self.channels_last = str(getattr(self.model, "output_fmt", "NCHW")) in ("NHWC", "Format.NHWC")
        self._size_divisibility = strides[-1] if single else 0
        self._stage_ends = _stage_ends(info[: max(kwargs["out_indices"]) + 1], single)
        if 0 < freeze_at < NUM_STAGES and not self.stages()[0]:
            raise ValueError(
                f"timm model {name!r} has no separate stages: MODEL.BACKBONE.FREEZE_AT must be 0 (none) or "
                f"{NUM_STAGES} (all), not {freeze_at}"
            )
        self._freeze(freeze_at, norm)

    @classmethod
    def from_config(cls, cfg: CN, input_shape: ShapeSpec) -> dict[str, Any]:
        name: str = cfg.MODEL.TIMM.NAME
        pretrained: str = cfg.MODEL.TIMM.PRETRAINED
        pixels = None
        if timm.is_model(name):
            statistics = timm.get_pretrained_cfg(name)
            pixels = PixelConversion.from_config(cfg, name, statistics.mean, statistics.std)
        return {
            "name": name,
            "pretrained": pretrained if cfg.MODEL.FETCH_WEIGHTS or is_local(pretrained) else "random",
            "out_features": cfg.MODEL.TRUNK.OUT_FEATURES,
            "freeze_at": cfg.MODEL.BACKBONE.FREEZE_AT,
            "norm": cfg.MODEL.TRUNK.NORM,
            "allow_pickle": cfg.MODEL.ALLOW_PICKLE,
            "kwargs": dict(cfg.MODEL.TIMM.KWARGS),
            "pixels": pixels,
        }

    @property
    def size_divisibility(self) -> int:
        """Patch size of a ViT; 0 (no restriction) for other models."""
        return self._size_divisibility

    def stages(self) -> list[list[nn.Module | nn.Parameter]]:
        stages: list[list[nn.Module | nn.Parameter]] = [[] for _ in range(NUM_STAGES)]
        modules = list(self.model.named_modules())
        # timm's feature wrappers rename modules: "stages.0" may become "stages_0" or "model.stages.0".
        names = [f"{n.replace('.', '_')}_".removeprefix("model_").removeprefix("body_") for n, _ in modules]
        ends = []  # of stages 1 to 4: positions in `modules`, which are in the order of use
        for name, included in self._stage_ends:
            found = [i for i, n in enumerate(names) if n.startswith(f"{name.replace('.', '_')}_")]
            ends += [found[-1] + 1 if included else found[0]] if found else []
        for index, (_, module) in enumerate(modules):
            stage = (
                sum(index >= end for end in ends) if len(ends) == len(self._stage_ends) else NUM_STAGES - 1
            )
            parts = [module] if not any(True for _ in module.children()) else module.parameters(recurse=False)
            stages[stage].extend(parts)
        return stages

    def features(self, images: Tensor) -> dict[str, Tensor]:
        maps = self.model(images)
        if self.channels_last:
            maps = [m.permute(0, 3, 1, 2).contiguous() for m in maps]
        return dict(zip(self._outputs, maps, strict=True))


def _probe(name: str, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Build the whole model on the meta device, for any image size if timm supports it.

    Returns:
        The model, and the arguments of ``timm.create_model`` for it.

    Raises:
        ValueError: If the model is unknown; lists near matches.
    """
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=5)
        raise ValueError(f"unknown timm model {name!r} (MODEL.TIMM.NAME); near matches: {near}")
    with torch.device("meta"):
        model = timm.create_model(name, **kwargs)
        if model.pretrained_cfg.get("fixed_input_size") and "dynamic_img_size" not in kwargs:
            try:
                return timm.create_model(name, dynamic_img_size=True, **kwargs), kwargs | {
                    "dynamic_img_size": True
                }
            except TypeError:
                size = tuple(model.pretrained_cfg["input_size"][1:])
                logger.warning("timm model %s may not support image sizes other than %s", name, size)
    return model, kwargs


def _stage_ends(info: Sequence[Mapping[str, Any]], single: bool) -> list[tuple[str, bool]]:
    """Return where stages 1 to 4 end: a module's name, and whether the module belongs to the stage."""
    first = (info[0]["module"], False)
    if single:
        return [first, *((info[-(-len(info) * quarter // 4) - 1]["module"], True) for quarter in (1, 2, 3))]
    by_stride = {stage["reduction"]: (stage["module"], True) for stage in info}
    ends = [by_stride.get(2, first)]
    for stride in (4, 8, 16):
        ends.append(by_stride.get(stride, ends[-1]))
    return ends
