"""Configuration keys of prompt learning."""

from detectron2.config import CfgNode as CN


def add_prompting_config(cfg: CN) -> None:
    """Add ``MODEL.PROMPTED_CLIP`` (in place). The prompts themselves are ``MODEL.PROMPT``."""
    cfg.MODEL.PROMPTED_CLIP = CN()
    # Prompt templates of class names without learned contexts: the name of a set, or a sentence with {}.
    cfg.MODEL.PROMPTED_CLIP.TEMPLATES = "single"
    # Mode of the dense map that pre-model prompting reads, one of the image tower's.
    cfg.MODEL.PROMPTED_CLIP.DENSE = "plain"
    # Weight of the contrastive loss from classes to the images of a batch (ICPC, experimental); 0: none.
    cfg.MODEL.PROMPTED_CLIP.ALIGNMENT_WEIGHT = 0.0
