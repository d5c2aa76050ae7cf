"""Optimizers, and parameter groups by rules."""

import dataclasses
import difflib
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from tabulate import tabulate
from torch import nn

from clipdense.engine.options import ConfigError

from detectron2.config import CfgNode

__all__ = ["ParamRule", "build_optimizer", "freeze", "keep_frozen_in_eval", "param_groups"]

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
    """Rule of ``SOLVER.PARAM_GROUPS`` for the parameters whose names match a regular expression.

    Settings that are None stay as they are.

    Attributes:
        match: regular expression, searched in the full parameter name.
        lr: multiplier of the base learning rate.
        weight_decay: absolute weight decay.
        layer_decay: further learning-rate factor of a ViT's parameters, ``layer_decay ** (layers above)``: 1
            after the blocks, smallest for the patch embedding and the position table (BEiT, Bao et al. 2021).
        freeze: whether the parameters are not trained.
    """

    match: str
    lr: float | None = None
    weight_decay: float | None = None
    layer_decay: float | None = None
    freeze: bool | None = None

    @classmethod
    def parse(cls, rule: Mapping[str, Any]) -> "ParamRule":
        """Parse a dict with upper- or lower-case keys.

        Raises:
            ConfigError: If a key is unknown (the message names a similar one), MATCH is missing, or it is not
                a valid regular expression.
        """
        known = [f.name for f in dataclasses.fields(cls)]
        values = {str(key).lower(): value for key, value in rule.items()}
        for key in values:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1, cutoff=0.4)
                hint = f"; did you mean {near[0].upper()}?" if near else ""
                raise ConfigError(f"SOLVER.PARAM_GROUPS: unknown key {key.upper()!r} in {dict(rule)}{hint}")
        if not isinstance(values.get("match"), str):
            raise ConfigError(f"SOLVER.PARAM_GROUPS: {dict(rule)} has no MATCH (a regular expression)")
        try:
            re.compile(values["match"])
        except re.error as e:
            raise ConfigError(
                f"SOLVER.PARAM_GROUPS: MATCH {values['match']!r} is not a valid regular expression: {e}"
            ) from e
        return cls(**values)

    def matched(self, model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the names and values of the matching parameters.

        Raises:
            ConfigError: If no parameter matches.
        """
        found = False
        for name, parameter in model.named_parameters():
            if re.search(self.match, name):
                found = True
                yield name, parameter
        if not found:
            tops = ", ".join(sorted({name.split(".")[0] for name, _ in model.named_parameters()}))
            raise ConfigError(
                f"SOLVER.PARAM_GROUPS: MATCH {self.match!r} matches no parameter; names start with {tops}"
            )


def freeze(model: nn.Module, rules: Iterable[ParamRule]) -> None:
    """Set ``requires_grad`` of the parameters that rules freeze or train."""
    for rule in rules:
        if rule.freeze is not None:
            for _, parameter in rule.matched(model):
                parameter.requires_grad_(not rule.freeze)


def keep_frozen_in_eval(model: nn.Module) -> None:
    """Put the leaf layers (norms, dropouts ...) of completely frozen modules into evaluation mode.

    Call it after ``model.train()``. A frozen trunk then computes the same features in training and in
    evaluation, without batch statistics and dropout.
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
    """Group the trainable parameters of a model by learning rate and weight decay.

    Args:
        model: the model.
        base_lr: base learning rate.
        weight_decay: weight decay.
        weight_decay_norm: weight decay of norms; None: ``weight_decay``.
        weight_decay_bias: weight decay of biases; None: ``weight_decay``.
        weight_decay_vectors: weight decay of other parameters with fewer than two axes; None:
            ``weight_decay``.
        bias_lr_factor: multiplier of the biases' learning rate.
        rules: rules that override these settings; a later rule overrides an earlier one.

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
    """Return ``rate ** depth`` per parameter: depth 0 after the blocks, number of blocks + 1 before them."""
    blocks = {name: int(m.group(1)) for name in names if (m := _BLOCK.search(name))}
    if not blocks:
        raise ConfigError(
            "SOLVER.PARAM_GROUPS: LAYER_DECAY needs parameters in blocks (blocks.N, resblocks.N or layers.N)"
        )
    count = max(blocks.values()) + 1
    depth = {
        name: count - blocks[name] if name in blocks else (count + 1) * bool(_STEM.search(name))
        for name in names
    }
    return {name: rate**d for name, d in depth.items()}


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """Build the optimizer of ``SOLVER.OPTIMIZER``, after freezing parameters by ``SOLVER.PARAM_GROUPS``.

    Raises:
        ConfigError: If the optimizer is unknown, a rule is wrong, or no parameter is left to train.
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
        raise ConfigError("every parameter is frozen; check SOLVER.PARAM_GROUPS and MODEL.BACKBONE.FREEZE_AT")
    logging.getLogger(__name__).info("Parameter groups:\n%s", _describe(groups))
    for group in groups:
        del group["names"]
    if s.OPTIMIZER == "SGD":
        return torch.optim.SGD(groups, s.BASE_LR, momentum=s.MOMENTUM, nesterov=s.NESTEROV)
    if s.OPTIMIZER == "AdamW":
        return torch.optim.AdamW(groups, s.BASE_LR, betas=tuple(s.BETAS), eps=s.EPS)
    raise ConfigError(f"SOLVER.OPTIMIZER must be SGD or AdamW, got {s.OPTIMIZER!r}")


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
