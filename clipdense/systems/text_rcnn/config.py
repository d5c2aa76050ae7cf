"""Configuration keys of R-CNNs with a text classifier."""

from detectron2.config import CfgNode as CN


def add_text_rcnn_config(cfg: CN) -> None:
    """Add ``MODEL.TEXT_RCNN``, the keys of ``MODEL.ROI_HEADS.NAME: TextROIHeads`` (in place)."""
    cfg.MODEL.TEXT_RCNN = CN()
    # File with precomputed embeddings of the class names (clipdense.clip.tables), absolute or below
    # DETECTRON2_DATASETS. "": the text tower of MODEL.CLIP encodes the class names of the datasets.
    cfg.MODEL.TEXT_RCNN.TABLE = ""
    # Prompt templates without a table: the name of a set, or a sentence that contains {}.
    cfg.MODEL.TEXT_RCNN.TEMPLATES = "single"
    # Embedding of the background: "learned", or "zero" (its logit is always 0).
    cfg.MODEL.TEXT_RCNN.BACKGROUND = "learned"
    # Temperature: cosines are divided by it before the softmax.
    cfg.MODEL.TEXT_RCNN.TEMPERATURE = 0.02
    # Whether the temperature is learned.
    cfg.MODEL.TEXT_RCNN.LEARN_TEMPERATURE = True
