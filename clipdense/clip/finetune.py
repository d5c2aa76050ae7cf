"""Fine-tuning rules: which parameters of a tower learn."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from clipdense.clip.attention import AttentionParameters, ParameterRows
from clipdense.clip.towers import ResNetTower, TextTower, Tower, TowerRequest
from clipdense.clip.towers.groups import TowerGroups, parameters_of

__all__ = [
    "ALL_EXCEPT_POSITIONS",
    "EVERYTHING",
    "FineTuneRule",
    "apply_rule",
    "apply_text_rule",
    "freeze_unused",
    "top_rule",
]


@dataclass(frozen=True)
class FineTuneRule:
    """Parameters of an image tower that learn: the union of the enabled groups (see `TowerGroups`).

    Attributes:
        stem: train what comes before the blocks, except the position table.
        blocks: number of blocks (ViT) or stages (ResNet, ConvNeXt) to train, counted from the top; -1 for
            all.
        projection: train what comes after the blocks.
        positions: train the position table.
        norms: train the weights and biases of all norms.
        attention: projections of all attentions to train, e.g. "qv" for queries and values (CAT-Seg).
        attention_biases: whether the biases of these projections learn too (published CAT-Seg: no).

    Raises:
        ValueError: If ``attention`` has other letters than q, k and v.
    """

    stem: bool = False
    blocks: int = 0
    projection: bool = False
    positions: bool = False
    norms: bool = False
    attention: str = ""
    attention_biases: bool = True

    def __post_init__(self) -> None:
        if set(self.attention) - set("qkv"):
            raise ValueError(f"attention {self.attention!r}: expected letters among q, k and v, e.g. 'qv'")


EVERYTHING = FineTuneRule(stem=True, blocks=-1, projection=True, positions=True)
ALL_EXCEPT_POSITIONS = replace(EVERYTHING, positions=False)


def apply_rule(tower: Tower, rule: FineTuneRule) -> list[RemovableHandle]:
    """Make the parameters of a rule trainable and freeze all others.

    If a rule selects a part of a tensor (queries and values of a fused projection, as in OpenAI's ViTs), a
    gradient hook sets the gradient of the other rows to zero. Weight decay still reaches those rows. A copy
    of the tower has no such hook.

    Args:
        tower: the image tower; changed in place.
        rule: what learns.

    Returns:
        Handles of the gradient hooks; ``remove()`` them before another rule is applied.

    Raises:
        ValueError: If the tower has fewer blocks than the rule, or no attention although the rule names it.
    """
    return _apply(tower, _selected(tower, rule))


def apply_text_rule(tower: TextTower, rule: FineTuneRule) -> list[RemovableHandle]:
    """Make the parameters of a rule trainable in a text tower and freeze all others; see `apply_rule`.

    Args:
        tower: the text tower; changed in place.
        rule: what learns: ``attention``, or with ``blocks`` -1 the whole tower, with its positions if
            ``positions`` is set.

    Returns:
        Handles of the gradient hooks.
    """
    everything = tower.parameters() if rule.blocks == -1 else ()
    kept = (p for p in everything if rule.positions or p is not tower.positional_embedding)
    parts = [ParameterRows(parameter) for parameter in kept]
    return _apply(tower, parts + _attention_parts(tower.attentions(), rule))


def _apply(tower: nn.Module, parts: Iterable[ParameterRows]) -> list[RemovableHandle]:
    """Make some rows of the parameters of a tower trainable and freeze all others."""
    selected: dict[nn.Parameter, list[slice | None]] = {}
    for part in parts:
        selected.setdefault(part.parameter, []).append(part.rows)
    handles = []
    for parameter in tower.parameters():
        rows = selected.get(parameter, [])
        parameter.requires_grad_(bool(rows))
        ranges = [r for r in rows if r is not None]
        if rows and len(ranges) == len(rows) and sum(r.stop - r.start for r in ranges) < len(parameter):
            handle = parameter.register_hook(_RowMask(ranges))  # type: ignore[no-untyped-call]
            handles.append(handle)
    return handles


def top_rule(tower: Tower, count: int) -> FineTuneRule:
    """Return the rule that trains the last groups of a tower, as CLIPSelf counts them.

    The groups of a ViT are its blocks. The groups of a ResNet are its four stages and its attention pool. The
    groups of a ConvNeXt are its stages.

    Args:
        tower: the image tower.
        count: number of groups, from the top; -1 for all.

    Raises:
        ValueError: If the count is 0 or larger than the number of groups.
    """
    groups = tower.groups()
    pooled = isinstance(tower, ResNetTower) and bool(groups.projection)
    total = len(groups.blocks) + pooled
    if count != -1 and not 1 <= count <= total:
        raise ValueError(
            f"{type(tower).__name__} has {total} groups: expected 1 to {total}, or -1 for all, not {count}"
        )
    blocks = count if count == -1 or not pooled else count - 1
    return FineTuneRule(blocks=blocks, projection=pooled, positions=pooled)


def freeze_unused(tower: Tower, request: TowerRequest) -> None:
    """Freeze the trainable parameters that the requested outputs do not depend on.

    Otherwise weight decay would shrink them, and distributed training would wait for their gradients. A
    backward pass of one small image decides.

    Args:
        tower: the image tower; changed in place.
        request: outputs among ``taps``, ``dense`` and ``pooled`` that the loss is computed from.
    """
    parameters = [p for p in tower.parameters() if p.requires_grad]
    side = tower.smallest_side
    image = torch.zeros(1, 3, side, side, device=parameters[0].device)
    with torch.enable_grad():
        output = tower(image, request)
        used = [tap for tap, _ in output.taps]
        if request.dense is not None:
            used.append(output.dense)
        if request.pooled:
            used.append(output.pooled)
        total = torch.stack([value.sum() for value in used]).sum()
        gradients = torch.autograd.grad(total, parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.requires_grad_(gradient is not None)


class _RowMask:
    """Gradient hook that keeps some rows of a gradient and sets the others to zero."""

    def __init__(self, ranges: list[slice]) -> None:
        self.ranges = ranges

    def __call__(self, gradient: Tensor) -> Tensor:
        masked = torch.zeros_like(gradient)
        for rows in self.ranges:
            masked[rows] = gradient[rows]
        return masked


def _selected(tower: Tower, rule: FineTuneRule) -> list[ParameterRows]:
    groups: TowerGroups = tower.groups()
    if rule.blocks > len(groups.blocks):
        raise tower.cannot(f"{rule.blocks} trainable blocks", f"it has {len(groups.blocks)}")
    if rule.attention and not groups.attentions:
        raise tower.cannot("trainable attention projections", "it has no attention")
    first = 0 if rule.blocks < 0 else len(groups.blocks) - rule.blocks
    parts = [
        *(groups.stem if rule.stem else ()),
        *groups.blocks[first:],
        *(groups.projection if rule.projection else ()),
        *(groups.positions if rule.positions else ()),
        *(groups.norms if rule.norms else ()),
    ]
    whole = [ParameterRows(parameter) for parameter in parameters_of(parts)]
    return whole + _attention_parts(groups.attentions, rule)


def _attention_parts(attentions: Iterable[AttentionParameters], rule: FineTuneRule) -> list[ParameterRows]:
    """Collect the projections of attentions that a rule names."""
    return [
        part
        for attention in attentions
        for name in rule.attention
        for part in getattr(attention, name)
        if rule.attention_biases or part.parameter.ndim > 1
    ]
