"""Configuration keys of mask proposals: MaskFormer and Mask2Former."""

from detectron2.config import CfgNode as CN


def add_maskformer_config(cfg: CN) -> None:
    """Add ``MODEL.MASK_FORMER`` and the keys of its mapper to ``cfg`` (in place).

    The defaults are MaskFormer's (Cheng et al., NeurIPS 2021); comments name Mask2Former's (Cheng et al.,
    CVPR 2022) where they differ. MODEL.SEM_SEG_HEAD.NUM_CLASSES is the number of classes.
    """
    cfg.MODEL.MASK_FORMER = CN()
    # Maps of the backbone that the pixel decoder reads.
    cfg.MODEL.MASK_FORMER.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    # Images are padded, right and below, to a multiple of this many pixels.
    cfg.MODEL.MASK_FORMER.SIZE_DIVISIBILITY = 32

    cfg.MODEL.MASK_FORMER.PIXEL_DECODER = CN()
    # "BasePixelDecoder" (a feature pyramid), "TransformerEncoderPixelDecoder" (a pyramid with a transformer
    # on the coarsest map), or "MSDeformAttnPixelDecoder" (Mask2Former).
    cfg.MODEL.MASK_FORMER.PIXEL_DECODER.NAME = "BasePixelDecoder"
    cfg.MODEL.MASK_FORMER.PIXEL_DECODER.CONV_DIM = 256
    # Norm of the pyramid, a name that Detectron2 knows; "": none.
    cfg.MODEL.MASK_FORMER.PIXEL_DECODER.NORM = "GN"
    # Layers of the pixel decoder's transformer.
    cfg.MODEL.MASK_FORMER.PIXEL_DECODER.ENC_LAYERS = 6
    # MSDeformAttnPixelDecoder: hidden channels of feed-forward layers; sampling points per head and map.
    cfg.MODEL.MASK_FORMER.PIXEL_DECODER.DIM_FEEDFORWARD = 1024
    cfg.MODEL.MASK_FORMER.PIXEL_DECODER.POINTS = 4

    # "StandardTransformerDecoder", or "MultiScaleMaskedTransformerDecoder" (Mask2Former).
    cfg.MODEL.MASK_FORMER.TRANSFORMER_DECODER = "StandardTransformerDecoder"
    # Map of the backbone that queries attend to; "": the maps of the pixel decoder's transformer
    # (Mask2Former).
    cfg.MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE = "res5"
    # Channels of the mask features, channels of queries, and number of queries.
    cfg.MODEL.MASK_FORMER.MASK_DIM = 256
    cfg.MODEL.MASK_FORMER.HIDDEN_DIM = 256
    cfg.MODEL.MASK_FORMER.NUM_OBJECT_QUERIES = 100
    # Settings of all transformers. Mask2Former: DROPOUT 0.
    cfg.MODEL.MASK_FORMER.NHEADS = 8
    cfg.MODEL.MASK_FORMER.DIM_FEEDFORWARD = 2048
    cfg.MODEL.MASK_FORMER.DROPOUT = 0.1
    cfg.MODEL.MASK_FORMER.PRE_NORM = False
    # StandardTransformerDecoder: self-attention layers of the map before queries attend to it.
    cfg.MODEL.MASK_FORMER.ENC_LAYERS = 0
    # Mask2Former: 9; published configs say 10 because they count the prediction before the first layer.
    cfg.MODEL.MASK_FORMER.DEC_LAYERS = 6
    # Project the map that queries attend to even if it has HIDDEN_DIM channels.
    cfg.MODEL.MASK_FORMER.ENFORCE_INPUT_PROJ = False

    # Ground-truth masks: "semantic" (one mask per class of a semantic map) or "panoptic" (one mask per
    # segment of a panoptic map).
    cfg.MODEL.MASK_FORMER.TARGETS = "semantic"
    # Weights of the losses and of the matching costs. Mask2Former: 2, 5, 5.
    cfg.MODEL.MASK_FORMER.CLASS_WEIGHT = 1.0
    cfg.MODEL.MASK_FORMER.MASK_WEIGHT = 20.0
    cfg.MODEL.MASK_FORMER.DICE_WEIGHT = 1.0
    # Weight of "no object" in the class loss; 0: the class loss ignores unmatched queries.
    cfg.MODEL.MASK_FORMER.NO_OBJECT_WEIGHT = 0.1
    # Points per mask for costs and losses (Mask2Former: 12544); 0: all pixels, with the focal loss.
    cfg.MODEL.MASK_FORMER.TRAIN_NUM_POINTS = 0
    # Candidates per point, and the share of points that are the least certain candidates.
    cfg.MODEL.MASK_FORMER.OVERSAMPLE_RATIO = 3.0
    cfg.MODEL.MASK_FORMER.IMPORTANCE_SAMPLE_RATIO = 0.75

    cfg.MODEL.MASK_FORMER.TEST = CN()
    # Output semantic segmentation.
    cfg.MODEL.MASK_FORMER.TEST.SEMANTIC_ON = True
    # Output panoptic segmentation.
    cfg.MODEL.MASK_FORMER.TEST.PANOPTIC_ON = False
    # Output TEST.DETECTIONS_PER_IMAGE instances; with PANOPTIC_ON, of things only.
    cfg.MODEL.MASK_FORMER.TEST.INSTANCE_ON = False
    # Output the masks of all queries; their evaluator assigns oracle classes to measure the masks alone.
    cfg.MODEL.MASK_FORMER.TEST.PROPOSALS_ON = False
    # Open-vocabulary systems: the masks that are classified. "network": those of the queries;
    # "ground_truth": the annotations of DATASETS.TEST; a path: a JSON file (a list of image_id and
    # segmentation, COCO RLE) or a folder of PNG files (clipdense.data.proposals). Masks that have no query
    # are classified by CLIP alone.
    cfg.MODEL.MASK_FORMER.TEST.MASK_SOURCE = "network"
    # Panoptic: class probability that a query must exceed, and share of its mask that it must win. Published
    # for both versions on COCO: 0.8, 0.8.
    cfg.MODEL.MASK_FORMER.TEST.OBJECT_MASK_THRESHOLD = 0.8
    cfg.MODEL.MASK_FORMER.TEST.OVERLAP_THRESHOLD = 0.8
    # Panoptic: mask probability below which a pixel is void: 0 (MaskFormer) or 0.5 (Mask2Former).
    cfg.MODEL.MASK_FORMER.TEST.PIXEL_THRESHOLD = 0.0
    # Semantic: resize mask logits instead of class maps to the output size. Always on with PANOPTIC_ON or
    # INSTANCE_ON. OVSeg ignores it.
    cfg.MODEL.MASK_FORMER.TEST.SEM_SEG_POSTPROCESSING_BEFORE_INFERENCE = False

    # INPUT.MAPPER "SegmentationMapper": SSD's colour jitter, and the largest share of a crop (INPUT.CROP,
    # taken after resizing) that one class may cover.
    cfg.INPUT.COLOR_AUG_SSD = False
    cfg.INPUT.CROP.SINGLE_CATEGORY_MAX_AREA = 1.0
