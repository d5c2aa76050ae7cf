"""Datasets. `standard`, `open_semantic`, `open_vocabulary` and `clipdense.data.shapes.datasets` register
theirs with Detectron2 when they are imported, which `clipdense.registration` does together with
``detectron2.data``; `own` registers the datasets that a config names.
"""

import detectron2.data  # noqa: F401  (registers the datasets, before a module of this package is imported)
