"""Configuration keys of pixel-text supervision. The keys of the backbone are MODEL.LANGUAGE."""

from clipdense.systems.denseclip.retinanet import add_retinanet_rules

from detectron2.config import CfgNode as CN


def add_denseclip_config(cfg: CN) -> None:
    """Add ``MODEL.PIXEL_TEXT``, and the rules of ``MODEL.RETINANET`` (in place)."""
    add_retinanet_rules(cfg)
    cfg.MODEL.PIXEL_TEXT = CN()
    # The meta-architecture that PixelTextSupervised wraps. DenseCLIPRCNN and DenseCLIPRetinaNet ignore it.
    cfg.MODEL.PIXEL_TEXT.BASE = "GeneralizedRCNN"
    # What the targets of the score map are computed from: "boxes" (published), "masks" (of instances) or
    # "sem_seg".
    cfg.MODEL.PIXEL_TEXT.SOURCE = "boxes"
    # "bce" (published detectors): binary cross-entropy at the pixels inside any box; "focal": sigmoid focal
    # loss there; "ce": softmax cross-entropy at the pixels that have a class. SOURCE sem_seg always uses
    # "ce", as the published segmentors do.
    cfg.MODEL.PIXEL_TEXT.LOSS = "bce"
    # bce and focal: number added to the logits inside the loss only. A negative value, such as -8, starts
    # from the rate of positives; the published loss has none.
    cfg.MODEL.PIXEL_TEXT.BIAS = 0.0
    # bce and focal: whether that number is learned.
    cfg.MODEL.PIXEL_TEXT.LEARN_BIAS = False
    # Weight of the auxiliary loss. Published: 1.0 in detectors, 0.4 in segmentors.
    cfg.MODEL.PIXEL_TEXT.WEIGHT = 1.0
