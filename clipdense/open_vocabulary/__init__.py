"""The contract of models whose vocabulary changes after they are built."""

from clipdense.open_vocabulary.trained_on import KEY, TrainedOn

__all__ = ["KEY", "TrainedOn"]
