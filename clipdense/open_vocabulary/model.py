"""Base class of models whose vocabulary changes after they are built."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from clipdense.clip.vocabulary import Vocabulary
from clipdense.open_vocabulary.metadata import TRAINING_VOCABULARY, training_metadata, training_vocabulary

__all__ = ["OpenVocabularyModel", "TextEmbeddings", "require_open_vocabulary"]

TextEmbeddings = Mapping[str, Tensor]
"""Tensors that stand for a vocabulary, by name; which names there are is the model's choice."""

_CACHED_VOCABULARIES = 16


class OpenVocabularyModel(ABC):
    """Mixin of modules that classify among the classes of any vocabulary.

    There are three vocabularies:

    - `label_vocabulary`: the classes of the training data, which the labels count. It never changes.
    - `training_vocabulary`: the classes that the current weights were trained on. It defines base and novel.
      It is the label vocabulary until weights are loaded whose metadata says otherwise, and again once
      training starts.
    - `vocabulary`: the classes of evaluation. Its base flags are derived: a class is base if it shares any
      synonym with a base class of the training vocabulary. If the training vocabulary is not known, the flags
      are as given; without flags, systems treat every class as novel.

    A subclass calls `init_vocabulary` in its constructor and implements `encode_vocabulary`. Its forward
    reads `text_embeddings`, `training_text_embeddings` and `base_flags`, and sets none of them. The mixin
    implements the protocols `CheckpointMetadata`, `LoadHook` and `TrainingStart`.

    Example::

        class FCCLIP(OpenVocabularyModel, nn.Module):
            def __init__(self, ..., vocabulary=None):
                ...
                self.init_vocabulary(vocabulary)

            def encode_vocabulary(self, vocabulary, training):
                rows, classes = self.bank.per_synonym(vocabulary)
                return {"rows": rows, "classes": classes}

            def forward(self, batched_inputs):
                if self.training:
                    text = self.training_text_embeddings()  # of the label vocabulary
                    ...
                text = self.text_embeddings()
                base = self.base_flags()  # (K,) bool, or None
    """

    _label_vocabulary: Vocabulary | None
    _training_vocabulary: Vocabulary | None
    _vocabulary: Vocabulary | None
    _text_cache: OrderedDict[tuple[bool, tuple[tuple[str, ...], ...]], TextEmbeddings]

    def init_vocabulary(self, vocabulary: Vocabulary | None) -> None:
        """Set all three vocabularies to the one of the training data; None if there are no training data."""
        self._label_vocabulary = self._training_vocabulary = vocabulary
        self._vocabulary = None if vocabulary is None else self._derive_base(vocabulary)
        self._text_cache = OrderedDict()

    @abstractmethod
    def encode_vocabulary(self, vocabulary: Vocabulary, training: bool) -> TextEmbeddings:
        """Encode the classes of a vocabulary; called once per vocabulary and set of weights.

        Args:
            vocabulary: the classes.
            training: whether the embeddings are those of training, which may use other templates
                (ZegFormer); most models ignore it.

        Returns:
            Tensors without gradients, by name.

        Raises:
            ValueError: If a name cannot be embedded. The message lists all such names.
        """

    @property
    def label_vocabulary(self) -> Vocabulary | None:
        """Classes that the labels of the training data count; None without training data."""
        return self._label_vocabulary

    @property
    def training_vocabulary(self) -> Vocabulary | None:
        """Classes that the weights were trained on, with their base flags; None if not known."""
        return self._training_vocabulary

    @property
    def vocabulary(self) -> Vocabulary | None:
        """Classes of evaluation, with derived base flags; None before any are set."""
        return self._vocabulary

    def set_vocabulary(self, vocabulary: Vocabulary, embeddings: TextEmbeddings | None = None) -> None:
        """Set the evaluation vocabulary and encode its class names. Training is not affected.

        Args:
            vocabulary: the classes; base flags are derived from the training vocabulary if it is known.
            embeddings: what `encode_vocabulary` would return, if it is known already.

        Raises:
            ValueError: If a name cannot be embedded. The previous vocabulary stays set.
        """
        if embeddings is not None:
            self._cache((False, vocabulary.synonyms), embeddings)
        self._embeddings(vocabulary, training=False)
        self._vocabulary = self._derive_base(vocabulary)

    def text_embeddings(self) -> TextEmbeddings:
        """Return the embeddings of the evaluation vocabulary, on the model's device.

        Raises:
            ValueError: If there is no vocabulary, or a name cannot be embedded.
        """
        return self._embeddings(self._vocabulary, training=False)

    def training_text_embeddings(self) -> TextEmbeddings:
        """Return the embeddings of the label vocabulary, on the model's device.

        Raises:
            ValueError: If there is no vocabulary, or a name cannot be embedded.
        """
        return self._embeddings(self._label_vocabulary, training=True)

    def base_flags(self) -> Tensor | None:
        """Return which classes of evaluation are base: (K,) bool on the model's device; None if not known."""
        base = None if self._vocabulary is None else self._vocabulary.base
        return None if base is None else torch.tensor(base, device=_device(self))

    def clear_text_cache(self) -> None:
        """Forget all text embeddings; to be called when weights that embed text have changed."""
        self._text_cache.clear()

    # CheckpointMetadata, LoadHook, TrainingStart

    def checkpoint_metadata(self) -> dict[str, Any]:
        """Return the training vocabulary as metadata; see `CheckpointMetadata`."""
        return training_metadata(self._training_vocabulary)

    def load_checkpoint_metadata(self, metadata: Mapping[str, Any]) -> None:
        """Take over the training vocabulary of a file, if it has one; see `CheckpointMetadata`."""
        if metadata.get(TRAINING_VOCABULARY) is not None:
            self._set_training_vocabulary(training_vocabulary(metadata))

    def prepare_state(self, state: dict[str, Tensor]) -> None:
        """Forget the text embeddings of the old weights; see `LoadHook`."""
        self.clear_text_cache()

    def start_training(self) -> None:
        """Make the label vocabulary the training vocabulary; see `TrainingStart`."""
        self._set_training_vocabulary(self._label_vocabulary)

    def _set_training_vocabulary(self, vocabulary: Vocabulary | None) -> None:
        self._training_vocabulary = vocabulary
        if self._vocabulary is not None:
            self._vocabulary = self._derive_base(self._vocabulary)

    def _derive_base(self, vocabulary: Vocabulary) -> Vocabulary:
        known = self._training_vocabulary
        return vocabulary if known is None else vocabulary.with_base_from(known)

    def _embeddings(self, vocabulary: Vocabulary | None, training: bool) -> TextEmbeddings:
        if vocabulary is None:
            raise ValueError(
                f"{type(self).__name__} has no classes: call set_vocabulary, or set DATASETS.TRAIN to a "
                "dataset with class names"
            )
        key = (training, vocabulary.synonyms)
        if key not in self._text_cache:
            # not under inference_mode: training may use the same tensors later
            with torch.inference_mode(False), torch.no_grad():
                self._cache(key, self.encode_vocabulary(vocabulary, training))
        self._text_cache.move_to_end(key)
        device = _device(self)
        return {name: tensor.to(device) for name, tensor in self._text_cache[key].items()}

    def _cache(self, key: tuple[bool, tuple[tuple[str, ...], ...]], embeddings: TextEmbeddings) -> None:
        self._text_cache[key] = embeddings
        while len(self._text_cache) > _CACHED_VOCABULARIES:
            self._text_cache.popitem(last=False)


def require_open_vocabulary(model: Any, known: str = "") -> OpenVocabularyModel:
    """Return the model if its vocabulary can change.

    Args:
        model: any model.
        known: names of models that can, for the message.

    Raises:
        ValueError: If the model has a closed vocabulary.
    """
    if isinstance(model, OpenVocabularyModel):
        return model
    examples = f" ({known})" if known else ""
    raise ValueError(
        f"{type(model).__name__} has a closed vocabulary: it predicts the classes that it was trained on and "
        f"no others. Leave out the vocabulary, or use an open-vocabulary model{examples}."
    )


def _device(module: Any) -> torch.device:
    assert isinstance(module, nn.Module)
    return next(module.parameters()).device
