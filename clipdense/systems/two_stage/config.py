"""Configuration keys of two-stage systems; those of the mask proposals are MODEL.MASK_FORMER."""

from detectron2.config import CfgNode as CN

_RENAMED = {
    "CLIP": "CROP_CLIP.NAME and CROP_CLIP.PRETRAINED",
    "AFFIXES": "PROMPT_CONTEXT",
    "UNIT_NO_OBJECT": "NORMALIZE_NO_OBJECT",
    "SCORES.PRUNE": "SCORES.MIN_QUERY_SCORE",
}


def add_two_stage_config(cfg: CN) -> None:
    """Add ``MODEL.TWO_STAGE`` to ``cfg`` (in place).

    The defaults are OVSeg's (Liang et al., CVPR 2023), but for the policy for empty masks. zsseg's (Xu et
    al., ECCV 2022) and ZegFormer's (Ding et al., CVPR 2022) stand beside them where they differ.
    """
    cfg.MODEL.TWO_STAGE = CN()
    # The CLIP that encodes class names and crops, as MODEL.CLIP.NAME and PRETRAINED. NAME "": MODEL.CLIP,
    # which may also be the backbone's.
    cfg.MODEL.TWO_STAGE.CROP_CLIP = CN()
    cfg.MODEL.TWO_STAGE.CROP_CLIP.NAME = ""
    cfg.MODEL.TWO_STAGE.CROP_CLIP.PRETRAINED = ""
    # A file that MaskAdaptedCLIP has exported: its image tower, with its mask prompts if it has any, sees the
    # crops, whatever MODEL.WEIGHTS holds.
    cfg.MODEL.TWO_STAGE.ADAPTED_CLIP = ""
    # Prompt templates of the text that queries are compared with: the name of a set, or one sentence with {}
    # in it (ZegFormer: "single_scene").
    cfg.MODEL.TWO_STAGE.TEMPLATES = "ovseg_14"
    # The same in training; "": TEMPLATES (ZegFormer: "zegformer_8").
    cfg.MODEL.TWO_STAGE.TRAIN_TEMPLATES = ""
    # Prompt templates of the text that crops are compared with; "": TEMPLATES (ZegFormer: "zegformer_32").
    cfg.MODEL.TWO_STAGE.CROP_TEMPLATES = ""
    # Learned vectors before and after every class name, whose templates end in a full stop (zsseg: [16, 0]
    # with templates "{}.").
    cfg.MODEL.TWO_STAGE.PROMPT_CONTEXT = [0, 0]
    # Linear layers from a query to its embedding, and width of those between (ZegFormer: one).
    cfg.MODEL.TWO_STAGE.EMBED_LAYERS = 2
    cfg.MODEL.TWO_STAGE.EMBED_HIDDEN_DIM = 1024
    # Whether the learned embedding of "no object" is scaled to length 1 as those of words are (ZegFormer:
    # not).
    cfg.MODEL.TWO_STAGE.NORMALIZE_NO_OBJECT = True
    # Cosines of crops are multiplied by it before the softmax; 0 for CLIP's own scale (ZegFormer).
    cfg.MODEL.TWO_STAGE.CROP_SCALE = 100.0

    # Mask prompts of CLIP's ViT: depth, 0 for none, and whether they are used.
    cfg.MODEL.TWO_STAGE.MASK_PROMPTS = CN()
    cfg.MODEL.TWO_STAGE.MASK_PROMPTS.DEPTH = 0
    cfg.MODEL.TWO_STAGE.MASK_PROMPTS.ENABLED = True

    # How a mask becomes an image for CLIP: the attributes of clipdense.regions.CropRule. Published
    # thresholds: OVSeg 0.4 (Swin-B), 0.5 (R101c), zsseg 0.5 or 0.4. ZegFormer: 0, "roi_align", KEEP_EMPTY and
    # PADDED_LOGITS.
    cfg.MODEL.TWO_STAGE.CROP = CN()
    cfg.MODEL.TWO_STAGE.CROP.THRESHOLD = 0.4
    cfg.MODEL.TWO_STAGE.CROP.SAMPLING = "bicubic"
    cfg.MODEL.TWO_STAGE.CROP.MASKED = True
    cfg.MODEL.TWO_STAGE.CROP.FILL = "mean"
    cfg.MODEL.TWO_STAGE.CROP.EXPAND = 1.0
    cfg.MODEL.TWO_STAGE.CROP.SOFT = False
    cfg.MODEL.TWO_STAGE.CROP.KEEP_EMPTY = False
    cfg.MODEL.TWO_STAGE.CROP.PADDED_LOGITS = False
    # Crops that go through CLIP at a time.
    cfg.MODEL.TWO_STAGE.CROP_BATCH_SIZE = 64
    # Of CLIP's forwards in evaluation: "fp32", or "fp16" or "bf16" by autocast; and torch.compile. `ovseg` of
    # tools/benchmark.py measures what they save and change.
    cfg.MODEL.TWO_STAGE.PRECISION = "fp32"
    cfg.MODEL.TWO_STAGE.COMPILE = False

    # How the scores of queries and crops become one: the attributes of Scoring in this room. ALPHA and BETA
    # are CLIP's weights for base and novel classes (OVSeg: 0.7, 0.7; zsseg: 0.2, 0.8; ZegFormer: 1/3, 2/3,
    # "zegformer" and CLIP_BACKGROUND). All published results have EMPTY "boost".
    cfg.MODEL.TWO_STAGE.SCORES = CN()
    cfg.MODEL.TWO_STAGE.SCORES.SOURCE = "ensemble"
    cfg.MODEL.TWO_STAGE.SCORES.FUSION = "ovseg"
    cfg.MODEL.TWO_STAGE.SCORES.ALPHA = 0.7
    cfg.MODEL.TWO_STAGE.SCORES.BETA = 0.7
    cfg.MODEL.TWO_STAGE.SCORES.EMPTY = "neutral"
    cfg.MODEL.TWO_STAGE.SCORES.CLIP_BACKGROUND = False
    # Queries whose best class has a lower probability in the proposals' own scores are not shown to CLIP.
    cfg.MODEL.TWO_STAGE.SCORES.MIN_QUERY_SCORE = 0.0
    # Taken from the semantic maps of base classes (ZegFormer: 0.1).
    cfg.MODEL.TWO_STAGE.CALIBRATION = 0.0
    # Semantic maps of the best query of each class alone, its mask binarised (OVSeg's demo).
    cfg.MODEL.TWO_STAGE.BEST_MASKS = False

    for old, new in _RENAMED.items():
        cfg.register_renamed_key(f"MODEL.TWO_STAGE.{old}", f"MODEL.TWO_STAGE.{new}")
