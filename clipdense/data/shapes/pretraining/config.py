"""Configuration keys of contrastive pre-training."""

from detectron2.config import CfgNode as CN


def add_shapes_pretraining_config(cfg: CN) -> None:
    """Add ``MODEL.CONTRASTIVE_CLIP`` and ``INPUT.CROP_CAPTION`` to ``cfg``, in place."""
    cfg.MODEL.CONTRASTIVE_CLIP = CN()
    # Train only the text tower, on captions and their paraphrases.
    cfg.MODEL.CONTRASTIVE_CLIP.TEXT_ONLY = False
    # Name of a CLIP whose text tower is copied and frozen (LiT), or "shapes-text" for the text tower that the
    # nano CLIPs share. "" trains the text tower.
    cfg.MODEL.CONTRASTIVE_CLIP.LOCKED_TEXT = ""
    # Weight of the squared length of the mean embedding of images plus that of captions. The contrastive loss
    # does not change if all captions move in one direction. This term keeps them out of a narrow cone.
    cfg.MODEL.CONTRASTIVE_CLIP.CENTRING_WEIGHT = 0.0
    # Initial logit scale (inverse temperature). With a large one, captions of the same colour dominate the
    # loss. 0 keeps the logit scale of the CLIP.
    cfg.MODEL.CONTRASTIVE_CLIP.INIT_LOGIT_SCALE = 0.0
    # Upper bound of the logit scale (inverse temperature).
    cfg.MODEL.CONTRASTIVE_CLIP.MAX_LOGIT_SCALE = 100.0
    # For ResNets: initialise the attention pool so that each position attends to its neighbourhood and the
    # mean token to the whole map (`localize_pool`). False keeps the weights of the pool.
    cfg.MODEL.CONTRASTIVE_CLIP.LOCAL_POOL = False

    cfg.INPUT.CROP_CAPTION = CN()
    # Kinds of views of a scene: a list of dicts with
    #   SIZE: side of a crop in pixels, a multiple of the tower's stride;
    #   PER_IMAGE: number of captioned crops per scene;
    #   SHARE: relative share of the scenes that use this view (the shares need not sum to 1);
    #   OBJECTS: share of crops around one thing, with context;
    #   WINDOWS: share of windows with several things. All other crops contain only ground.
    # Evaluation uses the first view. Its SIZE must be the native image size of the CLIP.
    cfg.INPUT.CROP_CAPTION.VIEWS = [
        {"SIZE": 64, "PER_IMAGE": 4, "SHARE": 1.0, "OBJECTS": 0.8, "WINDOWS": 0.14}
    ]
