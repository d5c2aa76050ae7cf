"""Configuration keys of MaskCLIP+. The teacher is the CLIP of MODEL.CLIP."""

from detectron2.config import CfgNode as CN


def add_maskclip_plus_config(cfg: CN) -> None:
    """Add ``MODEL.MASKCLIP_PLUS`` (in place)."""
    keys = cfg.MODEL.MASKCLIP_PLUS = CN()
    # The meta-architecture that is trained: any that takes label maps ("sem_seg").
    keys.SEGMENTOR = "WindowedSemanticSegmentor"
    # "annotation_free": every pixel is labelled by MaskCLIP, and label maps have no influence; "zero_shot":
    # labels of seen classes are kept, and pixels of unseen classes are labelled as one of these.
    keys.SETTING = "annotation_free"
    # zero_shot: names of the unseen classes; []: novel_classes of the first training dataset's metadata.
    keys.UNSEEN = []
    # annotation_free: pixels that a label map ignores have no loss (published); False: label maps have
    # no influence.
    keys.KEEP_IGNORED = False
    # First iteration, counted from 1, in which the labels are the model's own predictions instead of
    # MaskCLIP's; 0: never. Published zero_shot: a tenth of the iterations, such as 4000 of 40000.
    keys.SELF_TRAINING_FROM = 0
    # Pixels whose best class has a lower cosine (a lower score after key smoothing or in self-training) are
    # ignored; 0: none.
    keys.MIN_SCORE = 0.0
    # Weight of the distance between the text head's features and CLIP's normalised features (L1), besides the
    # loss of the labels; 0: no such loss. Published variant: 1. MODEL.SEM_SEG_HEAD.LOSS_WEIGHT 0 leaves the
    # labels without influence. Self-training, which does not run CLIP, is without it.
    keys.DISTILLATION = 0.0
    # Prompt templates of teacher and text heads: the name of a set, or one sentence with {} in it.
    keys.TEMPLATES = "maskclip_85"
    # Teacher: last-block mode of the dense map, and MaskCLIP's refinements as in MODEL.ZERO_SHOT.
    keys.MODE = "value"
    keys.PROMPT_DENOISING = 0.0
    keys.KEY_SMOOTHING = 0.0
    keys.KEY_NORM = "channels"
    # DeepLabV2TextHead and DeepLabV3PlusTextHead (MODEL.SEM_SEG_HEAD.NAME). Embedding of the class called
    # background: "text", that of the word, or "learned".
    keys.BACKGROUND = "text"
    # The same heads: online hard example mining. Pixels whose true class has a probability of at least
    # THRESHOLD have no loss, except among the MIN_KEPT hardest pixels per image; 0: every pixel has a loss.
    keys.OHEM = CN()
    keys.OHEM.THRESHOLD = 0.0
    keys.OHEM.MIN_KEPT = 100000
