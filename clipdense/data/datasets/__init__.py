"""Datasets; importing this package registers them with Detectron2."""

from clipdense.data.datasets.open_semantic import register_open_semantic
from clipdense.data.datasets.open_vocabulary import register_open_vocabulary
from clipdense.data.datasets.own import register_from_config
from clipdense.data.datasets.standard import register_standard
from clipdense.data.shapes.datasets import register_shapes

__all__ = ["register_from_config"]

register_standard()
register_open_semantic()
register_open_vocabulary()
register_shapes()
