"""Classes of training in the metadata of checkpoints."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from clipdense.clip.vocabulary import Vocabulary

__all__ = ["TRAINING_VOCABULARY", "move_vocabulary_buffer", "training_metadata", "training_vocabulary"]

TRAINING_VOCABULARY = "training_vocabulary"
"""Key in a checkpoint's metadata: the content of `Vocabulary.to_json`, or None if it is not known."""

_BUFFER = "trained_on_json"


def training_metadata(vocabulary: Vocabulary | None) -> dict[str, Any]:
    """Make the metadata entry of a training vocabulary; None if it is not known."""
    return {TRAINING_VOCABULARY: None if vocabulary is None else json.loads(vocabulary.to_json())}


def training_vocabulary(metadata: Mapping[str, Any]) -> Vocabulary | None:
    """Read the training vocabulary from a checkpoint's metadata; None if it does not say.

    Raises:
        ValueError: If the entry is not a saved vocabulary.
    """
    content = metadata.get(TRAINING_VOCABULARY)
    return None if content is None else Vocabulary.from_json(json.dumps(content))


def move_vocabulary_buffer(
    state: Mapping[str, Tensor], metadata: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Move the training vocabulary of an older file from its tensors to its metadata.

    Files written before the metadata had an entry for it hold the uint8 tensor ``trained_on_json``: the bytes
    of `Vocabulary.to_json`, or no bytes if the classes were not known. The tensor is always removed; its
    content is used only if the metadata has no entry.

    Returns:
        The tensors and the metadata of a file as it is written today.
    """
    state, metadata = dict(state), dict(metadata)
    buffer = state.pop(_BUFFER, None)
    if buffer is not None and TRAINING_VOCABULARY not in metadata:
        content = bytes(buffer.tolist())
        metadata[TRAINING_VOCABULARY] = json.loads(content) if content else None
    return state, metadata
