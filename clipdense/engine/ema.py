"""Exponential moving average of a model's weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from clipdense.engine.distributed import local_part

__all__ = ["ModelEMA"]


class ModelEMA:
    """Moving average of the trainable parameters and floating-point buffers of a model (Polyak averaging).

    After iteration t (from 0) the average moves towards the model by ``1 - min(decay, (1 + t) / (10 + t))``,
    so that the first iterations lose their weight. timm's ModelEmaV3 has another warm-up and keeps a second
    model, whose vocabulary and caches would have to follow those of the first.

    Args:
        model: the model that is trained.
        decay: decay of the average, in 0..1 (excluded).

    Attributes:
        average: name -> averaged tensor.

    Raises:
        ValueError: If ``decay`` is out of its range.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0.0 < decay < 1.0:
            raise ValueError(f"the decay of a moving average must lie between 0 and 1, got {decay}")
        self.decay = decay
        self._online = {
            name: value
            for name, value in model.state_dict(keep_vars=True).items()
            if value.is_floating_point() and (value.requires_grad or not isinstance(value, nn.Parameter))
        }
        self.average: dict[str, Tensor] = {
            name: value.detach().clone() for name, value in self._online.items()
        }

    @torch.no_grad()
    def update(self, iteration: int) -> None:
        """Move the average towards the model's weights after an iteration (from 0)."""
        decay = min(self.decay, (1 + iteration) / (10 + iteration))
        averages, online = ([local_part(v) for v in x.values()] for x in (self.average, self._online))
        torch._foreach_lerp_(averages, online, 1.0 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Give the model the averaged weights within this context."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, value in self._online.items():
            own, average = local_part(value), local_part(self.average[name])
            online = own.clone()
            own.copy_(average)
            average.copy_(online)

    def online_state(self) -> dict[str, Tensor]:
        """Return the trained (not averaged) values of the averaged tensors."""
        return {name: value.detach() for name, value in self._online.items()}

    @torch.no_grad()
    def load(self, average: dict[str, Tensor]) -> None:
        """Restore the averages from a state dict of the model; further entries are ignored."""
        for name, value in self.average.items():
            value.copy_(average[name])
