"""CLIP per pixel and per region, for Detectron2.

Importing clipdense registers its backbones, meta-architectures, mappers, evaluators and data sets with Detectron2. Without
Detectron2, `clipdense.clip`, `clipdense.regions`, `clipdense.checkpoint` and `clipdense.data.shapes` work all the same.
"""

from __future__ import annotations

from clipdense import compat

compat.apply()

__version__ = "0.1.0"
