"""Configuration keys of F-VLM and F-ViT; those of the trunk are MODEL.FROZEN_CLIP and MODEL.INTERPOLATED."""

from detectron2.config import CfgNode as CN


def add_fvlm_config(cfg: CN) -> None:
    """Add ``MODEL.FVLM``, and the norm of ``MODEL.RPN`` (in place)."""
    # Norm after each convolution of the RPN head "NormRPNHead"; any norm of Detectron2.
    cfg.MODEL.RPN.NORM = "BN"

    cfg.MODEL.FVLM = CN()
    # Source of the class names' text embeddings: "clip" (a text tower), "table" (TEXT_TABLE), or "weights"
    # (the embeddings in MODEL.WEIGHTS; no other class can be named).
    cfg.MODEL.FVLM.TEXT_SOURCE = "clip"
    # For "table": file of precomputed embeddings (tools/make_text_table.py); a relative path is also looked
    # up in DETECTRON2_DATASETS.
    cfg.MODEL.FVLM.TEXT_TABLE = ""
    # For "clip": name and weights of the CLIP with the text tower, as MODEL.CLIP.NAME and PRETRAINED; an
    # empty name takes MODEL.CLIP. A detector's weights contain an image tower, but no text tower.
    cfg.MODEL.FVLM.TEXT_ENCODER = CN()
    cfg.MODEL.FVLM.TEXT_ENCODER.NAME = ""
    cfg.MODEL.FVLM.TEXT_ENCODER.PRETRAINED = ""
    # For "clip": prompt templates, the name of a set or one sentence with {} in it.
    cfg.MODEL.FVLM.TEMPLATES = "clip_80"
    # "mean" averages the names of a class; "first" uses the display name only (published F-ViT).
    cfg.MODEL.FVLM.SYNONYMS = "mean"
    # Embedding of the background: "text" (of the word "background"), or "learned" by the detector; CLIP's
    # scores then have no background.
    cfg.MODEL.FVLM.BACKGROUND = "text"
    # Weight of the background in the classification loss; base classes have 1. Published: F-VLM and F-ViT on
    # OV-LVIS 0.9, F-ViT on OV-COCO 0.6.
    cfg.MODEL.FVLM.BACKGROUND_WEIGHT = 0.9
    # Inverse temperature of the detector: factor of its cosines before the softmax (F-VLM 100, F-ViT 50).
    cfg.MODEL.FVLM.SCALE = 100.0
    # Whether training changes SCALE.
    cfg.MODEL.FVLM.LEARN_SCALE = True
    # ReLU after the last layer of the detector's region embedding (published F-ViT).
    cfg.MODEL.FVLM.EMBEDDING_RELU = False
    # Width of a fully connected layer of the box regression only; 0: no such layer (published F-ViT: the
    # embedding dimension).
    cfg.MODEL.FVLM.BOX_FC_DIM = 0
    # Inverse temperature of CLIP's scores: factor of the cosines of its region embeddings before the softmax.
    cfg.MODEL.FVLM.CLIP_SCALE = 100.0
    # Rule that fuses the detector's and CLIP's scores in evaluation: "fvlm", "fvit" or "fvit_transfer"
    # (clipdense.regions.fusion).
    cfg.MODEL.FVLM.FUSION = "fvlm"
    # Weight of CLIP for base classes (ALPHA) and novel classes (BETA), 0 to 1. Published: F-VLM 0.35 and 0.65
    # on LVIS, 0.2 and 0.45 on COCO; F-ViT 0.1 and 0.8 on COCO.
    cfg.MODEL.FVLM.ALPHA = 0.35
    cfg.MODEL.FVLM.BETA = 0.65
    # In pixels: boxes smaller than twice this size (square root of the area) are pooled from the finest level
    # of MODEL.ROI_HEADS.IN_FEATURES.
    cfg.MODEL.FVLM.FINEST_BOX_SIZE = 56.0
    # Side in pixels of the squares that images are padded to, or more if an image is larger; the published
    # F-ViTs need it in evaluation. 0: pad only as far as the backbone requires.
    cfg.MODEL.FVLM.SQUARE_SIZE = 0

    cfg.register_renamed_key("MODEL.FVLM.TEXT", "MODEL.FVLM.TEXT_SOURCE")
    cfg.register_renamed_key("MODEL.FVLM.TEXT_CLIP", "MODEL.FVLM.TEXT_ENCODER.NAME")
