"""Configuration keys of mask proposals: MaskFormer and Mask2Former."""

from detectron2.config import CfgNode as CN


def add_maskformer_config(cfg: CN) -> None:
    """Add ``MODEL.MASK_FORMER`` and what goes with it to ``cfg`` (in place).

    The defaults are MaskFormer's (Cheng et al., NeurIPS 2021); Mask2Former's (CVPR 2022), where they differ,
    stand beside them. Classes are counted by MODEL.SEM_SEG_HEAD.NUM_CLASSES.
    """
    cfg.MODEL.MASK_FORMER = CN()
    # The backbone's maps that the pixel decoder reads.
    cfg.MODEL.MASK_FORMER.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    # Images are padded to multiples of it, right and below.
    cfg.MODEL.MASK_FORMER.SIZE_DIVISIBILITY = 32

    cfg.MODEL.MASK_FORMER.PIXEL_DECODER = CN()
    # "BasePixelDecoder" (a feature pyramid), "TransformerEncoderPixelDecoder" (with a transformer on its
    # coarsest map), or "MSDeformAttnPixelDecoder" (Mask2Former).
    cfg.MODEL.MASK_FORMER.PIXEL_DECODER.NAME = "BasePixelDecoder"
    cfg.MODEL.MASK_FORMER.PIXEL_DECODER.CONV_DIM = 256
    # Norm of its pyramid, any of Detectron2.
    cfg.MODEL.MASK_FORMER.PIXEL_DECODER.NORM = "GN"
    # Layers of its transformer.
    cfg.MODEL.MASK_FORMER.PIXEL_DECODER.ENC_LAYERS = 6
    # MSDeformAttnPixelDecoder: width of the two linear layers, and points a head samples on a map.
    cfg.MODEL.MASK_FORMER.PIXEL_DECODER.DIM_FEEDFORWARD = 1024
    cfg.MODEL.MASK_FORMER.PIXEL_DECODER.POINTS = 4

    # "StandardTransformerDecoder", or "MultiScaleMaskedTransformerDecoder" (Mask2Former).
    cfg.MODEL.MASK_FORMER.TRANSFORMER_DECODER = "StandardTransformerDecoder"
    # The backbone's map that queries look at; "" for what the pixel decoder's transformer gives
    # (Mask2Former).
    cfg.MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE = "res5"
    # Channels of the mask features, and of queries.
    cfg.MODEL.MASK_FORMER.MASK_DIM = 256
    cfg.MODEL.MASK_FORMER.HIDDEN_DIM = 256
    cfg.MODEL.MASK_FORMER.NUM_OBJECT_QUERIES = 100
    # Of all transformers. Mask2Former: dropout 0.
    cfg.MODEL.MASK_FORMER.NHEADS = 8
    cfg.MODEL.MASK_FORMER.DIM_FEEDFORWARD = 2048
    cfg.MODEL.MASK_FORMER.DROPOUT = 0.1
    cfg.MODEL.MASK_FORMER.PRE_NORM = False
    # StandardTransformerDecoder: self-attention layers on the map before queries look at it.
    cfg.MODEL.MASK_FORMER.ENC_LAYERS = 0
    # Mask2Former: 9. Published configs say 10 there, and count the prediction before the first layer.
    cfg.MODEL.MASK_FORMER.DEC_LAYERS = 6
    # Project the map that queries look at also where it has HIDDEN_DIM channels.
    cfg.MODEL.MASK_FORMER.ENFORCE_INPUT_PROJ = False

    # Targets: every segment of a panoptic map ("panoptic"), or one mask a class of a semantic map
    # ("semantic").
    cfg.MODEL.MASK_FORMER.TARGETS = "semantic"
    # Weights of the losses, which are those of the matching costs, too. Mask2Former: 2, 5, 5.
    cfg.MODEL.MASK_FORMER.CLASS_WEIGHT = 1.0
    cfg.MODEL.MASK_FORMER.MASK_WEIGHT = 20.0
    cfg.MODEL.MASK_FORMER.DICE_WEIGHT = 1.0
    # Weight of "no object" among the classes; 0 leaves unmatched queries out.
    cfg.MODEL.MASK_FORMER.NO_OBJECT_WEIGHT = 0.1
    # Costs and losses on this many points a mask (Mask2Former: 12544); 0: focal loss on all pixels.
    cfg.MODEL.MASK_FORMER.TRAIN_NUM_POINTS = 0
    # So many times more points are drawn, and this share of those that are used are the least certain ones.
    cfg.MODEL.MASK_FORMER.OVERSAMPLE_RATIO = 3.0
    cfg.MODEL.MASK_FORMER.IMPORTANCE_SAMPLE_RATIO = 0.75

    cfg.MODEL.MASK_FORMER.TEST = CN()
    # The outputs.
    cfg.MODEL.MASK_FORMER.TEST.SEMANTIC_ON = True
    cfg.MODEL.MASK_FORMER.TEST.PANOPTIC_ON = False
    # TEST.DETECTIONS_PER_IMAGE of them; with panoptic segmentation, things only.
    cfg.MODEL.MASK_FORMER.TEST.INSTANCE_ON = False
    # The masks of all queries, whose evaluator tells them their classes: how good are they?
    cfg.MODEL.MASK_FORMER.TEST.PROPOSALS_ON = False
    # Panoptic: class probability that a query must exceed, and the share of its mask that it must win.
    # Published for both versions on COCO: 0.8, 0.8.
    cfg.MODEL.MASK_FORMER.TEST.OBJECT_MASK_THRESHOLD = 0.8
    cfg.MODEL.MASK_FORMER.TEST.OVERLAP_THRESHOLD = 0.8
    # Panoptic: mask probability that a pixel needs, or it is void: 0 (MaskFormer) or 0.5 (Mask2Former).
    cfg.MODEL.MASK_FORMER.TEST.PIXEL_THRESHOLD = 0.0
    # Resize mask logits, rather than semantic scores, to the size of the output; always so where panoptic or
    # instance segmentation is on.
    cfg.MODEL.MASK_FORMER.TEST.SEM_SEG_POSTPROCESSING_BEFORE_INFERENCE = False

    # INPUT.MAPPER "SegmentationMapper": random colours as SSD has them, and the greatest share of a crop
    # (INPUT.CROP, taken after resizing) that one class may fill.
    cfg.INPUT.COLOR_AUG_SSD = False
    cfg.INPUT.CROP.SINGLE_CATEGORY_MAX_AREA = 1.0
