"""Datasets, mappers and loaders, and the embedded `shapes` world, whose drawing works without Detectron2."""

from clipdense import compat

if compat.has_detectron2():
    from clipdense.data import datasets, mappers  # noqa: F401
