"""Loading of models by name: folders, configs, weight files, CLIPs and hub ids."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import open_clip

from clipdense.clip.nano import NANO_MODELS
from clipdense.run.config import add_clipdense_config
from clipdense.run.hub import WEIGHTS, fetch, is_hub_id
from clipdense.run.zero_shot import default_background, zero_shot_config

from detectron2.config import get_cfg

if TYPE_CHECKING:
    from clipdense.run.predictor import Predictor

__all__ = ["folder_files", "load_pretrained"]

_CONFIGS = ("config.yaml", "config.yml")
_WEIGHTS = ("model_best.pth", "model_final.pth", "export.safetensors")
_SUFFIXES = (".safetensors", ".pth", ".pt", ".pkl")


def load_pretrained(kind: type[Predictor], name: str | os.PathLike[str], **options: Any) -> Predictor:
    """Load a model; see `Predictor.from_pretrained`."""
    text = os.fspath(name)
    path = Path(text).expanduser()
    if path.is_dir() and not (path / WEIGHTS).is_file():
        return kind(*folder_files(path), **options)
    if text.endswith((".yaml", ".yml", ".py")):
        return kind(text, **options)
    model, colon, pretrained = text.partition(":")
    if _is_clip(model):
        return _zero_shot(kind, model, pretrained, options)
    if path.suffix in _SUFFIXES and path.is_file():
        cfg = get_cfg()
        add_clipdense_config(cfg)
        return kind(cfg, path, **options)
    if path.is_dir() or (not colon and is_hub_id(text)):
        shared = fetch(text)
        overrides = (*shared.overrides, *options.pop("opts", ()))
        return kind(shared.config, shared.weights, overrides, **options)
    raise FileNotFoundError(
        f"there is no model {text!r}: give the folder of a training, a config file, a weight file written by "
        "`clipdense convert`, a CLIP such as shapes-rn or ViT-B-16:openai, or a hub id organisation/name"
    )


def _zero_shot(kind: type[Predictor], model: str, pretrained: str, options: dict[str, Any]) -> Predictor:
    method = options.pop("method", "")
    cfg = zero_shot_config(model, pretrained, method, opts=options.pop("opts", ()))
    if options.get("vocabulary") is not None:
        options.setdefault("background", default_background(model, options["vocabulary"]))
    return kind(cfg, **options)


def _is_clip(name: str) -> bool:
    return (
        name in NANO_MODELS
        or name in open_clip.list_models()
        or name.replace("/", "-") in open_clip.list_models()
    )


def folder_files(folder: Path) -> tuple[str, str]:
    """Return the config and the weights in the folder of a training or of a hub.

    Raises:
        FileNotFoundError: If one of them is missing.
    """
    configs = [folder / name for name in _CONFIGS if (folder / name).is_file()]
    if not configs:
        raise FileNotFoundError(f"{folder} has no {_CONFIGS[0]}: it is not the folder of a trained model")
    weights = [folder / name for name in _WEIGHTS if (folder / name).is_file()]
    weights = weights or [f for suffix in _SUFFIXES for f in sorted(folder.glob(f"*{suffix}"))]
    if not weights:
        raise FileNotFoundError(f"{folder} has a config, but no weights ({', '.join(_WEIGHTS)})")
    return str(configs[0]), str(weights[0])
