"""Contract of models whose vocabulary changes after they are built, and protocols between rooms."""

from clipdense.open_vocabulary.metadata import (
    TRAINING_VOCABULARY,
    move_vocabulary_buffer,
    training_metadata,
    training_vocabulary,
)
from clipdense.open_vocabulary.model import OpenVocabularyModel, TextEmbeddings, require_open_vocabulary
from clipdense.open_vocabulary.protocols import (
    CheckpointMetadata,
    CompleteWithoutWeights,
    ExampleEncoder,
    LoadHook,
    Proposals,
    TrainingStart,
)

__all__ = [
    "TRAINING_VOCABULARY",
    "CheckpointMetadata",
    "CompleteWithoutWeights",
    "ExampleEncoder",
    "LoadHook",
    "OpenVocabularyModel",
    "Proposals",
    "TextEmbeddings",
    "TrainingStart",
    "move_vocabulary_buffer",
    "require_open_vocabulary",
    "training_metadata",
    "training_vocabulary",
]
