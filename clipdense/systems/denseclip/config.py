"""Configuration keys of pixel-text supervision and of semantic segmentation. The keys of the backbone are
MODEL.LANGUAGE.
"""

from clipdense.systems.denseclip.retinanet import add_retinanet_rules

from detectron2.config import CfgNode as CN


def add_denseclip_config(cfg: CN) -> None:
    """Add ``MODEL.PIXEL_TEXT``, ``MODEL.SEMANTIC_SEGMENTOR``, and keys of ``MODEL.RETINANET`` and
    ``MODEL.SEM_SEG_HEAD`` (in place).
    """
    add_retinanet_rules(cfg)
    _add_semantic_keys(cfg)
    cfg.MODEL.PIXEL_TEXT = CN()
    # The meta-architecture that PixelTextSupervised wraps. DenseCLIPRCNN and DenseCLIPRetinaNet ignore it.
    cfg.MODEL.PIXEL_TEXT.BASE = "GeneralizedRCNN"
    # What the targets of the score map are computed from: "boxes" (published), "masks" (of instances) or
    # "sem_seg".
    cfg.MODEL.PIXEL_TEXT.SOURCE = "boxes"
    # "bce" (published detectors): binary cross-entropy at the pixels inside any box; "focal": sigmoid focal
    # loss there; "ce": softmax cross-entropy at the pixels that have a class. SOURCE sem_seg always uses
    # "ce", as the published segmentors do.
    cfg.MODEL.PIXEL_TEXT.LOSS = "bce"
    # bce and focal: number added to the logits inside the loss only. A negative value, such as -8, starts
    # from the rate of positives; the published loss has none.
    cfg.MODEL.PIXEL_TEXT.BIAS = 0.0
    # bce and focal: whether that number is learned.
    cfg.MODEL.PIXEL_TEXT.LEARN_BIAS = False
    # Weight of the auxiliary loss. Published: 1.0 in detectors, 0.4 in segmentors.
    cfg.MODEL.PIXEL_TEXT.WEIGHT = 1.0
    # SOURCE sem_seg: weight, relative to the cross-entropy, of a contrastive loss from classes to the cells
    # of the score map (ICPC, experimental); 0: none.
    cfg.MODEL.PIXEL_TEXT.ALIGNMENT_WEIGHT = 0.0


def _add_semantic_keys(cfg: CN) -> None:
    # WindowedSemanticSegmentor and DenseCLIPSemanticSegmentor: inference.
    cfg.MODEL.SEMANTIC_SEGMENTOR = CN()
    # Height and width of the sliding windows in pixels, of the image as INPUT.MIN_SIZE_TEST resizes it; []:
    # the whole image at once. Published: [512, 512] (ResNets), [640, 640] (ViT).
    cfg.MODEL.SEMANTIC_SEGMENTOR.WINDOW = []
    # Vertical and horizontal distance of neighbouring windows in pixels, in 1..WINDOW. Published: [341, 341],
    # [426, 426].
    cfg.MODEL.SEMANTIC_SEGMENTOR.STRIDE = []
    # Windows per forward pass.
    cfg.MODEL.SEMANTIC_SEGMENTOR.BATCH_SIZE = 8
    # MiB of class maps above which they are accumulated in the memory of the CPU.
    cfg.MODEL.SEMANTIC_SEGMENTOR.MEMORY_LIMIT = 4096
    # Test-time augmentation: factors of the size of the image. Published multi-scale: [0.5, 0.75, 1.0, 1.25,
    # 1.5, 1.75] with FLIP. Class probabilities are averaged over the views.
    cfg.MODEL.SEMANTIC_SEGMENTOR.SCALES = [1.0]
    # Whether each view is also mirrored.
    cfg.MODEL.SEMANTIC_SEGMENTOR.FLIP = False
    # Whether images and windows are padded to the divisor of the backbone, such as the patch size of a ViT.
    # False ignores what is left over, and leaves padding out of global features (published).
    cfg.MODEL.SEMANTIC_SEGMENTOR.PAD = True

    # Names of MODEL.SEM_SEG_HEAD.NAME: SemanticFPNHead, UPerNetHead, DeepLabHead (V3+), ScoreMapHead (the
    # score map is the segmentation), and those of Detectron2.
    # SemanticFPNHead and UPerNetHead: dropout rate of whole channels before the classifier, in 0..1.
    cfg.MODEL.SEM_SEG_HEAD.DROPOUT = 0.1
    # The pixels that the cross-entropy is averaged over: "labelled", or "all" (published): ignored pixels and
    # padding add 0, so that an image with many of them counts less. Also of MODEL.PIXEL_TEXT.SOURCE sem_seg.
    cfg.MODEL.SEM_SEG_HEAD.LOSS_AVERAGE = "labelled"

    # DeepLabHead. The loss: "cross_entropy", or "hard_pixel_mining" (the hardest fifth of the pixels).
    cfg.MODEL.SEM_SEG_HEAD.LOSS_TYPE = "cross_entropy"
    # Channels to which the finer maps are projected, one number for each map of IN_FEATURES but the last.
    cfg.MODEL.SEM_SEG_HEAD.PROJECT_CHANNELS = [48]
    # Channels, dilations and dropout rate of its spatial pyramid on the last map.
    cfg.MODEL.SEM_SEG_HEAD.ASPP_CHANNELS = 256
    cfg.MODEL.SEM_SEG_HEAD.ASPP_DILATIONS = [6, 12, 18]
    cfg.MODEL.SEM_SEG_HEAD.ASPP_DROPOUT = 0.1
    # Whether its convolutions are depthwise separable.
    cfg.MODEL.SEM_SEG_HEAD.USE_DEPTHWISE_SEPARABLE_CONV = False
