"""How a model runs on its device: precision of inference, memory format, compilation, copies of images."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from clipdense.engine.options import ConfigError

from detectron2.structures import Boxes, Instances

__all__ = ["COMPILE_MODES", "PRECISIONS", "images_to_device", "prepare_model", "run_model"]

PRECISIONS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
"""Name of a data type of autocast -> the type; float32 stands for no autocast."""

COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
"""Modes of `torch.compile`."""

_PIXELS = ("image", "crops")


def prepare_model(
    model: nn.Module, channels_last: bool = False, compiled: Sequence[str] = (), mode: str = "default"
) -> nn.Module:
    """Set the memory format of a model, and compile parts of it when they run first.

    Parameters keep their names and values, so that weights load as before.

    Args:
        model: changed in place.
        channels_last: whether the weights of convolutions, and so their maps, are in channels-last order.
        compiled: names of submodules to compile, such as "backbone"; the forward of each is compiled.
        mode: of `torch.compile`, see `COMPILE_MODES`.

    Returns:
        The model.

    Raises:
        ConfigError: If the model has no submodule of that name; the message lists its submodules.
    """
    if channels_last:
        model.to(memory_format=torch.channels_last)
    for name in compiled:
        try:
            part = model.get_submodule(name)
        except AttributeError as error:
            known = ", ".join(name for name, _ in model.named_children())
            raise ConfigError(
                f"MODEL.COMPILE.MODULES: {type(model).__name__} has no submodule {name!r}; it has {known}"
            ) from error
        part.compile(mode=mode)
    return model


def run_model(model: Any, batch: Sequence[dict[str, Any]], precision: str = "float32") -> Any:
    """Predict on a batch under autocast; outputs are float32 whatever the precision.

    Args:
        model: a model of Detectron2's contract, in evaluation mode.
        batch: its inputs, which are not changed; images may be on any device.
        precision: see `PRECISIONS`.
    """
    parameter = next(iter(model.parameters()), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    with _autocast(device, precision):
        outputs = model(images_to_device(batch, device))
    return outputs if precision == "float32" else _to_float32(outputs)


def images_to_device(batch: Any, device: torch.device) -> Any:
    """Start to copy the images of a batch to a GPU, without waiting for the end of the copy.

    Models copy their inputs themselves, and find these there already. Everything else, such as boxes, stays
    where it is: some of it is read on the host.

    Args:
        batch: samples with ``image`` and perhaps ``crops``; for an asynchronous copy in pinned memory.
        device: device of the model.

    Returns:
        New samples; the given batch if the device is a CPU.
    """
    if device.type == "cpu":
        return batch
    return [_pixels_to_device(sample, device) if isinstance(sample, dict) else sample for sample in batch]


def _pixels_to_device(sample: dict[str, Any], device: torch.device) -> dict[str, Any]:
    pixels = {key: sample[key] for key in _PIXELS if isinstance(sample.get(key), Tensor)}
    return {**sample, **{key: value.to(device, non_blocking=True) for key, value in pixels.items()}}


def _autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    if precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, PRECISIONS[precision])


def _to_float32(value: Any) -> Any:
    """Widen the tensors of half precision in nested outputs: NumPy and evaluators take no bfloat16."""
    if isinstance(value, Tensor):
        return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value
    if isinstance(value, dict):
        return {key: _to_float32(x) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_to_float32(x) for x in value)
    if isinstance(value, Boxes):
        return Boxes(value.tensor)  # which makes it float32
    if isinstance(value, Instances):
        return Instances(value.image_size, **{k: _to_float32(x) for k, x in value.get_fields().items()})
    return value
