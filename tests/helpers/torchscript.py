"""A TorchScript module with side effects."""

import torch
from torch import Tensor, nn


class Writes(nn.Module):
    """A module whose loading writes a file."""

    def __init__(self, target: str) -> None:
        super().__init__()
        self.target: str = target

    def forward(self, x: Tensor) -> Tensor:
        return x

    @torch.jit.export
    def __getstate__(self) -> tuple[str, bool]:
        return self.target, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool]) -> None:
        self.target = state[0]
        self.training = state[1]
        torch.save(torch.zeros(1), state[0])
