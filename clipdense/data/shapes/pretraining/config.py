"""Configuration keys of contrastive pre-training."""

from detectron2.config import CfgNode as CN


def add_shapes_pretraining_config(cfg: CN) -> None:
    """Add ``MODEL.CONTRASTIVE_CLIP`` and ``INPUT.CROP_CAPTION`` (in place)."""
    cfg.MODEL.CONTRASTIVE_CLIP = CN()
    # "" trains the text tower; else the name of a CLIP whose text tower is taken over and stays locked (LiT).
    cfg.MODEL.CONTRASTIVE_CLIP.LOCKED_TEXT = ""
    # exp(logit_scale) at the start: a large one makes captions of the same colour count most. 0 leaves
    # it as it is.
    cfg.MODEL.CONTRASTIVE_CLIP.INIT_LOGIT_SCALE = 0.0
    # The temperature exp(logit_scale) is kept at most this large.
    cfg.MODEL.CONTRASTIVE_CLIP.MAX_LOGIT_SCALE = 100.0

    cfg.INPUT.CROP_CAPTION = CN()
    # Side of a crop in pixels: the native size of the CLIP that is trained.
    cfg.INPUT.CROP_CAPTION.SIZE = 64
    # Crops (with a caption each) cut from one scene.
    cfg.INPUT.CROP_CAPTION.PER_IMAGE = 4
    # Share of crops of one thing with context, and of windows on several things; the rest shows ground alone.
    cfg.INPUT.CROP_CAPTION.OBJECT_SHARE = 0.8
    cfg.INPUT.CROP_CAPTION.WINDOW_SHARE = 0.14
