"""Any timm model as a trunk."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import timm
import torch
from torch import Tensor, nn

from clipdense.backbone.timm_weights import load_timm_weights
from clipdense.backbone.trunk import NUM_STAGES, Trunk, check_pixel_statistics, feature_name

from detectron2.config import CfgNode as CN
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY

logger = logging.getLogger(__name__)


@BACKBONE_REGISTRY.register()
class TimmTrunk(Trunk):
    """A timm model without its head.

    Models with several strides give "res2" to "res5" (strides 4 to 32, those that they have); models with one
    stride, such as ViTs, give their last map alone under the name of its stride (16 -> "res4"): feed it to
    the simple feature pyramid.
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
    ) -> None:
        """
        Args:
            name: timm model name, without tag.
            pretrained: a timm tag ("" for the model's default one), a weight file in timm's layout, the name
                of a registry package that ships weights for this model, or "random".
            out_features: maps to give, e.g. ("res2", "res3"); empty for all. Later stages are not built.
            freeze_at, norm: see :class:`Trunk`.
            allow_pickle: whether a weight file may run code on loading.
            kwargs: further arguments of ``timm.create_model``.

        Raises:
            ValueError: unknown model, a map that it has not, a stage that cannot be frozen; and what
                `load_timm_weights` raises.
        """
        kwargs = dict(kwargs or {})
        probe, kwargs = _probe(name, kwargs)
        info: list[dict[str, Any]] = list(probe.feature_info)
        strides = [stage["reduction"] for stage in info]
        single = len(set(strides)) == 1
        # Several maps of one stride (densenet's last two): the later one counts.
        indices = {feature_name(s): i for i, s in enumerate(strides) if single or s >= 4}
        wanted = [f for f in indices if f in out_features] if out_features else list(indices)
        if missing := [f for f in out_features if f not in indices]:
            raise ValueError(
                f"timm model {name!r} gives {list(indices)}; MODEL.TRUNK.OUT_FEATURES asks for {missing}"
            )
        super().__init__(
            {f: ShapeSpec(channels=info[indices[f]]["num_chs"], stride=strides[indices[f]]) for f in wanted}
        )
        kwargs |= {"features_only": True, "out_indices": [indices[f] for f in wanted]}
        self.model = load_timm_weights(probe, name, pretrained, allow_pickle=allow_pickle, kwargs=kwargs)
        self.channels_last = str(getattr(self.model, "output_fmt", "NCHW")) in ("NHWC", "Format.NHWC")
        self._size_divisibility = strides[-1] if single else 0
        self._stage_ends = _stage_ends(info[: max(kwargs["out_indices"]) + 1], single)
        if 0 < freeze_at < NUM_STAGES and not self.stages()[0]:
            raise ValueError(
                f"the stages of timm model {name!r} are no modules of their own: MODEL.BACKBONE.FREEZE_AT "
                f"may be 0 (none) or {NUM_STAGES} (all) for it, not {freeze_at}"
            )
        self._freeze(freeze_at, norm)

    @classmethod
    def from_config(cls, cfg: CN, input_shape: ShapeSpec) -> dict[str, Any]:
        name: str = cfg.MODEL.TIMM.NAME
        if timm.is_model(name):
            statistics = timm.get_pretrained_cfg(name)
            check_pixel_statistics(cfg, name, statistics.mean, statistics.std)
        return {
            "name": name,
            "pretrained": cfg.MODEL.TIMM.PRETRAINED,
            "out_features": cfg.MODEL.TRUNK.OUT_FEATURES,
            "freeze_at": cfg.MODEL.BACKBONE.FREEZE_AT,
            "norm": cfg.MODEL.TRUNK.NORM,
            "allow_pickle": cfg.MODEL.ALLOW_PICKLE,
            "kwargs": dict(cfg.MODEL.TIMM.KWARGS),
        }

    @property
    def size_divisibility(self) -> int:
        """The patch size of a ViT; 0, no restriction, for others."""
        return self._size_divisibility

    def stages(self) -> list[list[nn.Module | nn.Parameter]]:
        stages: list[list[nn.Module | nn.Parameter]] = [[] for _ in range(NUM_STAGES)]
        modules = list(self.model.named_modules())
        # timm's feature wrappers rename modules: "stages.0" may be called "stages_0" or "model.stages.0".
        names = [f"{n.replace('.', '_')}_".removeprefix("model_").removeprefix("body_") for n, _ in modules]
        ends = []  # of stages 1 to 4, as positions in `modules`, which are registered in the order of use
        for name, included in self._stage_ends:
            hits = [i for i, n in enumerate(names) if n.startswith(f"{name.replace('.', '_')}_")]
            ends += [hits[-1] + 1 if included else hits[0]] if hits else []
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
    """The whole model on the meta device, for any image size where timm can; and the arguments for that."""
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
                logger.warning("timm model %s may take no other image size than %s", name, size)
    return model, kwargs


def _stage_ends(info: Sequence[Mapping[str, Any]], single: bool) -> list[tuple[str, bool]]:
    """Where stages 1 to 4 end: a module's name and whether it still belongs to the stage."""
    first = (info[0]["module"], False)
    if single:
        return [first, *((info[-(-len(info) * quarter // 4) - 1]["module"], True) for quarter in (1, 2, 3))]
    by_stride = {stage["reduction"]: (stage["module"], True) for stage in info}
    ends = [by_stride.get(2, first)]
    for stride in (4, 8, 16):
        ends.append(by_stride.get(stride, ends[-1]))
    return ends
