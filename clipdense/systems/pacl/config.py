"""Configuration keys of PACL."""

from detectron2.config import CfgNode as CN


def add_pacl_config(cfg: CN) -> None:
    """Add ``MODEL.PACL`` (in place). The CLIP is that of ``MODEL.CLIP``, the images ``INPUT.CAPTION``.
    Defaults are published."""
    keys = cfg.MODEL.PACL = CN()
    # Last-block mode of the image tower whose patches, before the projection, are embedded (plain).
    keys.MODE = "plain"
    # Weights with which the embedder starts: "random" (published), or "projection": e(v) is the CLIP's own
    # dense map.
    keys.INIT = "random"
    # Temperature of the softmax over the patches, which weights them by their cosine with a text.
    keys.PATCH_TEMPERATURE = 1.0
    # Initial inverse temperature of the contrastive loss, which is learned; 0: that of the CLIP.
    keys.LOGIT_SCALE = 0.0
    # Upper bound of the inverse temperature.
    keys.MAX_LOGIT_SCALE = 100.0
    # Prompt templates of class names: the name of a set, or a sentence with {}.
    keys.TEMPLATES = "single"
    # Evaluation: side of the sliding windows in pixels, 0 for the whole image at once; and their distance.
    keys.WINDOW = 0
    keys.STRIDE = 0
    # Windows per forward.
    keys.BATCH_SIZE = 16
