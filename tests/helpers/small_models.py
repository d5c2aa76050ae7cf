"""Configurations of small models, which are built and run in milliseconds."""

from clipdense.run.config import add_clipdense_config

from detectron2.config import CfgNode, get_cfg

__all__ = ["small_ovseg_config"]


def small_ovseg_config() -> CfgNode:
    """Return the config of an OVSeg with six queries, a narrow ResNet and the nano ViT of shapes."""
    cfg = get_cfg()
    add_clipdense_config(cfg)
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.DEVICE = "OVSeg", "cpu"
    cfg.MODEL.CLIP.NAME, cfg.MODEL.TWO_STAGE.TEMPLATES = "shapes-vit", "single"
    cfg.MODEL.BACKBONE.NAME, cfg.MODEL.BACKBONE.FREEZE_AT = "build_resnet_backbone", 0
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.RESNETS.STEM_OUT_CHANNELS = cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 8
    cfg.MODEL.RESNETS.WIDTH_PER_GROUP = 4
    keys = cfg.MODEL.MASK_FORMER
    keys.PIXEL_DECODER.CONV_DIM = keys.MASK_DIM = keys.HIDDEN_DIM = 32
    keys.NHEADS, keys.DIM_FEEDFORWARD, keys.NUM_OBJECT_QUERIES, keys.DEC_LAYERS = 4, 32, 6, 2
    return cfg
