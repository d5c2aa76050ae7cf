"""Protocols between models and the code that trains them, loads them, or uses their masks.

What evaluators need from a model is in `clipdense.evaluation.probes`.

A model implements the protocols that apply to it; nothing has to be inherited. `isinstance` checks that the
methods exist.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from clipdense.clip.vocabulary import Vocabulary

__all__ = [
    "CheckpointMetadata",
    "CompleteWithoutWeights",
    "ExampleEncoder",
    "LoadHook",
    "Proposals",
    "TrainingStart",
]


@runtime_checkable
class Proposals(Protocol):
    """Source of class-agnostic masks: a segmentation model, annotations, or a file."""

    def propose_masks(self, sample: Mapping[str, Any]) -> Tensor:
        """Propose masks for one image.

        Args:
            sample: Detectron2's input dict. A model reads ``image`` (3, h, w) in its own format, values 0 to
                255, and the output size ``height`` and ``width`` in pixels (default: h, w). Annotations and
                files are found by ``file_name`` or ``image_id``.

        Returns:
            (Q, height, width) bool; masks may be empty and may overlap.
        """
        ...


@runtime_checkable
class ExampleEncoder(Protocol):
    """Open-vocabulary model whose classes can be shown in pictures instead of named."""

    def embed_region(
        self, sample: Mapping[str, Any], box: tuple[float, float, float, float] | None
    ) -> tuple[Tensor, Tensor]:
        """Embed a region of a picture.

        Args:
            sample: Detectron2's input dict of the picture.
            box: x0, y0, x1, y1 in pixels of the picture (``width``, ``height``); None: all of it.

        Returns:
            Mean of the embeddings in the region (D,), and in the whole picture (D,).

        Raises:
            ValueError: If the box is outside of the picture.
        """
        ...

    def encode_examples(
        self, vocabulary: Vocabulary, regions: Sequence[tuple[int, Tensor, Tensor]], weight: float
    ) -> Mapping[str, Tensor]:
        """Embed a vocabulary with examples.

        Args:
            vocabulary: the classes.
            regions: class, region embedding (D,) and embedding of its picture (D,) of each example.
            weight: share of the examples in the embedding of their class, 0..1; the rest is its words'.

        Returns:
            Embeddings as of `OpenVocabularyModel.encode_vocabulary`.
        """
        ...


@runtime_checkable
class CompleteWithoutWeights(Protocol):
    """Meta-architecture that can predict without ``MODEL.WEIGHTS``: its parts bring all their weights.

    Attributes:
        complete_without_weights: always True.
    """

    complete_without_weights: bool


@runtime_checkable
class CheckpointMetadata(Protocol):
    """A model that stores facts about its weights in a checkpoint's metadata.

    `TrainingCheckpointer` merges `checkpoint_metadata` into the ``metadata`` entry of each .pth file, and the
    export into the header of export.safetensors. When weights are loaded, it calls
    `load_checkpoint_metadata` first, then `LoadHook.prepare_state`, then `load_state_dict`.
    """

    def checkpoint_metadata(self) -> dict[str, Any]:
        """Return the metadata: strings, numbers, booleans, None, and lists and dicts of them."""
        ...

    def load_checkpoint_metadata(self, metadata: Mapping[str, Any]) -> None:
        """Take over a file's metadata; without effect for keys that the file lacks.

        Args:
            metadata: all metadata of the file, with the keys of other writers as well; it may be empty.
        """
        ...


@runtime_checkable
class LoadHook(Protocol):
    """A model that adapts a checkpoint's tensors to itself before they are loaded.

    Typical uses: replace tensors that depend on the vocabulary by the model's own, keep a part of the model
    that the configuration took from another file, and clear caches that depend on the weights.
    """

    def prepare_state(self, state: dict[str, Tensor]) -> None:
        """Change a state dict in place before the strict comparison of keys and shapes.

        Args:
            state: the file's tensors under the model's keys.
        """
        ...


@runtime_checkable
class TrainingStart(Protocol):
    """A model that must know when training begins."""

    def start_training(self) -> None:
        """Prepare for training; the trainer calls it once, after weights are loaded, before iteration 0."""
        ...
