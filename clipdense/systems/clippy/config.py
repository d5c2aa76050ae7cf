"""Configuration keys of CLIPpy."""

from detectron2.config import CfgNode as CN


def add_clippy_config(cfg: CN) -> None:
    """Add ``MODEL.CLIPPY`` (in place). Images of the training are those of ``INPUT.CAPTION``."""
    keys = cfg.MODEL.CLIPPY = CN()
    # Image tower: "clip" (of MODEL.CLIP), or "timm" (a ViT of MODEL.TIMM, published: vit_base_patch16_224
    # with the weights "dino").
    keys.IMAGE = "clip"
    # Text side: "" for the text tower of MODEL.CLIP, or a Sentence-T5, such as
    # sentence-transformers/sentence-t5-base (published) or a local folder; its embeddings must have the
    # channels of the image tower.
    keys.SENTENCE_T5 = ""
    # Image embedding: "max" over the patches, channel by channel (published); "mean" over them; or "class",
    # the tower's own.
    keys.POOLING = "max"
    # ViTs: share of the patches, 0 to below 1, that each image drops in training.
    keys.TOKEN_DROP = 0.0
    # Initial inverse temperature of the contrastive loss, which is learned; 0: that of MODEL.CLIP.
    keys.LOGIT_SCALE = 14.2857
    # Upper bound of the inverse temperature.
    keys.MAX_LOGIT_SCALE = 100.0
    # Prompt templates of class names: the name of a set, or a sentence with {}.
    keys.TEMPLATES = "single"
    # Evaluation: side of the sliding windows in pixels, 0 for the whole image at once; and their distance.
    keys.WINDOW = 0
    keys.STRIDE = 0
    # Windows per forward.
    keys.BATCH_SIZE = 16
