"""Configuration keys of CLIPSelf: what is learned below MODEL.CLIPSELF, what it is learned from below
INPUT.CLIPSELF."""

from detectron2.config import CfgNode as CN


def add_clipself_config(cfg: CN) -> None:
    """Add ``MODEL.CLIPSELF`` and ``INPUT.CLIPSELF`` (in place)."""
    cfg.MODEL.CLIPSELF = CN()
    # Last-block mode of the student's dense map, one that its image tower has. "value" leaves the softmax
    # attention of the last block out, as published.
    cfg.MODEL.CLIPSELF.MODE = "value"
    # Last groups of the student that are trained: blocks of a ViT; of a ResNet its four stages and the
    # attention pool. -1: all of them. What is below, and norm and projection above, stay as they are.
    cfg.MODEL.CLIPSELF.UNLOCKED_GROUPS = -1
    # What is evaluated and exported is ALPHA * student + (1 - ALPHA) * teacher, weight by weight; 1 or more
    # for the student alone. Published: 0.7 for B/16, 0.95 for L/14.
    cfg.MODEL.CLIPSELF.ALPHA = 1.0
    # Weight of the loss (1 - cosine of regions, or the concept loss).
    cfg.MODEL.CLIPSELF.WEIGHT = 1.0
    # Weight of 1 - cosine between the student's and the teacher's image embeddings of the crops: keeps
    # zero-shot classification, at the price of a forward and a backward pass of the student on the crops.
    # Not published.
    cfg.MODEL.CLIPSELF.EMBEDDING_WEIGHT = 0.0
    # Sides in pixels, one of which each training batch is resized to; empty for INPUT.CLIPSELF.IMAGE_SIZE.
    cfg.MODEL.CLIPSELF.MULTISCALE = ()
    # RegionCLIP's baseline instead of distillation (with INPUT.CLIPSELF.REGIONS concepts): a text table with
    # a row for every class of the training data.
    cfg.MODEL.CLIPSELF.CONCEPTS = ""
    # Concepts that each batch is compared with: its own, and others at random up to this number.
    cfg.MODEL.CLIPSELF.NUM_CONCEPTS = 100

    cfg.INPUT.CLIPSELF = CN()
    # "patches" (cells of random grids; needs no annotations), "proposals" (annotated boxes), or "concepts"
    # (annotated boxes with their classes; see MODEL.CLIPSELF.CONCEPTS).
    cfg.INPUT.CLIPSELF.REGIONS = "patches"
    # Side in pixels of the student's square image. Published: 1024 for patches of 16, 896 for 14.
    cfg.INPUT.CLIPSELF.IMAGE_SIZE = 1024
    # Side in pixels of the teacher's crops: the native size of the CLIP.
    cfg.INPUT.CLIPSELF.CROP_SIZE = 224
    # The most regions of an image.
    cfg.INPUT.CLIPSELF.MAX_BOXES = 20
    # Patches: the most rows and columns of a grid.
    cfg.INPUT.CLIPSELF.MAX_SPLIT = 6
    # Teacher's crops are regions enlarged by this around their centres; 0: as published, 1 for patches and
    # 1.5 for proposals.
    cfg.INPUT.CLIPSELF.CROP_SCALE = 0.0
