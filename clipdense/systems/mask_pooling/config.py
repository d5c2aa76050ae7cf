"""Configuration keys of mask pooling: FC-CLIP and ODISE. Masks are configured by MODEL.MASK_FORMER, the CLIP
in the backbone by MODEL.CLIP and MODEL.FROZEN_CLIP."""

from detectron2.config import CfgNode as CN


def add_mask_pooling_config(cfg: CN) -> None:
    """Add ``MODEL.MASK_POOLING`` to ``cfg`` (in place).

    The defaults are FC-CLIP's (Yu et al., NeurIPS 2023); comments name those of ODISE (Xu et al., CVPR 2023)
    and OVRCOAT (CVPR 2026) where they differ.
    """
    cfg.MODEL.MASK_POOLING = CN()
    # Prompt templates of class names: the name of a set, or one sentence with {} in it.
    cfg.MODEL.MASK_POOLING.TEMPLATES = "ovseg_14"
    # Linear layers from a query, with the pixels in its mask, to its embedding.
    cfg.MODEL.MASK_POOLING.EMBED_LAYERS = 3
    # LayerNorm before these layers (ODISE: True).
    cfg.MODEL.MASK_POOLING.EMBED_NORM = False
    # Channels of a learned projection of text embeddings and of the query embeddings; 0: the text embeddings
    # as they are (ODISE: 256).
    cfg.MODEL.MASK_POOLING.TEXT_PROJECTION = 0
    # Initial embedding of void: "random", or "text", that of the empty text (ODISE).
    cfg.MODEL.MASK_POOLING.VOID_INIT = "random"

    # The classifier of classes that were not labelled in training.
    cfg.MODEL.MASK_POOLING.OUT_OF_VOCABULARY = CN()
    # "dense": pool the map of the backbone's frozen CLIP. "mask_tokens": a second CLIP, a ViT, with one class
    # token per mask (ODISE). "none": the in-vocabulary classifier alone.
    cfg.MODEL.MASK_POOLING.OUT_OF_VOCABULARY.HEAD = "dense"
    # "mask_tokens": the CLIP, as MODEL.CLIP.NAME and PRETRAINED; it also embeds the class names. NAME "":
    # MODEL.CLIP.
    cfg.MODEL.MASK_POOLING.OUT_OF_VOCABULARY.NAME = ""
    cfg.MODEL.MASK_POOLING.OUT_OF_VOCABULARY.PRETRAINED = ""
    # How a mask becomes a region of CLIP's map: "fcclip", "odise", "clipself" or "soft"
    # (clipdense.systems.mask_pooling.MaskPolicy). Published for mask tokens: "odise".
    cfg.MODEL.MASK_POOLING.OUT_OF_VOCABULARY.MASKS = "fcclip"
    # Weight of a cross-entropy loss of the ground-truth masks' embeddings, which trains the tower if
    # MODEL.FROZEN_CLIP.TRAIN_TOWER is set; 0: none (OVRCOAT: 0.1, with a learning rate of 1e-4).
    cfg.MODEL.MASK_POOLING.OUT_OF_VOCABULARY.LOSS_WEIGHT = 0.0

    # Fusion of both classifiers: the attributes of clipdense.systems.mask_pooling.Ensemble. ALPHA and BETA
    # are the weights of the out-of-vocabulary classifier for base and novel classes (ODISE: 0.3, 0.7; trained
    # on captions: 0.35, 0.65). EMPTY "pooled": published ConvNeXts. OVRCOAT: VOID_ADJUSTMENT 0.5.
    cfg.MODEL.MASK_POOLING.ENSEMBLE = CN()
    cfg.MODEL.MASK_POOLING.ENSEMBLE.ALPHA = 0.4
    cfg.MODEL.MASK_POOLING.ENSEMBLE.BETA = 0.8
    cfg.MODEL.MASK_POOLING.ENSEMBLE.RULE = "probability"
    cfg.MODEL.MASK_POOLING.ENSEMBLE.SOURCE = "ensemble"
    cfg.MODEL.MASK_POOLING.ENSEMBLE.EMPTY = "in_vocabulary"
    cfg.MODEL.MASK_POOLING.ENSEMBLE.VOID_ADJUSTMENT = 0.0

    # Supervision by captions instead of class labels (ODISE): queries are classified as object or no object,
    # and the noun phrases of a caption are grounded in them. Needs INPUT.MAPPER CaptionedSegmentationMapper.
    cfg.MODEL.MASK_POOLING.GROUNDING = CN()
    cfg.MODEL.MASK_POOLING.GROUNDING.ENABLED = False
    # Weight of the grounding loss.
    cfg.MODEL.MASK_POOLING.GROUNDING.WEIGHT = 2.0
    # Number of noun phrases of a caption, drawn with replacement.
    cfg.MODEL.MASK_POOLING.GROUNDING.NUM_PHRASES = 8
    # The sentence around a phrase.
    cfg.MODEL.MASK_POOLING.GROUNDING.TEMPLATE = "a photo of a {}."
    # CaptionedSegmentationMapper: a registered dataset with captions, or a file of COCO captions, whose
    # images are found by their file names; "": the captions in the records of DATASETS.TRAIN.
    cfg.INPUT.CAPTIONS = ""
