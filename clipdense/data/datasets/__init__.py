"""Data sets, registered with Detectron2 when this package is imported."""

from clipdense.data.datasets.shapes import register_shapes

register_shapes()
