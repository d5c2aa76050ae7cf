"""From a dense map, boxes and masks to region embeddings. Imports no detectron2 and works without it."""

from .pooling import POOLINGS, Pooling, get_pooling, pool_boxes, pool_masks, resize_masks

__all__ = ["POOLINGS", "Pooling", "get_pooling", "pool_boxes", "pool_masks", "resize_masks"]
