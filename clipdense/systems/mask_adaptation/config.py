"""Configuration keys of CLIP's adaptation to masked crops."""

from clipdense.regions import CropRule

from detectron2.config import CfgNode as CN


def add_adaptation_config(cfg: CN) -> None:
    """Add ``MODEL.MASK_ADAPTED_CLIP`` and ``INPUT.MASK_PAIRS`` (in place).

    The defaults are OVSeg's (Liang et al., CVPR 2023, section 3).
    """
    cfg.MODEL.MASK_ADAPTED_CLIP = CN()
    # Parameters to train, besides the temperature: "image" (the image encoder), "prompts" (the mask prompts)
    # or "both". The text encoder is frozen.
    cfg.MODEL.MASK_ADAPTED_CLIP.TRAINABLE = "image"
    # Prompt templates of the nouns: the name of a set ("name": the noun alone), or one sentence with {} in
    # it. Embeddings of several templates are averaged. OVSeg trains with the texts of its pairs unchanged.
    cfg.MODEL.MASK_ADAPTED_CLIP.TEMPLATES = "name"
    # Upper bound of the learned temperature exp(logit_scale); the lower bound is 1.
    cfg.MODEL.MASK_ADAPTED_CLIP.MAX_LOGIT_SCALE = 100.0
    # Mask prompts of a ViT: the number of layers that have them; 0 keeps those of the file in
    # MODEL.CLIP.PRETRAINED, if it has any. ENABLED False ignores them in the forward.
    cfg.MODEL.MASK_ADAPTED_CLIP.MASK_PROMPTS = CN()
    cfg.MODEL.MASK_ADAPTED_CLIP.MASK_PROMPTS.DEPTH = 0
    cfg.MODEL.MASK_ADAPTED_CLIP.MASK_PROMPTS.ENABLED = True
    # How a mask becomes a crop: the attributes of clipdense.regions.CropRule. Use the values of
    # MODEL.TWO_STAGE.CROP in the OVSeg model that will use the adapted CLIP.
    cfg.MODEL.MASK_ADAPTED_CLIP.CROP = CN(CropRule(threshold=0.4).config_keys())
    # Crops in one forward of CLIP, in evaluation.
    cfg.MODEL.MASK_ADAPTED_CLIP.CROP_BATCH_SIZE = 64

    cfg.INPUT.MASK_PAIRS = CN()
    # Side of a crop in pixels; must be the native image size of the CLIP.
    cfg.INPUT.MASK_PAIRS.SIZE = 224
    # Random resized crop of a region: range of the area that is kept (share of the region's area), and of its
    # aspect ratio (width / height in pixels).
    cfg.INPUT.MASK_PAIRS.CROP_SCALE = (0.9, 1.0)
    cfg.INPUT.MASK_PAIRS.CROP_RATIO = (3 / 4, 4 / 3)
