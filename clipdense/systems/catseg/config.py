"""Configuration keys of CAT-Seg and SED."""

from detectron2.config import CfgNode as CN


def add_catseg_config(cfg: CN) -> None:
    """Add ``MODEL.CAT_SEG`` to ``cfg`` (in place).

    The sizes are those of the published CAT-Seg with ViT-B/16. Pixels are normalised with the statistics of
    MODEL.CLIP; MODEL.PIXEL_MEAN and PIXEL_STD are not read. SED does not read LAYERS, WINDOW, MAX_CLASSES,
    REJECTION.SCORES, GUIDANCE_DIMS, IMAGE_GUIDANCE_DIM and TEXT_GUIDANCE_DIM.
    """
    cfg.MODEL.CAT_SEG = CN()
    keys = cfg.MODEL.CAT_SEG
    # Side in pixels of the square images that CLIP takes; a multiple of its stride. Published: 384
    # (ViT-B/16), 336 (ViT-L/14), both 24 x 24 tokens.
    keys.RESOLUTION = 384
    # Mode of CLIP's dense map. "value" suits every ViT, and weights distilled by CLIPSelf were trained for
    # it; published CAT-Seg: "catseg" (the residual of the last block is the class token). ConvNeXt: "plain".
    keys.DENSE = "value"
    # Blocks (ViT, from 0) or stages (ResNet, ConvNeXt: 4 and 3) whose maps guide the decoder at 2 and 4 times
    # the size of the dense map. Published: [3, 7] (ViT-B/16), [7, 15] (ViT-L/14). SED: stages [4, 3, 2].
    keys.GUIDANCE = [3, 7]
    # Channels of these maps after upsampling, after their projection for the decoder, and of the decoder.
    # SED: [32, 16, 8] after the projection and [64, 32, 16] of the decoder.
    keys.GUIDANCE_DIMS = [256, 128]
    keys.DECODER_GUIDANCE_DIMS = [32, 16]
    keys.DECODER_DIMS = [64, 32]
    # Parameters of CLIP that learn: "attention" (weights of the query and value projections of both towers),
    # "full" (both towers except their position tables), "image" (the same of the image tower) or "none".
    keys.FINETUNE = "attention"
    # Prompt templates: the name of a set, or one sentence with {} in it. Their number is the number of
    # channels of the cost volume. Published: "single_scene"; "clip_80" with 4 layers and pooling [6, 6].
    keys.TEMPLATES = "single_scene"
    # "first" uses the display name of a class (published), "mean" averages its names per template (SED).
    keys.SYNONYMS = "first"
    # Channels of the cost embeddings, heads of all attentions, and number of layers.
    keys.HIDDEN_DIM = 128
    keys.HEADS = 4
    keys.LAYERS = 2
    # SED: side of the depthwise convolution of each stage.
    keys.KERNELS = [9, 9, 9]
    # Side of the attention windows, in positions of the dense map.
    keys.WINDOW = 12
    # Channels of the image and text embeddings that guide the attentions.
    keys.IMAGE_GUIDANCE_DIM = 128
    keys.TEXT_GUIDANCE_DIM = 128
    # Number of classes above which the best of each image are aggregated alone, by their best cosine.
    keys.MAX_CLASSES = 256
    # Height and width of the average pooling before the class attention, in training.
    keys.POOLING = [2, 2]
    # Pixels without a label: "excluded" from the loss, or "negative" for every class (published).
    keys.IGNORED_PIXELS = "excluded"
    # Published CAT-Seg pads images to multiples of 32 and squeezes the padding into the square with them, so
    # that maps and labels do not match exactly. True does the same; False resizes the image alone.
    keys.SQUEEZE_PADDING = False

    # Category early rejection: the classes are scored by the "cost" volume before the first layer, or by
    # "heads" that are trained for it and score them before each layer and before the decoder.
    keys.REJECTION = CN()
    keys.REJECTION.SCORES = "cost"
    # Number of best classes that each position keeps, in evaluation; 0: no rejection. Published SED: 8.
    keys.REJECTION.TOPK = 0

    keys.TEST = CN()
    # Pooling in evaluation (published: [1, 1]).
    keys.TEST.POOLING = [1, 1]
    # Published inference: the image is resized to a square of IMAGE_SIZE, from which overlapping windows of
    # SIZE are cut every STRIDE pixels. Their averaged scores are averaged with those of the whole image.
    # False: the whole image is the only view.
    keys.TEST.WINDOWS = CN()
    keys.TEST.WINDOWS.ENABLED = False
    keys.TEST.WINDOWS.IMAGE_SIZE = 640
    keys.TEST.WINDOWS.SIZE = 384
    keys.TEST.WINDOWS.STRIDE = 256
    # Number of views per forward, and of maps (views x classes) that are aggregated or decoded at a time.
    # They bound the memory and do not change results.
    keys.TEST.VIEWS_PER_FORWARD = 5
    keys.TEST.MAX_MAPS = 64
