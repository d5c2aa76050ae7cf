"""Configuration keys of SegCLIP."""

from detectron2.config import CfgNode as CN


def add_segclip_config(cfg: CN) -> None:
    """Add ``MODEL.SEGCLIP`` and ``INPUT.SEGCLIP`` (in place). Defaults are published, where nothing else is
    said."""
    cfg.MODEL.SEGCLIP = CN()
    # Number of learnable centres, the groups of patches.
    cfg.MODEL.SEGCLIP.CENTERS = 8
    # Number of blocks of the CLIP, from the top, that work on groups instead of patches.
    cfg.MODEL.SEGCLIP.GROUP_LAYERS = 2
    # Number of cross-attention blocks of the centres.
    cfg.MODEL.SEGCLIP.CROSS_LAYERS = 2
    # Keep the published bug that mixes the keys of the images of a batch. It has no effect on single images.
    cfg.MODEL.SEGCLIP.MIXED_KEYS = False
    # Number of blocks on reconstructed tokens; 0: no reconstruction.
    cfg.MODEL.SEGCLIP.RECONSTRUCT_LAYERS = 2
    # Decoder of the reconstruction: width, number of blocks (0: no decoder and no loss), attention heads.
    cfg.MODEL.SEGCLIP.DECODER = CN()
    cfg.MODEL.SEGCLIP.DECODER.WIDTH = 384
    cfg.MODEL.SEGCLIP.DECODER.DEPTH = 3
    cfg.MODEL.SEGCLIP.DECODER.HEADS = 8
    # Share of visible tokens in the reconstruction.
    cfg.MODEL.SEGCLIP.KEEP = 0.25
    # Weights of the reconstruction loss and of the superpixel loss; the contrastive loss has weight 1.
    cfg.MODEL.SEGCLIP.RECONSTRUCTION_WEIGHT = 1.0
    cfg.MODEL.SEGCLIP.SUPERPIXEL_WEIGHT = 1.0
    # Upper bound of the inverse temperature exp(logit_scale).
    cfg.MODEL.SEGCLIP.MAX_LOGIT_SCALE = 100.0
    # Prompt templates of class names: the name of a set, or a sentence with {}.
    cfg.MODEL.SEGCLIP.TEMPLATES = "a photo of a {}."
    # Evaluation: side and stride of the square windows in pixels. Published: 224 on images whose short side
    # is 224 (INPUT.MIN_SIZE_TEST).
    cfg.MODEL.SEGCLIP.WINDOW = 224
    cfg.MODEL.SEGCLIP.STRIDE = 224
    # Only the classes with the best scores of the whole window compete for its groups; 0: all.
    cfg.MODEL.SEGCLIP.TOP_CLASSES = 5

    # SegCLIPMapper: side of the training images in pixels, a multiple of the patch size.
    cfg.INPUT.SEGCLIP = CN()
    cfg.INPUT.SEGCLIP.SIZE = 224
    # Side of a patch in pixels, which must be the CLIP's.
    cfg.INPUT.SEGCLIP.PATCH = 16
    # Range of the area of a random crop, as a share of the image.
    cfg.INPUT.SEGCLIP.CROP_SCALE = (0.5, 1.0)
    # Superpixels (Felzenszwalb): scale, sigma in pixels, smallest size in pixels. Published: of the whole
    # image before cropping; here of the crop.
    cfg.INPUT.SEGCLIP.SUPERPIXELS = (224.0, 0.9, 224)
    # Superpixel of a patch: "majority", or "mean" (the mean of the numbers, published).
    cfg.INPUT.SEGCLIP.PATCH_LABEL = "majority"
