"""Norms and clipping of gradients, whole or sharded."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from clipdense.engine.distributed import local_part
from clipdense.engine.options import ConfigError

__all__ = ["build_clipper", "gradient_norms"]

GradientClipper = Callable[[Sequence[nn.Parameter], Tensor], None]
"""(parameters with gradients, their 2-norms) -> None."""


def gradient_norms(parameters: Sequence[nn.Parameter], norm_type: float = 2.0) -> Tensor:
    """Compute the norm of each parameter's gradient, (n,); sharded gradients cost one small exchange.

    Args:
        parameters: with gradients; sharded ones are DTensors on one mesh.
        norm_type: exponent of the norm, or infinity.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    parts = [local_part(g) for g in gradients]
    parts = [part if part.numel() else part.new_zeros(1) for part in parts]  # a shard can be empty
    norms = torch.stack(torch._foreach_norm(parts, norm_type))
    sharded = [i for i, g in enumerate(gradients) if part_count(g) > 1]
    if sharded:
        mesh = gradients[sharded[0]].device_mesh  # type: ignore[attr-defined]
        group = mesh.get_group(mesh.ndim - 1)
        if math.isinf(norm_type):
            own = norms[sharded]
            dist.all_reduce(own, dist.ReduceOp.MAX, group)
        else:
            own = norms[sharded] ** norm_type
            dist.all_reduce(own, group=group)
            own = own ** (1 / norm_type)
        norms[sharded] = own
    return norms


def part_count(value: Tensor) -> int:
    """Return the number of processes that a tensor is sharded over; 1 for a whole one."""
    mesh = getattr(value, "device_mesh", None)
    return 1 if mesh is None else mesh.size(mesh.ndim - 1)


def build_clipper(kind: str, value: float = 1.0, norm_type: float = 2.0) -> GradientClipper:
    """Build a function that clips the gradients of a list of parameters in place.

    Args:
        kind: "" does nothing; "value" limits each entry to [-value, value]; "norm" limits the norm of each
            parameter's gradient to ``value``; "full_model" limits the norm of all gradients together.
        value: the limit.
        norm_type: exponent of the norm.

    Raises:
        ConfigError: If ``kind`` is unknown.
    """

    def per_entry(parameters: Sequence[nn.Parameter], norms: Tensor) -> None:
        for part in _parts(parameters):
            part.clamp_(-value, value)

    def per_parameter(parameters: Sequence[nn.Parameter], norms: Tensor) -> None:
        for part, factor in zip(_parts(parameters), _factors(_of_type(parameters, norms)), strict=True):
            part.mul_(factor)

    def full_model(parameters: Sequence[nn.Parameter], norms: Tensor) -> None:
        total = torch.linalg.vector_norm(_of_type(parameters, norms), norm_type)
        torch._foreach_mul_(_parts(parameters), _factors(total))

    def _of_type(parameters: Sequence[nn.Parameter], norms: Tensor) -> Tensor:
        return norms if norm_type == 2.0 else gradient_norms(parameters, norm_type)

    def _factors(norms: Tensor) -> Tensor:
        return (value / (norms + 1e-6)).clamp(max=1.0)  # as of torch.nn.utils.clip_grad_norm_

    clippers: dict[str, GradientClipper] = {
        "": lambda parameters, norms: None,
        "value": per_entry,
        "norm": per_parameter,
        "full_model": full_model,
    }
    if kind not in clippers:
        raise ConfigError(f"SOLVER.CLIP_GRADIENTS.CLIP_TYPE must be value, norm or full_model, got {kind!r}")
    return clippers[kind]


def _parts(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    return [local_part(p.grad) for p in parameters if p.grad is not None]
