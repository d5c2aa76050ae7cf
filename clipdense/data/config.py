"""Configuration keys of `clipdense.data`."""

from detectron2.config import CfgNode as CN


def add_data_config(cfg: CN) -> None:
    """Add the keys of `clipdense.data` to ``cfg`` (in place)."""
    # Name in MAPPER_REGISTRY of what turns a dataset dict into model input.
    cfg.INPUT.MAPPER = "DetectionMapper"
    # Whether training goes on, with a warning, when an image file is damaged (another image takes its place).
    # Evaluation always stops there: a score over some of the images would be no score.
    cfg.INPUT.SKIP_BAD_IMAGES = False
    # Whether commas in a data set's class names part synonyms ("road, route" is one class of two names, as
    # ZegFormer reads them); False takes each string whole (OVSeg, zsseg). Only open vocabularies ask.
    cfg.DATASETS.SPLIT_NAMES = True
    # Your own data: a list of "name:annotations.json:image_folder", each registered under its name as COCO
    # instances. "~" and environment variables are expanded. The names can then stand in DATASETS.TRAIN and
    # DATASETS.TEST.
    cfg.DATASETS.COCO_JSON = []
    # Images without annotations: a list of "name:folder", "name:images.json:image_folder" (COCO's list of
    # images) or "name:shards/{000..331}.tar" (webdataset). "~" and environment variables are expanded.
    cfg.DATASETS.IMAGES = []
    # Mask-category pairs: a list of "name:pairs.jsonl" (images beside it), "name:pairs.parquet:image_folder",
    # or "name:data_set": the annotated segments of a registered data set with the names of their classes.
    # Several names in DATASETS.TRAIN are a mixture, uniform over all pairs.
    cfg.DATASETS.MASK_PAIRS = []
    # Large-scale jitter (Ghiasi et al., CVPR 2021) instead of MIN_SIZE_TRAIN: an image is fitted into a
    # square of SIZE pixels times a random factor of RANGE; a random square of SIZE of a larger one is kept.
    cfg.INPUT.SCALE_JITTER = CN()
    cfg.INPUT.SCALE_JITTER.ENABLED = False
    cfg.INPUT.SCALE_JITTER.SIZE = 1024
    cfg.INPUT.SCALE_JITTER.RANGE = (0.1, 2.0)
