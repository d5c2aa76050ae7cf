"""Parameter groups of image towers, on which fine-tuning rules are defined."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from clipdense.clip.attention import AttentionParameters

Part = nn.Module | nn.Parameter


@dataclass(frozen=True)
class TowerGroups:
    """Parameters of an image tower by their role.

    The stem, the blocks, the projection and the positions hold every parameter exactly once. Norms and
    attentions are views on the same parameters.

    Attributes:
        stem: everything before the blocks, except the position table.
        blocks: transformer blocks, or stages of a ResNet or ConvNeXt, from the first to the last.
        projection: everything after the blocks: final norm, attention pool, head, projection.
        positions: position tables; empty if the tower has none.
        norms: weights and biases of all normalisation layers.
        attentions: query, key and value projections of the attentions, from the first to the last; empty if
            the tower has none.
    """

    stem: tuple[Part, ...]
    blocks: tuple[nn.Module, ...]
    projection: tuple[Part, ...]
    positions: tuple[nn.Parameter, ...]
    norms: tuple[nn.Parameter, ...]
    attentions: tuple[AttentionParameters, ...]


def parameters_of(parts: Iterable[Part]) -> list[nn.Parameter]:
    """Return the parameters of modules and single parameters, in order."""
    return [
        parameter
        for part in parts
        for parameter in ([part] if isinstance(part, nn.Parameter) else part.parameters())
    ]


def norm_parameters(module: nn.Module) -> tuple[nn.Parameter, ...]:
    """Return the parameters of the layer, group and batch norms in a module."""
    norms = (m for m in module.modules() if isinstance(m, nn.LayerNorm | nn.GroupNorm | _BatchNorm))
    return tuple(parameter for norm in norms for parameter in norm.parameters(recurse=False))


def around(owner: nn.Module, blocks: nn.Module) -> tuple[list[nn.Module], list[nn.Module]]:
    """Return the children of a module before and after the child that contains the blocks."""
    children = list(owner.children())
    middle = next(i for i, child in enumerate(children) if any(m is blocks for m in child.modules()))
    return children[:middle], children[middle + 1 :]
