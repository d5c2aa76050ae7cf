"""Datasets, mappers and loaders, and the embedded `shapes` world, whose drawing works without Detectron2."""
