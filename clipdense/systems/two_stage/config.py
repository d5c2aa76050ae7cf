"""Configuration keys of two-stage systems; the mask proposals are configured by MODEL.MASK_FORMER."""

from clipdense.regions import CropRule

from detectron2.config import CfgNode as CN

_RENAMED = {
    "CLIP": "CROP_CLIP.NAME and CROP_CLIP.PRETRAINED",
    "AFFIXES": "PROMPT_CONTEXT",
    "UNIT_NO_OBJECT": "NORMALIZE_NO_OBJECT",
    "SCORES.PRUNE": "SCORES.MIN_QUERY_SCORE",
}


def add_two_stage_config(cfg: CN) -> None:
    """Add ``MODEL.TWO_STAGE`` to ``cfg`` (in place).

    The defaults are OVSeg's (Liang et al., CVPR 2023), except SCORES.EMPTY. Comments name the values of zsseg
    (Xu et al., ECCV 2022) and ZegFormer (Ding et al., CVPR 2022) where they differ.
    """
    cfg.MODEL.TWO_STAGE = CN()
    # The CLIP that encodes class names and crops, as MODEL.CLIP.NAME and PRETRAINED. NAME "": MODEL.CLIP,
    # which may also be the backbone's.
    cfg.MODEL.TWO_STAGE.CROP_CLIP = CN()
    cfg.MODEL.TWO_STAGE.CROP_CLIP.NAME = ""
    cfg.MODEL.TWO_STAGE.CROP_CLIP.PRETRAINED = ""
    # File exported by MaskAdaptedCLIP. Its image tower and mask prompts embed the crops, and MODEL.WEIGHTS
    # does not replace them. "": none.
    cfg.MODEL.TWO_STAGE.ADAPTED_CLIP = ""
    # Prompt templates of the text that queries are compared with: the name of a set, or one sentence with {}
    # in it (ZegFormer: "single_scene").
    cfg.MODEL.TWO_STAGE.TEMPLATES = "ovseg_14"
    # The same in training; "": TEMPLATES (ZegFormer: "zegformer_8").
    cfg.MODEL.TWO_STAGE.TRAIN_TEMPLATES = ""
    # Prompt templates of the text that crops are compared with; "": TEMPLATES (ZegFormer: "zegformer_32").
    cfg.MODEL.TWO_STAGE.CROP_TEMPLATES = ""
    # Numbers of learned vectors before and after each class name; templates must end in a full stop (zsseg:
    # [16, 0] with TEMPLATES "{}.").
    cfg.MODEL.TWO_STAGE.PROMPT_CONTEXT = [0, 0]
    # Linear layers from a query to its embedding (ZegFormer: 1), and channels between them.
    cfg.MODEL.TWO_STAGE.EMBED_LAYERS = 2
    cfg.MODEL.TWO_STAGE.EMBED_HIDDEN_DIM = 1024
    # Scale the learned embedding of "no object" to unit length, as text embeddings are (ZegFormer: False).
    cfg.MODEL.TWO_STAGE.NORMALIZE_NO_OBJECT = True
    # Factor of the cosines of crops before the softmax; 0: CLIP's learned scale (ZegFormer).
    cfg.MODEL.TWO_STAGE.CROP_SCALE = 100.0

    # Mask prompts of CLIP's ViT: number of blocks that have them (0: no mask prompts), and their use.
    cfg.MODEL.TWO_STAGE.MASK_PROMPTS = CN()
    cfg.MODEL.TWO_STAGE.MASK_PROMPTS.DEPTH = 0
    cfg.MODEL.TWO_STAGE.MASK_PROMPTS.ENABLED = True

    # Crops for CLIP: the attributes of clipdense.regions.CropRule. Published thresholds: OVSeg 0.4 (Swin-B)
    # and 0.5 (R101c), zsseg 0.5 and 0.4. ZegFormer: THRESHOLD 0, SAMPLING "roi_align", KEEP_EMPTY,
    # PADDED_LOGITS.
    cfg.MODEL.TWO_STAGE.CROP = CN(CropRule(threshold=0.4).config_keys())
    # Crops per CLIP forward.
    cfg.MODEL.TWO_STAGE.CROP_BATCH_SIZE = 64
    # Autocast dtype of CLIP's forwards in evaluation ("fp32": no autocast, "fp16", "bf16"), and
    # torch.compile. `tools/benchmark.py ovseg` measures what they save and change.
    cfg.MODEL.TWO_STAGE.PRECISION = "fp32"
    cfg.MODEL.TWO_STAGE.COMPILE = False

    # Fusion of the scores of queries and crops: the attributes of clipdense.systems.two_stage.Scoring. ALPHA
    # and BETA are CLIP's weights for base and novel classes (OVSeg: 0.7, 0.7; zsseg: 0.2, 0.8; ZegFormer:
    # 1/3, 2/3 with FUSION "zegformer" and CLIP_BACKGROUND). All published results use EMPTY "boost".
    cfg.MODEL.TWO_STAGE.SCORES = CN()
    cfg.MODEL.TWO_STAGE.SCORES.SOURCE = "ensemble"
    cfg.MODEL.TWO_STAGE.SCORES.FUSION = "ovseg"
    cfg.MODEL.TWO_STAGE.SCORES.ALPHA = 0.7
    cfg.MODEL.TWO_STAGE.SCORES.BETA = 0.7
    cfg.MODEL.TWO_STAGE.SCORES.EMPTY = "neutral"
    cfg.MODEL.TWO_STAGE.SCORES.CLIP_BACKGROUND = False
    # Queries whose best class has a lower probability in the proposals' own scores are skipped by CLIP.
    cfg.MODEL.TWO_STAGE.SCORES.MIN_QUERY_SCORE = 0.0
    # Amount subtracted from the semantic maps of base classes (ZegFormer: 0.1).
    cfg.MODEL.TWO_STAGE.CALIBRATION = 0.0
    # Make semantic maps from the best query of each class only, with binary masks (OVSeg's demo).
    cfg.MODEL.TWO_STAGE.BEST_MASKS = False

    for old, new in _RENAMED.items():
        cfg.register_renamed_key(f"MODEL.TWO_STAGE.{old}", f"MODEL.TWO_STAGE.{new}")
