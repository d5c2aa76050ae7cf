"""Configuration keys of CLIPSelf: the training below MODEL.CLIPSELF, its input below INPUT.CLIPSELF."""

from detectron2.config import CfgNode as CN


def add_clipself_config(cfg: CN) -> None:
    """Add ``MODEL.CLIPSELF`` and ``INPUT.CLIPSELF`` (in place)."""
    # Used by the meta-architectures CLIPSelf and RegionCLIPBaseline.
    cfg.MODEL.CLIPSELF = CN()
    # Last-block mode of the student's dense map. "value" drops the softmax attention of the last block, as
    # published.
    cfg.MODEL.CLIPSELF.MODE = "value"
    # Number of groups that are trained, counted from the last: blocks of a ViT; the four stages and the
    # attention pool of a ResNet. -1: all of them. Groups below, norm and projection stay frozen.
    cfg.MODEL.CLIPSELF.UNLOCKED_GROUPS = -1
    # The evaluated and exported weights are ALPHA * student + (1 - ALPHA) * initial CLIP; 1 or more: the
    # student alone. Published: 0.7 for B/16, 0.95 for L/14.
    cfg.MODEL.CLIPSELF.ALPHA = 1.0
    # Weight of the loss.
    cfg.MODEL.CLIPSELF.WEIGHT = 1.0
    # Sides in pixels; each training batch is resized to one of them at random. Empty: no resizing from
    # INPUT.CLIPSELF.IMAGE_SIZE.
    cfg.MODEL.CLIPSELF.MULTISCALE = ()
    # Side in pixels of windows in which the student computes its dense map, a multiple of the stride, such as
    # the native image size: tokens attend within windows, and keep the positions of the pre-training. Not
    # published; 0: the whole image. The exported CLIP does not know its window.
    cfg.MODEL.CLIPSELF.WINDOW = 0
    # CLIPSelf: weight of 1 - cosine between the student's and the teacher's image embeddings of the crops.
    # It preserves zero-shot classification, at the cost of a forward and a backward pass of the student on
    # the crops. Not published; 0: off.
    cfg.MODEL.CLIPSELF.EMBEDDING_WEIGHT = 0.0
    # RegionCLIPBaseline: file with a text table that has a row for each class of the training dataset.
    cfg.MODEL.CLIPSELF.CONCEPTS = ""
    # RegionCLIPBaseline: number of concepts that each batch is compared with: its own, filled up at random.
    cfg.MODEL.CLIPSELF.NUM_CONCEPTS = 100

    # Used by CLIPSelfMapper.
    cfg.INPUT.CLIPSELF = CN()
    # "patches" (cells of random grids; needs no annotations), "proposals" (annotated boxes), or "concepts"
    # (annotated boxes with their classes, for RegionCLIPBaseline).
    cfg.INPUT.CLIPSELF.REGIONS = "patches"
    # Side of the student's square image in pixels. Published: 1024 for patch size 16, 896 for 14.
    cfg.INPUT.CLIPSELF.IMAGE_SIZE = 1024
    # Side of the teacher's crops in pixels: the native image size of the CLIP.
    cfg.INPUT.CLIPSELF.CROP_SIZE = 224
    # Maximum number of regions of an image.
    cfg.INPUT.CLIPSELF.MAX_BOXES = 20
    # Number of jittered copies of each region, with crops of their own: the centre moves by up to a quarter
    # of the sides, which become 0.75 to 1.33 times as long. Not published; 0: none.
    cfg.INPUT.CLIPSELF.JITTER = 0
    # Patches: maximum number of rows and of columns of a grid.
    cfg.INPUT.CLIPSELF.MAX_SPLIT = 6
    # Factor by which regions are enlarged around their centres for the teacher's crops. 0: as published,
    # which is 1 for patches and 1.5 for proposals.
    cfg.INPUT.CLIPSELF.CROP_SCALE = 0.0
