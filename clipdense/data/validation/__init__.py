"""Data check: what is wrong with a dataset is said before it costs anything, or repaired and reported."""

from clipdense.data.validation.coco import CocoKind, id_order, read_categories, read_coco
from clipdense.data.validation.datasets import check_dataset, check_datasets
from clipdense.data.validation.images import check_image_files, check_label_maps
from clipdense.data.validation.report import DataError, Finding, Report
from clipdense.data.validation.segmentation import box_fault, has_mask, mask_fault, rle_fault, rle_length

__all__ = [
    "CocoKind",
    "DataError",
    "Finding",
    "Report",
    "box_fault",
    "check_dataset",
    "check_datasets",
    "check_image_files",
    "check_label_maps",
    "has_mask",
    "id_order",
    "mask_fault",
    "read_categories",
    "read_coco",
    "rle_fault",
    "rle_length",
]
