"""Exponential moving average of a model's weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

__all__ = ["ModelEMA"]


class ModelEMA:
    """Average of the trainable parameters and the floating-point buffers of ``model`` (Polyak averaging).

    After iteration t (from 0) the average moves by ``1 - min(decay, (1 + t) / (10 + t))`` towards the model,
    so that the first iterations do not stay in it.

    Attributes:
        average: name -> averaged tensor.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0.0 < decay < 1.0:
            raise ValueError(f"the decay of an average of weights lies between 0 and 1, not at {decay}")
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
        """Move towards the weights that ``iteration`` ended with."""
        decay = min(self.decay, (1 + iteration) / (10 + iteration))
        torch._foreach_lerp_(list(self.average.values()), list(self._online.values()), 1.0 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within this context the model holds the averaged weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, value in self._online.items():
            online = value.detach().clone()
            value.copy_(self.average[name])
            self.average[name].copy_(online)

    def online_state(self) -> dict[str, Tensor]:
        """The tensors of the model that are averaged, as trained."""
        return {name: value.detach() for name, value in self._online.items()}

    @torch.no_grad()
    def load(self, average: dict[str, Tensor]) -> None:
        """Continue from saved averages (a model's state dict with these names, and maybe others)."""
        for name, value in self.average.items():
            value.copy_(average[name])
