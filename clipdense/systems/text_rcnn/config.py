"""Configuration keys of R-CNNs with a text classifier."""

from detectron2.config import CfgNode as CN


def add_text_rcnn_config(cfg: CN) -> None:
    """Add ``MODEL.TEXT_RCNN`` (in place). Use it by ``MODEL.ROI_HEADS.NAME: TextROIHeads``."""
    cfg.MODEL.TEXT_RCNN = CN()
    # Precomputed embeddings of the class names (clipdense.clip.tables): a file, also relative to
    # DETECTRON2_DATASETS. "" encodes the names of the first training set with the text tower of MODEL.CLIP.
    cfg.MODEL.TEXT_RCNN.TABLE = ""
    # Without a table: prompt templates, a set's name or one sentence with {} in it.
    cfg.MODEL.TEXT_RCNN.TEMPLATES = "single"
    # Embedding of the background: "learned", or "zero", whose logit is always 0.
    cfg.MODEL.TEXT_RCNN.BACKGROUND = "learned"
    # Cosines are divided by it before the softmax.
    cfg.MODEL.TEXT_RCNN.TEMPERATURE = 0.02
    # Whether training changes it.
    cfg.MODEL.TEXT_RCNN.LEARN_TEMPERATURE = True
