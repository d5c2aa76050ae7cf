"""Class names of a predictor: those of the dataset, and those stored in the weights."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from clipdense.checkpoint import Checkpoint
from clipdense.data.heads import head_classes
from clipdense.engine.options import ConfigError
from clipdense.engine.run_config import RunConfig
from clipdense.run.keys import config_value

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.catalog import Metadata

__all__ = ["check_head_classes", "known_metadata", "register_stored_classes"]

_CLASS_LISTS = ("thing_classes", "stuff_classes")


def register_stored_classes(run: RunConfig, weights: Checkpoint | None) -> None:
    """Let a config that names no dataset, as in a shared model folder, name the classes of its weights.

    Heads that are built from class names read them from a dataset; this one has no images.

    Args:
        run: settings of the run; ``DATASETS.TEST`` is set.
        weights: content of the weight file.
    """
    if weights is None or not isinstance(run.cfg, CfgNode) or run.dataset_names:
        return
    stored = {**weights.metadata, **(weights.extras.get("metadata") or {})}
    classes = {kind: list(stored[kind]) for kind in _CLASS_LISTS if stored.get(kind)}
    if not classes:
        return
    name = f"classes_{hashlib.sha256(json.dumps(classes).encode()).hexdigest()[:16]}"
    if name not in DatasetCatalog.list():
        DatasetCatalog.register(name, list)
        MetadataCatalog.get(name).set(**classes)
    run.cfg.DATASETS.TEST = (name,)


def check_head_classes(run: RunConfig, metadata: Metadata, stored: dict[str, Any]) -> None:
    """Check that a closed-vocabulary head has as many classes as there are names from the dataset."""
    if not isinstance(run.cfg, CfgNode):
        return
    for head in head_classes(run.cfg):
        names, count = metadata.get(f"{head.kind}_classes"), config_value(run.cfg, head.key)
        # panoptic metadata list every class as a thing too
        panoptic = bool(metadata.get("thing_classes") and metadata.get("stuff_classes"))
        if names and not stored.get(f"{head.kind}_classes") and not panoptic and len(names) != count:
            raise ConfigError(
                f"{head.key} = {count}, but the dataset names {len(names)} classes "
                f"({', '.join(names[:5])}{', ...' if len(names) > 5 else ''}): name the dataset that the "
                "model was trained on in DATASETS.TEST"
            )


def known_metadata(run: RunConfig, stored: dict[str, Any], prefer_stored: bool) -> Metadata:
    """Return the metadata of the first dataset that names classes, completed by the classes of the weights.

    Args:
        run: settings of the run.
        stored: metadata in the weight file.
        prefer_stored: whether the classes of the weights replace those of the dataset.
    """
    names = run.dataset_names
    entries = [MetadataCatalog.get(name).as_dict() for name in names if name in MetadataCatalog.list()]
    known: dict[str, Any] = next((e for e in entries if any(e.get(kind) for kind in _CLASS_LISTS)), {})
    if prefer_stored or not known:
        known |= {kind: list(stored[kind]) for kind in _CLASS_LISTS if stored.get(kind)}
    if not any(known.get(kind) for kind in _CLASS_LISTS):
        raise ConfigError(
            f"no class names: neither the weights nor the datasets ({', '.join(names) or 'none is named'}) "
            "list any. Register the dataset that the model was trained on (DATASETS.COCO_JSON), set "
            "train.metadata.thing_classes in a LazyConfig, or give a vocabulary to an open-vocabulary model."
        )
    return Metadata(**known)
