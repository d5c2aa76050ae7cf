"""Configuration keys of F-VLM and F-ViT; those of the trunk are MODEL.FROZEN_CLIP and MODEL.INTERPOLATED."""

from detectron2.config import CfgNode as CN


def add_fvlm_config(cfg: CN) -> None:
    """Add ``MODEL.FVLM``, and the norm of ``MODEL.RPN`` (in place)."""
    # Norm after each convolution of the RPN head NormRPNHead, any of Detectron2.
    cfg.MODEL.RPN.NORM = "BN"

    cfg.MODEL.FVLM = CN()
    # Where embeddings of words come from: "clip" (the text tower of MODEL.CLIP), a precomputed table
    # (clipdense.clip.tables; a file, also relative to DETECTRON2_DATASETS), or "weights" (those of the
    # training classes that MODEL.WEIGHTS holds, and no other words).
    cfg.MODEL.FVLM.TEXT = "clip"
    # [name, weights] of another CLIP than MODEL.CLIP whose text tower is taken. A detector's weights hold its
    # image tower but no text tower.
    cfg.MODEL.FVLM.TEXT_CLIP = []
    # Prompt templates of the text tower, a set's name or one sentence with {} in it.
    cfg.MODEL.FVLM.TEMPLATES = "clip_80"
    # "mean" averages the names of a class; "first" takes the display name alone (published F-ViT).
    cfg.MODEL.FVLM.SYNONYMS = "mean"
    # Embedding of the background: "text" (of the word "background"), or "learned" by the detector, so that
    # CLIP's scores know no background.
    cfg.MODEL.FVLM.BACKGROUND = "text"
    # Weight of the background in the classification loss; base classes have 1. Published: 0.9, F-ViT on
    # OV-COCO 0.6.
    cfg.MODEL.FVLM.BACKGROUND_WEIGHT = 0.9
    # Cosines of the detector's region embeddings are multiplied by it before the softmax (F-VLM 100, F-ViT
    # 50), and whether training changes it.
    cfg.MODEL.FVLM.SCALE = 100.0
    cfg.MODEL.FVLM.LEARN_SCALE = True
    # ReLU after the last layer of the detector's region embedding (published F-ViT).
    cfg.MODEL.FVLM.EMBEDDING_RELU = False
    # Width of a fully-connected layer that only box regression has; 0 for none (published F-ViT: the
    # embeddings' dimension).
    cfg.MODEL.FVLM.BOX_FC_DIM = 0
    # Cosines of CLIP's region embeddings are multiplied by it before the softmax.
    cfg.MODEL.FVLM.CLIP_SCALE = 100.0
    # How the detector's and CLIP's scores are fused in evaluation: "fvlm", "fvit" or "fvit_transfer"
    # (clipdense.regions.fusion), with CLIP's weight for base (ALPHA) and novel classes (BETA). Published:
    # F-VLM 0.35, 0.65 on LVIS and 0.2, 0.45 on COCO; F-ViT 0.1, 0.8 on COCO.
    cfg.MODEL.FVLM.FUSION = "fvlm"
    cfg.MODEL.FVLM.ALPHA = 0.35
    cfg.MODEL.FVLM.BETA = 0.65
    # Boxes below twice this size in pixels are pooled from the finest of MODEL.ROI_HEADS.IN_FEATURES.
    cfg.MODEL.FVLM.FINEST_BOX_SIZE = 56.0
    # Images are padded to squares of at least this side in pixels, as the published F-ViTs need it in
    # evaluation; 0 pads no more than the backbone needs.
    cfg.MODEL.FVLM.SQUARE_SIZE = 0
