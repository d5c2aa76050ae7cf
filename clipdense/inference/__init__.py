"""Inference as pure functions: merging of class scores and masks, sliding windows, test-time views,
background rules, refinement and propagation of maps."""

from clipdense.inference.background import max_over_synonyms, reject_pixels, suppress_absent_classes
from clipdense.inference.components import connected_areas
from clipdense.inference.maskclip import (
    DenseMap,
    Refinements,
    dense_map,
    map_cosines,
    maskclip_cosines,
    projected_keys,
    refine_cosines,
)
from clipdense.inference.pamr import pamr, pamr_weights, refine_masks
from clipdense.inference.patch_windows import PatchWindows, segment_by_patches
from clipdense.inference.patches import patch_modes
from clipdense.inference.propagation import (
    PixelGraph,
    patch_graph,
    patch_positions,
    propagate_patches,
    propagate_pixels,
)
from clipdense.inference.queries import (
    MergeSettings,
    instance_inference,
    merge_queries,
    panoptic_inference,
)
from clipdense.inference.sam_refine import MaskDecoder, Prompts, RefineSettings, refine_by_prompts
from clipdense.inference.semantic import (
    best_masks,
    merge_class_maps,
    semantic_labels,
    semantic_map,
    semantic_output,
    top_labels,
)
from clipdense.inference.views import average_views
from clipdense.inference.windows import (
    centred_padding,
    cut_windows,
    fold_windows,
    map_windows,
    merge_windows,
    pad_windows,
    slide_windows,
    window_starts,
)
from clipdense.inference.zero_shot import (
    class_probabilities,
    confident_labels,
    denoise_prompts,
    smooth_by_keys,
    suppress_small_classes,
    text_cosines,
)

__all__ = [
    "MaskDecoder",
    "MergeSettings",
    "PatchWindows",
    "PixelGraph",
    "Prompts",
    "RefineSettings",
    "Refinements",
    "average_views",
    "best_masks",
    "centred_padding",
    "class_probabilities",
    "confident_labels",
    "connected_areas",
    "cut_windows",
    "denoise_prompts",
    "fold_windows",
    "instance_inference",
    "map_windows",
    "dense_map",
    "map_cosines",
    "maskclip_cosines",
    "DenseMap",
    "max_over_synonyms",
    "merge_class_maps",
    "merge_queries",
    "merge_windows",
    "pad_windows",
    "pamr",
    "pamr_weights",
    "panoptic_inference",
    "patch_graph",
    "patch_modes",
    "patch_positions",
    "projected_keys",
    "propagate_patches",
    "propagate_pixels",
    "refine_by_prompts",
    "refine_cosines",
    "refine_masks",
    "reject_pixels",
    "segment_by_patches",
    "semantic_labels",
    "semantic_map",
    "semantic_output",
    "slide_windows",
    "smooth_by_keys",
    "suppress_absent_classes",
    "suppress_small_classes",
    "text_cosines",
    "top_labels",
    "window_starts",
]
