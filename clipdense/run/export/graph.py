"""A model as a function of tensors, ready for torch.export, and the error of one that cannot be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from clipdense.run.export.file_metadata import FileMetadata

__all__ = ["ExportError", "Graph", "Inputs"]

Inputs = Mapping[str, Tensor]
"""Tensors by the name of the graph's input, in the order of the module's arguments."""


class ExportError(ValueError):
    """A model cannot be exported as it is; the message says why, and what to change."""


@dataclass(frozen=True)
class Graph:
    """A module whose forward takes and returns tensors only, and what its file says about it.

    Attributes:
        module: in evaluation mode; its forward takes the inputs in order and returns a tensor or a tuple.
        metadata: of the file; the writer fills in `opset`.
        example: from (height, width, number of classes) to random inputs of the module.
        outputs: names of the results, in order.
        dynamic: input -> its axes whose length is not fixed.
        size: height and width of the inputs that the module is traced with, in pixels; not the native size,
            whose position table needs no resizing.
        num_classes: number of classes that the module is traced with.
    """

    module: nn.Module
    metadata: FileMetadata
    example: Callable[[int, int, int], Inputs]
    outputs: tuple[str, ...]
    dynamic: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    size: tuple[int, int] = (64, 96)
    num_classes: int = 5

    def inputs(self) -> Inputs:
        """Return the inputs that the module is traced with."""
        return self.example(*self.size, self.num_classes)

    def other_inputs(self) -> Inputs:
        """Return inputs of another size and number of classes than the traced ones, where they are free."""
        height, width = self.size
        if {2, 3} <= set(self.dynamic.get("images", ())):
            step = max(self.metadata.multiple, self.metadata.min_size)
            height, width = height + step, width - step
        return self.example(height, width, self.num_classes + 3)

    def shapes(self) -> dict[str, str]:
        """Describe the shape of each input; free axes have a letter."""
        letters = {"images": "B3HW", "text": "SPD" if self.metadata.text == "prompts" else "SD"}
        shapes = {}
        for name, tensor in self.inputs().items():
            free = self.dynamic.get(name, ())
            known = letters.get(name, "KM")
            axes = [known[i] if i in free else str(side) for i, side in enumerate(tensor.shape)]
            shapes[name] = f"({', '.join(axes)}) {str(tensor.dtype).removeprefix('torch.')}"
        return shapes
