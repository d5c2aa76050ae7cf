"""Configuration keys of adapting a CLIP to masked crops; the crop rule and the depth of mask prompts are
those of MODEL.TWO_STAGE, so that training equals inference."""

from detectron2.config import CfgNode as CN


def add_adaptation_config(cfg: CN) -> None:
    """Add ``MODEL.MASK_ADAPTED_CLIP`` and ``INPUT.MASK_PAIRS`` (in place).

    The defaults are OVSeg's (Liang et al., CVPR 2023, section 3).
    """
    cfg.MODEL.MASK_ADAPTED_CLIP = CN()
    # What is trained beside the temperature: "image" (the image tower), "prompts" (the mask prompts), "both".
    # The text tower never is.
    cfg.MODEL.MASK_ADAPTED_CLIP.TRAINABLE = "image"
    # Prompt templates of the nouns, a set's name ("name": the noun alone) or one sentence with {} in it;
    # their embeddings are averaged. OVSeg: the captions of its pairs as they are, of unknown form.
    cfg.MODEL.MASK_ADAPTED_CLIP.TEMPLATES = "name"
    # The learned temperature exp(logit_scale) is kept between 1 and this.
    cfg.MODEL.MASK_ADAPTED_CLIP.MAX_LOGIT_SCALE = 100.0

    cfg.INPUT.MASK_PAIRS = CN()
    # Side of a region in pixels: the native size of the CLIP.
    cfg.INPUT.MASK_PAIRS.SIZE = 224
    # Random resized crop of a region: the part of its area that is kept, and the aspect ratio of that.
    cfg.INPUT.MASK_PAIRS.CROP_SCALE = (0.9, 1.0)
    cfg.INPUT.MASK_PAIRS.CROP_RATIO = (3 / 4, 4 / 3)
