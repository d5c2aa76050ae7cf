"""Find the model config and the weight files for a model name and a weights name."""

from __future__ import annotations

import difflib
import json
import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import open_clip
from open_clip.constants import HF_SAFE_WEIGHTS_NAME, OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.pretrained import download_pretrained, download_pretrained_from_hf

from clipdense.clip.aligned_configs import ALIGNED_MODELS
from clipdense.clip.nano import NANO_MODELS, nano_config, nano_files
from clipdense.files import cache_dir as default_cache_dir

logger = logging.getLogger(__name__)

HUB = "hf-hub:"
LOCAL = "local-dir:"
_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
RANDOM = "random"
RANDOM_OF = "random:"
"""Before a tag: random weights for the model as that tag's weights need it (activation, pixel statistics)."""


@dataclass
class Source:
    """Config and weight files of a CLIP.

    Attributes:
        name: name for messages and caches.
        config: open_clip's hub config (`model_cfg`, `preprocess_cfg`); None if the file determines it.
        files: weight files with disjoint keys; empty for random weights.
        quick_gelu: activation according to the tag; None if unknown.
    """

    name: str
    config: dict[str, Any] | None
    files: list[Path] = field(default_factory=list)
    quick_gelu: bool | None = None


def resolve(model: str, pretrained: str | None, cache_dir: str | None = None) -> Source:
    """Find the config and the weight files; tags and hub ids are downloaded.

    Args:
        model: see `clipdense.clip.load_clip`.
        pretrained: see `clipdense.clip.load_clip`.
        cache_dir: folder for downloads.

    Raises:
        ValueError: If the model or tag is unknown (the message has near matches), or no weights are named.
        FileNotFoundError: If a file does not exist.
        ConnectionError: If the weights cannot be downloaded.
    """
    pretrained = pretrained or None
    if model in NANO_MODELS:
        files = nano_files(model) if pretrained is None else _file(pretrained)
        return Source(model, nano_config(model), files)
    if model in ALIGNED_MODELS:
        return _from_aligned(model, pretrained)
    if model.startswith((HUB, LOCAL)):
        return _from_repository(model, pretrained, cache_dir)
    name = model if model in open_clip.list_models() else model.replace("/", "-")
    if name in open_clip.list_models():
        return _from_open_clip(name, pretrained, cache_dir)
    if not model or Path(model).is_file():
        if model and pretrained is not None:
            raise ValueError(f"'{model}' is a weight file: remove pretrained='{pretrained}'")
        file = model or pretrained
        if file is None or file == RANDOM:
            raise ValueError("name a model, or a weight file whose tensors tell it")
        return Source(Path(file).stem, None, _file(file))
    if _looks_like_path(model):
        raise FileNotFoundError(f"no weight file {model}")
    names = [*NANO_MODELS, *ALIGNED_MODELS, *open_clip.list_models()]
    raise ValueError(f"unknown CLIP model '{model}'; {_near(model, names)}")


def _from_open_clip(name: str, pretrained: str | None, cache_dir: str | None) -> Source:
    source = Source(
        name, {"model_cfg": open_clip.get_model_config(name), "preprocess_cfg": _usual_pixels(name)}
    )
    if pretrained == RANDOM:
        return source
    only_config = (pretrained or "").startswith(RANDOM_OF)
    pretrained = pretrained and pretrained.removeprefix(RANDOM_OF)
    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained is None:
        raise ValueError(
            f"no weights named for '{name}': pass a file, 'random', or one of its tags: "
            f"{', '.join(tags) or 'it has none'}"
        )
    if Path(pretrained).is_file():
        source.files = [Path(pretrained)]
    elif open_clip.get_pretrained_cfg(name, pretrained):
        tag = open_clip.get_pretrained_cfg(name, pretrained)
        source.config = {"model_cfg": open_clip.get_model_config(name), "preprocess_cfg": _pixels(tag)}
        source.quick_gelu = bool(tag.get("quick_gelu", False))
        if only_config:
            return source
        what, place = f"tag '{pretrained}' of '{name}'", tag.get("hf_hub") or tag.get("url", "")
        if (local := local_weights(name, pretrained)) is not None:
            source.files = [local]
            return source
        target = weights_folder() / f"{name}-{pretrained}{_suffix(place)}"
        source.files = [_fetch(what, place, lambda: download_pretrained(tag, cache_dir=cache_dir), target)]
    elif pretrained.startswith(HUB):
        source.files = [_hub_weights(pretrained.removeprefix(HUB), cache_dir)]
    elif _looks_like_path(pretrained):
        raise FileNotFoundError(f"no weight file {pretrained}")
    else:
        raise ValueError(f"'{pretrained}' is neither a file nor a tag of '{name}'; {_near(pretrained, tags)}")
    return source


def weights_folder() -> Path:
    """Return the folder where weight files of open_clip's tags may be put by hand."""
    return default_cache_dir() / "clip"


def local_weights(name: str, tag: str) -> Path | None:
    """Return the file ``<model>-<tag>`` (.safetensors, .pt, .pth, .bin) of `weights_folder`, if any."""
    files = (weights_folder() / f"{name}-{tag}{suffix}" for suffix in _SUFFIXES)
    return next((file for file in files if file.is_file()), None)


def without_weights(model: str, pretrained: str) -> str:
    """Return the ``pretrained`` of `resolve` for the same model with random weights, without a download.

    Weights that are on disk, those of a nano model or a file, are not replaced. A hub model still needs its
    config file.
    """
    if model.startswith(HUB) and not pretrained or pretrained.startswith(HUB):
        return RANDOM
    name = model if model in open_clip.list_models() else model.replace("/", "-")
    if os.path.isfile(pretrained) or not open_clip.get_pretrained_cfg(name, pretrained):
        return pretrained
    return RANDOM_OF + pretrained


def _from_repository(model: str, pretrained: str | None, cache_dir: str | None) -> Source:
    """Find the files of `hf-hub:organisation/name`, or of `local-dir:folder` with the same files."""
    if model.startswith(LOCAL):
        folder = Path(model.removeprefix(LOCAL))
        if not (folder / "open_clip_config.json").is_file():
            raise FileNotFoundError(f"no open_clip_config.json in {folder}")
        config_file: str | Path = folder / "open_clip_config.json"
    else:
        identifier = model.removeprefix(HUB)
        config_file = _fetch(
            f"'{model}'",
            f"{identifier}/open_clip_config.json",
            lambda: download_pretrained_from_hf(
                identifier, filename="open_clip_config.json", cache_dir=cache_dir
            ),
        )
    config = json.loads(Path(config_file).read_text())
    if "model_cfg" not in config:
        raise ValueError(f"{config_file} has no model_cfg")
    source = Source(
        model, {"model_cfg": config["model_cfg"], "preprocess_cfg": _pixels(config.get("preprocess_cfg", {}))}
    )
    if pretrained is not None:
        source.files = _file(pretrained)
    elif model.startswith(HUB):
        source.files = [_hub_weights(model.removeprefix(HUB), cache_dir)]
    else:
        found = [
            f for suffix in ("safetensors", "bin", "pt", "pth") for f in sorted(folder.glob(f"*.{suffix}"))
        ]
        preferred = [f for f in found if f.stem.startswith("open_clip")] or found
        if not preferred:
            raise FileNotFoundError(f"no weight file in {folder}")
        source.files = preferred[:1]
    return source


def _from_aligned(model: str, pretrained: str | None) -> Source:
    """Find the files of a text-aligned DINO: one that clipdense wrote, or a folder of published ones."""
    if pretrained is None:
        raise ValueError(
            f"no weights named for '{model}': pass a folder with DINO's weights and the published files of "
            "head and text side, a file that clipdense wrote, or 'random'"
        )
    if not Path(pretrained).is_dir():
        return Source(model, ALIGNED_MODELS[model], _file(pretrained))
    suffixes = (".safetensors", ".pt", ".pth", ".bin")
    files = sorted(path for path in Path(pretrained).iterdir() if path.suffix in suffixes)
    if not files:
        raise FileNotFoundError(f"no weight file in {pretrained}")
    return Source(model, ALIGNED_MODELS[model], files)


def _file(pretrained: str) -> list[Path]:
    if pretrained == RANDOM:
        return []
    if not Path(pretrained).is_file():
        raise FileNotFoundError(f"no weight file {pretrained}")
    return [Path(pretrained)]


def _hub_weights(identifier: str, cache_dir: str | None) -> Path:
    return _fetch(
        f"'{HUB}{identifier}'",
        identifier,
        lambda: download_pretrained_from_hf(identifier, cache_dir=cache_dir),
    )


def _fetch(what: str, place: str, download: Callable[[], str], target: Path | None = None) -> Path:
    """Download a file; a failure is one line that names the file and where it belongs.

    Args:
        what: whose file it is, for the message.
        place: URL, or "organisation/name/file" on the hub; without a file, open_clip's usual name.
        download: returns the path.
        target: where the file may be put by hand; None: only as ``pretrained``.
    """
    hub = logging.getLogger("huggingface_hub")
    level = hub.level
    hub.setLevel(logging.ERROR)  # it warns before each of a dozen attempts
    try:
        return Path(download())
    except Exception as e:  # the hub's clients raise whatever their transports do
        if place.endswith("/") or place.count("/") == 1:
            place = f"{place.rstrip('/')}/{HF_SAFE_WEIGHTS_NAME}"
        organisation, _, rest = place.partition("/")
        name, _, file = rest.rpartition("/")
        url = place if "://" in place else f"https://huggingface.co/{organisation}/{name}/resolve/main/{file}"
        reason = " ".join(str(e).split())[:120] or type(e).__name__
        by_hand = "" if target is None else f"save it as {target}, or "
        raise ConnectionError(
            f"{what} could not be downloaded ({reason}). Get {url} on a machine with access, and {by_hand}"
            "set MODEL.CLIP.PRETRAINED (`pretrained`, --pretrained) to its path; or copy that machine's "
            "Hugging Face cache, and set HF_HOME to its folder"
        ) from e
    finally:
        hub.setLevel(level)


def _pixels(preprocess: dict[str, Any]) -> dict[str, Any]:
    """Return the preprocessing keys that we use, as JSON types; OpenAI's statistics by default."""
    defaults = {"mean": OPENAI_DATASET_MEAN, "std": OPENAI_DATASET_STD}
    known = ("mean", "std", "interpolation", "resize_mode")
    given = {key: preprocess[key] for key in known if preprocess.get(key) is not None}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in {**defaults, **given}.items()}


def _usual_pixels(name: str) -> dict[str, Any]:
    """Return the pixel statistics that all tags of a model share; OpenAI's if they differ or are unknown."""
    known = [
        _pixels(open_clip.get_pretrained_cfg(name, tag))
        for tag in open_clip.list_pretrained_tags_by_model(name)
    ]
    if known and all((k["mean"], k["std"]) == (known[0]["mean"], known[0]["std"]) for k in known):
        return known[0]
    if known:
        logger.warning("the tags of '%s' use different pixel statistics; using OpenAI's", name)
    return _pixels({})


def _suffix(place: str) -> str:
    """Return the ending of the file at a URL, or of the hub's usual weight file."""
    return Path(place).suffix if Path(place).suffix in _SUFFIXES else Path(HF_SAFE_WEIGHTS_NAME).suffix


def _looks_like_path(name: str) -> bool:
    return os.sep in name or Path(name).suffix in (".pt", ".pth", ".bin", ".safetensors")


def _near(name: str, known: Iterable[str]) -> str:
    known = list(known)
    lowered = {k.lower(): k for k in known}
    near = [lowered[k] for k in difflib.get_close_matches(name.lower(), lowered, n=5, cutoff=0.5)]
    if near:
        return f"did you mean {', '.join(near)}?"
    return f"known: {', '.join(known) or 'none'}"
