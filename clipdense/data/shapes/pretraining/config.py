"""Configuration keys of contrastive pre-training."""

from detectron2.config import CfgNode as CN


def add_shapes_pretraining_config(cfg: CN) -> None:
    """Add ``MODEL.CONTRASTIVE_CLIP`` and ``INPUT.CROP_CAPTION`` (in place)."""
    cfg.MODEL.CONTRASTIVE_CLIP = CN()
    # Train the text tower alone: captions are contrasted with other captions of the same content.
    cfg.MODEL.CONTRASTIVE_CLIP.TEXT_ONLY = False
    # "" trains the text tower; else the name of a CLIP whose text tower is taken over and stays locked (LiT),
    # or "shapes-text" for the one that the nano CLIPs share.
    cfg.MODEL.CONTRASTIVE_CLIP.LOCKED_TEXT = ""
    # Weight of the squared length of the mean embedding, of images and of captions. The contrast does not
    # change if all captions move in one direction; this term keeps them out of a narrow cone.
    cfg.MODEL.CONTRASTIVE_CLIP.CENTRING_WEIGHT = 0.0
    # exp(logit_scale) at the start: a large one makes captions of the same colour count most. 0 leaves
    # it as it is.
    cfg.MODEL.CONTRASTIVE_CLIP.INIT_LOGIT_SCALE = 0.0
    # The temperature exp(logit_scale) is kept at most this large.
    cfg.MODEL.CONTRASTIVE_CLIP.MAX_LOGIT_SCALE = 100.0
    # ResNets: start the attention pool so that each position attends to its neighbourhood and the mean token
    # to the whole map (`localize_pool`). False leaves the pool as it is.
    cfg.MODEL.CONTRASTIVE_CLIP.LOCAL_POOL = False

    cfg.INPUT.CROP_CAPTION = CN()
    # Kinds of views of a scene: a list of dicts with
    #   SIZE: side of a crop in pixels, a multiple of the tower's stride;
    #   PER_IMAGE: crops, with a caption each, that are cut from one scene;
    #   SHARE: share of the scenes that give this view (the shares need not sum to 1);
    #   OBJECTS, WINDOWS: shares of crops of one thing with context, and of windows on several things; the
    #     rest shows ground alone.
    # The first view is the one that is evaluated: its size is the native one of the CLIP that is trained.
    cfg.INPUT.CROP_CAPTION.VIEWS = [
        {"SIZE": 64, "PER_IMAGE": 4, "SHARE": 1.0, "OBJECTS": 0.8, "WINDOWS": 0.14}
    ]
