"""Optimizers, parameter groups by rule, and gradient clipping."""

import dataclasses
import difflib
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from tabulate import tabulate
from torch import nn

from clipdense.engine.options import ConfigError

from detectron2.config import CfgNode

__all__ = ["ParamRule", "build_clipper", "build_optimizer", "freeze", "keep_frozen_in_eval", "param_groups"]

_NORMS = (
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.LocalResponseNorm,
)
_BLOCK = re.compile(r"(?:^|\.)(?:blocks|resblocks|layers)\.(\d+)\.")
_STEM = re.compile(
    r"(?:^|\.)(?:patch_embed|conv1|embeddings?|pos_embed|positional_embedding|cls_token|class_embedding"
    r"|reg_token|mask_token|norm_pre|ln_pre)(?:\.|$)"
)


@dataclass(frozen=True)
class ParamRule:
    """What a rule of ``SOLVER.PARAM_GROUPS`` sets for parameters in whose names ``match`` (a regex) is found.

    Attributes:
        lr: multiplier of the base learning rate.
        weight_decay: absolute; None leaves it.
        layer_decay: extra learning-rate factor of a ViT's parameters, ``layer_decay ** (layers above)``: 1
            for what comes after the blocks, smallest for the patch embedding and position table (BEiT, Bao et
            al. 2021).
        freeze: not trained at all.
    """

    match: str
    lr: float | None = None
    weight_decay: float | None = None
    layer_decay: float | None = None
    freeze: bool | None = None

    @classmethod
    def parse(cls, rule: Mapping[str, Any]) -> "ParamRule":
        """From a dict with upper- or lower-case keys.

        Raises:
            ConfigError: an unknown key (with near ones), no ``MATCH``, or an invalid regex.
        """
        known = [f.name for f in dataclasses.fields(cls)]
        values = {str(key).lower(): value for key, value in rule.items()}
        for key in values:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1, cutoff=0.4)
                hint = f"; did you mean {near[0].upper()}?" if near else ""
                raise ConfigError(f"SOLVER.PARAM_GROUPS: unknown key {key.upper()!r} in {dict(rule)}{hint}")
        if not isinstance(values.get("match"), str):
            raise ConfigError(f"SOLVER.PARAM_GROUPS: {dict(rule)} has no MATCH (a regex for parameter names)")
        try:
            re.compile(values["match"])
        except re.error as e:
            raise ConfigError(f"SOLVER.PARAM_GROUPS: MATCH {values['match']!r} is not a regex: {e}") from e
        return cls(**values)

    def matched(self, model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters it is about.

        Raises:
            ConfigError: none is.
        """
        found = False
        for name, parameter in model.named_parameters():
            if re.search(self.match, name):
                found = True
                yield name, parameter
        if not found:
            tops = ", ".join(sorted({name.split(".")[0] for name, _ in model.named_parameters()}))
            raise ConfigError(
                f"SOLVER.PARAM_GROUPS: MATCH {self.match!r} is in no parameter name; they begin with {tops}"
            )


def freeze(model: nn.Module, rules: Iterable[ParamRule]) -> None:
    """Set ``requires_grad`` as the rules with ``freeze`` say."""
    for rule in rules:
        if rule.freeze is not None:
            for _, parameter in rule.matched(model):
                parameter.requires_grad_(not rule.freeze)


def keep_frozen_in_eval(model: nn.Module) -> None:
    """Put norms, dropouts and other leaf layers of wholly frozen modules into evaluation mode.

    Call it after ``model.train()``. A frozen trunk then computes the same features in training as in
    evaluation: no batch statistics, no dropout.
    """
    parameters = list(model.parameters())
    if parameters and not any(p.requires_grad for p in parameters):
        for module in model.modules():
            if next(module.children(), None) is None:
                module.eval()
        return
    for child in model.children():
        keep_frozen_in_eval(child)


def param_groups(
    model: nn.Module,
    base_lr: float,
    weight_decay: float,
    weight_decay_norm: float | None = None,
    weight_decay_bias: float | None = None,
    weight_decay_vectors: float | None = None,
    bias_lr_factor: float = 1.0,
    rules: Iterable[ParamRule] = (),
) -> list[dict[str, Any]]:
    """Groups of the trainable parameters of ``model`` that share learning rate and weight decay.

    ``weight_decay_*`` None follows ``weight_decay``; ``rules`` win over all of them, a later rule over an
    earlier one.

    Returns:
        Dicts with ``params``, ``lr``, ``weight_decay`` and ``names`` for `torch.optim`.
    """
    settings: dict[str, dict[str, float]] = {}
    parameters: dict[str, nn.Parameter] = {}
    seen: set[nn.Parameter] = set()
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or parameter in seen:
                continue
            seen.add(parameter)
            full = f"{module_name}.{name}" if module_name else name
            parameters[full] = parameter
            special: float | None = None
            if name == "bias" and weight_decay_bias is not None:
                special = weight_decay_bias
            elif isinstance(module, _NORMS):
                special = weight_decay_norm
            elif parameter.ndim < 2 and name != "bias":
                special = weight_decay_vectors
            settings[full] = {
                "lr": base_lr * (bias_lr_factor if name == "bias" else 1.0),
                "weight_decay": weight_decay if special is None else special,
            }
    layer_scale: dict[str, float] = {}
    for rule in rules:
        matched = [name for name, _ in rule.matched(model)]
        if rule.layer_decay is not None:
            layer_scale.update(_layer_scales(matched, rule.layer_decay))
        for name in settings.keys() & set(matched):
            if rule.lr is not None:
                settings[name]["lr"] = base_lr * rule.lr
            if rule.weight_decay is not None:
                settings[name]["weight_decay"] = rule.weight_decay
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in parameters.items():
        lr, decay = settings[name]["lr"] * layer_scale.get(name, 1.0), settings[name]["weight_decay"]
        group = groups.setdefault((lr, decay), {"params": [], "lr": lr, "weight_decay": decay, "names": []})
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def _layer_scales(names: list[str], rate: float) -> dict[str, float]:
    """``rate ** depth`` of ViT parameters; depth 0 above the blocks, the number of blocks + 1 below them."""
    blocks = {name: int(m.group(1)) for name in names if (m := _BLOCK.search(name))}
    if not blocks:
        raise ConfigError(
            "SOLVER.PARAM_GROUPS: LAYER_DECAY needs names with blocks (blocks.N, resblocks.N, layers.N)"
        )
    count = max(blocks.values()) + 1
    depth = {
        name: count - blocks[name] if name in blocks else (count + 1) * bool(_STEM.search(name))
        for name in names
    }
    return {name: rate**d for name, d in depth.items()}


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer that ``SOLVER.OPTIMIZER`` names, over what ``SOLVER.PARAM_GROUPS`` leaves to train.

    Raises:
        ConfigError: an unknown optimizer, a bad rule, or nothing to train.
    """
    s = cfg.SOLVER
    rules = [ParamRule.parse(rule) for rule in s.PARAM_GROUPS]
    freeze(model, rules)
    groups = param_groups(
        model,
        s.BASE_LR,
        s.WEIGHT_DECAY,
        weight_decay_norm=s.WEIGHT_DECAY_NORM,
        weight_decay_bias=s.WEIGHT_DECAY_BIAS,
        weight_decay_vectors=s.WEIGHT_DECAY_VECTORS,
        bias_lr_factor=s.BIAS_LR_FACTOR,
        rules=rules,
    )
    if not groups:
        raise ConfigError("nothing to train: every parameter of the model is frozen")
    logging.getLogger(__name__).info("Parameter groups:\n%s", _describe(groups))
    for group in groups:
        del group["names"]
    if s.OPTIMIZER == "SGD":
        return torch.optim.SGD(groups, s.BASE_LR, momentum=s.MOMENTUM, nesterov=s.NESTEROV)
    if s.OPTIMIZER == "AdamW":
        return torch.optim.AdamW(groups, s.BASE_LR, betas=tuple(s.BETAS), eps=s.EPS)
    raise ConfigError(f"SOLVER.OPTIMIZER {s.OPTIMIZER!r} is none of SGD, AdamW")


def _describe(groups: list[dict[str, Any]]) -> str:
    rows = [
        (
            f"{g['lr']:.3g}",
            f"{g['weight_decay']:.3g}",
            len(g["params"]),
            sum(p.numel() for p in g["params"]),
            g["names"][0],
        )
        for g in groups
    ]
    return tabulate(rows, headers=["lr", "weight decay", "tensors", "values", "first"], disable_numparse=True)


GradientClipper = Callable[[list[nn.Parameter]], None]


def build_clipper(kind: str, value: float = 1.0, norm_type: float = 2.0) -> GradientClipper:
    """A function that clips the gradients of a list of parameters in place.

    Args:
        kind: "" does nothing, "value" clips each entry to [-value, value], "norm" the norm of each
            parameter's gradient to ``value``, "full_model" the norm of all of them as one vector.
    """

    def per_entry(parameters: list[nn.Parameter]) -> None:
        nn.utils.clip_grad_value_(parameters, value)

    def per_parameter(parameters: list[nn.Parameter]) -> None:
        for parameter in parameters:
            nn.utils.clip_grad_norm_(parameter, value, norm_type)

    def full_model(parameters: list[nn.Parameter]) -> None:
        nn.utils.clip_grad_norm_(parameters, value, norm_type)

    clippers = {
        "": lambda parameters: None,
        "value": per_entry,
        "norm": per_parameter,
        "full_model": full_model,
    }
    if kind not in clippers:
        raise ConfigError(f"SOLVER.CLIP_GRADIENTS.CLIP_TYPE {kind!r} is none of value, norm, full_model")
    return clippers[kind]
