"""Search for NaN and infinite values among the tensors of a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

__all__ = ["describe_nonfinite", "nonfinite_keys"]


def nonfinite_keys(state: Mapping[str, object]) -> list[str]:
    """Return the keys of tensors with NaN or infinite values.

    Attention masks may hold -infinity on purpose: a tensor whose name ends in "mask" is refused only for NaN
    and +infinity. Each tensor is summed once; only a sum that is not finite costs a second pass.

    Args:
        state: tensors by key; entries that are not floating-point tensors are skipped.
    """
    sums = dict(_sums(state))
    if not sums:
        return []
    finite = torch.stack([total.double().cpu() for total in sums.values()]).isfinite().tolist()
    suspects = [key for key, good in zip(sums, finite, strict=True) if not good]
    return [key for key in suspects if not _all_finite(key, state[key])]


def describe_nonfinite(state: Mapping[str, object]) -> str | None:
    """Describe the tensors with NaN or infinite values, for an error message; None if there are none."""
    keys = nonfinite_keys(state)
    if not keys:
        return None
    others = f" and {len(keys) - 1} other tensors" if len(keys) > 1 else ""
    return f"tensor {keys[0]}{others} with NaN or infinite values"


def _sums(state: Mapping[str, object]) -> Iterator[tuple[str, Tensor]]:
    for key, value in state.items():
        if not isinstance(value, Tensor) or value.is_meta or value.layout != torch.strided:
            continue
        if (value.is_floating_point() or value.is_complex()) and value.numel():
            value = value.detach()
            value = value.float() if value.itemsize == 1 else _real(value)  # float8 has no sum
            yield key, value.sum(dtype=torch.float32 if value.itemsize < 4 else value.dtype)


def _real(value: Tensor) -> Tensor:
    return torch.view_as_real(value.resolve_conj()) if value.is_complex() else value


def _all_finite(key: str, value: object) -> bool:
    assert isinstance(value, Tensor)
    value = value.detach().float() if value.itemsize == 1 else _real(value.detach())
    if key.endswith("mask"):
        value = value.where(value != -torch.inf, 0.0)
    return bool(value.isfinite().all())
