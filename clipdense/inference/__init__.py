"""Inference as pure functions: merging of class scores and masks, sliding windows, test-time views,
background rules."""

from clipdense.inference.background import max_over_synonyms, reject_pixels, suppress_absent_classes
from clipdense.inference.queries import (
    MergeSettings,
    instance_inference,
    merge_queries,
    panoptic_inference,
)
from clipdense.inference.semantic import (
    best_masks,
    merge_class_maps,
    semantic_labels,
    semantic_map,
    semantic_output,
    top_labels,
)
from clipdense.inference.views import average_views
from clipdense.inference.windows import cut_windows, fold_windows, slide_windows, window_starts

__all__ = [
    "MergeSettings",
    "average_views",
    "best_masks",
    "cut_windows",
    "fold_windows",
    "instance_inference",
    "max_over_synonyms",
    "merge_class_maps",
    "merge_queries",
    "panoptic_inference",
    "reject_pixels",
    "semantic_labels",
    "semantic_map",
    "semantic_output",
    "slide_windows",
    "suppress_absent_classes",
    "top_labels",
    "window_starts",
]
