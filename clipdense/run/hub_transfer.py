"""Pack a trained model into a folder, and move model folders to and from the hub."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from clipdense.backbone.class_text import ClassText
from clipdense.checkpoint import (
    LAYOUTS,
    MODEL_LAYOUT,
    Checkpoint,
    ModelLayout,
    config_options,
    save_checkpoint,
)
from clipdense.checkpoint.allowed import allowed_options
from clipdense.engine.checkpoint import model_metadata
from clipdense.engine.options import ConfigError
from clipdense.files import write_text
from clipdense.run.hub import CARD, CONFIG, WEIGHTS, ModelFolder, fetch, hub_error, is_hub_id, open_folder
from clipdense.run.hub_card import card_of_run, check_licence
from clipdense.run.hub_config import portable_keys
from clipdense.run.predictor import Predictor
from clipdense.run.setup import read_config

__all__ = ["Push", "is_hub_target", "pack_model", "pull_model", "push_model"]

logger = logging.getLogger(__name__)

_CLASS_LISTS = ("thing_classes", "stuff_classes")


@dataclass(frozen=True)
class Push:
    """Files and facts that a model folder is made from.

    Attributes:
        run: output folder of a training, with its ``config.yaml``.
        licence: licence of the weights, as `Card` says.
        weights: weight file; None for ``model_final.pth`` of the run.
        config: config file; None for ``config.yaml`` of the run.
        command: command of the training for the card; "" takes it from the run's log.
    """

    run: Path
    licence: str
    weights: Path | None = None
    config: Path | None = None
    command: str = ""

    def files(self) -> tuple[Path, Path]:
        """Return config and weights.

        Raises:
            FileNotFoundError: If one of them does not exist.
        """
        config = self.config or self.run / "config.yaml"
        weights = self.weights or self.run / "model_final.pth"
        for path, option in ((config, "--config-file"), (weights, "--weights")):
            if not path.is_file():
                raise FileNotFoundError(
                    f"{path} does not exist; name the folder of a finished training, or give {option}"
                )
        return config, weights


def is_hub_target(name: str) -> bool:
    """Return whether ``push`` sends to the hub: the name has the form of a hub id, and is not a folder."""
    return is_hub_id(name) and not Path(name).is_dir()


def push_model(push: Push, target: str, private: bool = False, message: str = "") -> str:
    """Pack a trained model, and send it to the hub or write it into a folder.

    Args:
        push: the model.
        target: a hub id (organisation/name) or the path of a folder; an existing folder takes precedence.
        private: whether a repository that is made on the hub is private.
        message: message of the commit on the hub.

    Returns:
        Where the model is: a URL or a folder.

    Raises:
        ConfigError: If the licence or the target is wrong, or the config cannot travel.
        FileNotFoundError: If the run has no such files.
        CheckpointError: If the weights do not fit the config.
        ConnectionError: If the hub refuses.
    """
    check_licence(push.licence)
    if not is_hub_target(target):
        return str(pack_model(push, Path(target).expanduser(), Path(target).name).path)
    with tempfile.TemporaryDirectory() as folder:
        packed = pack_model(push, Path(folder), target)
        return hub_error(target, lambda: _upload(packed, target, private, message))


def _upload(folder: ModelFolder, name: str, private: bool, message: str) -> str:
    from huggingface_hub import HfApi

    api = HfApi(library_name="clipdense")
    api.create_repo(name, private=private, exist_ok=True)
    commit = api.upload_folder(
        repo_id=name,
        folder_path=folder.path,
        commit_message=message or "Upload a model of clipdense",
        allow_patterns=[CONFIG, CARD, "*.safetensors"],
    )
    return str(commit.commit_url)


def pull_model(name: str, folder: str | os.PathLike[str], revision: str | None = None) -> ModelFolder:
    """Copy a model from the hub, or from another folder, into a folder.

    Only the files of a model folder are copied, after they have been checked (see `fetch`).

    Args:
        name: hub id or path of a model folder.
        folder: new or empty folder, or one that holds an earlier copy, whose files are replaced.
        revision: branch, tag or commit on the hub; None for ``main``.

    Raises:
        ConfigError: If the folder holds other files, or the model's config may not be used.
        FileNotFoundError, CheckpointError, ConnectionError: See `fetch`.
    """
    found, target = fetch(name, revision), Path(folder).expanduser()
    if target.is_dir():
        foreign = [
            path.name
            for path in sorted(target.iterdir())
            if path.name not in (CONFIG, CARD) and path.suffix != ".safetensors"
        ]
        if foreign:
            raise ConfigError(f"{target} holds other files ({', '.join(foreign[:3])}); name a new folder")
    target.mkdir(parents=True, exist_ok=True)
    names = [CONFIG, WEIGHTS, *(Path(value).name for value in found.overrides[1::2])]
    card = _card(name, found, revision)
    for source in [found.path / file for file in names] + ([card] if card else []):
        if source.resolve() != (target / source.name).resolve():
            shutil.copyfile(source, target / source.name)
    return open_folder(target)


def _card(name: str, found: ModelFolder, revision: str | None) -> Path | None:
    """Return the card of a model folder; None if it has none."""
    if (found.path / CARD).is_file():
        return found.path / CARD
    if Path(name).expanduser().is_dir():
        return None
    from huggingface_hub import hf_hub_download

    try:
        return hub_error(name, lambda: Path(hf_hub_download(name, CARD, revision=revision)))
    except ConnectionError:
        logger.warning("%s has no %s", name, CARD)
        return None


def pack_model(push: Push, folder: Path, name: str) -> ModelFolder:
    """Write the folder of a trained model, and check that `Predictor` can use it.

    Args:
        push: the model.
        folder: new folder, or one whose files are replaced.
        name: title of the card.

    Raises:
        See `push_model`.
    """
    config, weights = push.files()
    if config.suffix == ".py":
        raise ConfigError(f"{config} is a LazyConfig, which is a program; only a .yaml config can be shared")
    loaded = read_config(str(config), weights=str(weights))
    trained = Predictor(loaded, device="cpu")
    state, metadata = _weights(trained, loaded.weights)
    keys, companions = portable_keys(trained.cfg)
    keys |= {**metadata["options"]["config"], **_class_keys(trained.model)}
    folder.mkdir(parents=True, exist_ok=True)
    save_checkpoint(folder / WEIGHTS, state, metadata)
    for key, source in companions.items():
        shutil.copyfile(source, folder / keys[key])
    write_text(folder / CONFIG, yaml.safe_dump(_nested(keys), sort_keys=True, allow_unicode=True))
    packed = open_folder(folder)
    Predictor(packed.config, packed.weights, packed.overrides, device="cpu")
    layout = LAYOUTS.get(metadata["source"])
    licence = layout.licence if isinstance(layout, ModelLayout) else ""
    classes: list[str] = next((metadata[kind] for kind in _CLASS_LISTS if metadata.get(kind)), [])
    card = card_of_run(trained.cfg, push.run, name, push.licence, classes, push.command)
    if layout is not None:
        card = replace(card, source=layout.name, source_licence=licence)
    write_text(folder / CARD, card.text())
    return packed


def _weights(trained: Predictor, file: Checkpoint | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return tensors and metadata of a trained model; without its text tower if it can do without."""
    state, options = trained.model.state_dict(), {} if file is None else config_options(file)
    if hasattr(trained.model, "export_state"):
        exported, metadata = trained.model.export_state()
        if metadata.get("layout") == MODEL_LAYOUT:
            state, options = exported, {**options, **metadata.get("options", {}).get("config", {})}
    classes = {kind: list(names) for kind in _CLASS_LISTS if (names := trained.metadata.get(kind))}
    return state, {
        **classes,
        **model_metadata(trained.model),
        "layout": MODEL_LAYOUT,
        "source": "" if file is None else file.metadata.get("source", ""),
        "options": {"config": allowed_options(options)},
    }


def _class_keys(model: Any) -> dict[str, list[str]]:
    """Return the config key of the classes of a language backbone, which the datasets of a run name."""
    texts = [module for module in model.modules() if isinstance(module, ClassText)]
    return {"MODEL.LANGUAGE.CLASSES": list(texts[0].classes)} if texts else {}


def _nested(keys: dict[str, Any]) -> dict[str, Any]:
    """Turn full names of keys into nested dicts, as a config file has them."""
    content: dict[str, Any] = {"VERSION": 2}
    for key, value in keys.items():
        *parents, last = key.split(".")
        node = content
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = _plain(value)
    return content


def _plain(value: Any) -> Any:
    """Return a value with lists and dicts instead of tuples and config nodes, as YAML writes them."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value
