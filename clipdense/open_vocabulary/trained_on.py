"""Checkpoints that say which classes their weights were trained on."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from clipdense.clip.vocabulary import Vocabulary

__all__ = ["KEY", "TrainedOn"]

KEY = "trained_on_json"
"""Of the state: `Vocabulary.to_json` as bytes; empty where the classes are not known."""


class TrainedOn:
    """Mixin of modules that find any words, for which base classes are those that their weights have seen.

    Attributes:
        trained_on: the classes of training, with their base flags; None where neither the data nor the
            weights say.
    """

    trained_on: Vocabulary | None
    trained_on_json: Tensor

    def set_trained_on(self, vocabulary: Vocabulary | None) -> None:
        """Say what the weights are trained on."""
        assert isinstance(self, nn.Module)
        self.trained_on = vocabulary
        text = b"" if vocabulary is None else vocabulary.to_json().encode()
        with torch.device("cpu"):
            content = torch.tensor(list(text), dtype=torch.uint8)
        self.register_buffer(KEY, content.to(next(self.parameters()).device))

    def restore_trained_on(self, state: dict[str, Tensor], labels: Vocabulary | None) -> None:
        """Take over what a checkpoint says, before its tensors are loaded; where it says nothing, and its
        key is missing, all stays as it is.

        Args:
            state: which gets this model's key.
            labels: the classes of the data, to which the checkpoint's may be equal.
        """
        stored = state.get(KEY)
        if stored is not None and len(stored):
            vocabulary = Vocabulary.from_json(bytes(stored.tolist()).decode())
            self.set_trained_on(labels if vocabulary == labels else vocabulary)
        state[KEY] = self.trained_on_json

    def seen_in_training(self, vocabulary: Vocabulary) -> Vocabulary:
        """The same classes: base where a name is shared with a base class of training, where those are
        known."""
        return vocabulary if self.trained_on is None else vocabulary.with_base_from(self.trained_on)
