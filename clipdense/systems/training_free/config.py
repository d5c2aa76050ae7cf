"""Configuration keys of zero-shot segmentation."""

from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode as CN


def add_training_free_config(cfg: CN) -> None:
    """Add ``MODEL.ZERO_SHOT``, the keys of ``MODEL.META_ARCHITECTURE: ZeroShotSegmentor`` (in place)."""
    keys = cfg.MODEL.ZERO_SHOT = CN()
    # The method: clip, maskclip, sclip, clearclip, gem, naclip, resclip, scclip, sfp, radseg, proxyclip,
    # trident, corrclip, pacl or lposs. clip, maskclip and pacl also fit ResNets, the others need a ViT.
    keys.METHOD = "sclip"
    # Options of the method, names and values in turn, such as ["gaussian_std", 3.0, "full", True]. A wrong
    # name is an error that lists those of the method.
    keys.OPTIONS = []
    # Side of the sliding windows in pixels, 0 for the whole image at once; and their distance.
    keys.WINDOW = 224
    keys.STRIDE = 112
    # Windows are padded to multiples of it with zeros around; 0: not at all, -1: as the method does.
    keys.PADDING = -1
    # Windows per forward.
    keys.BATCH_SIZE = 16
    # Prompt templates: the name of a set, or one sentence with {} in it.
    keys.TEMPLATES = "clip_80"
    # File with embeddings of the class names instead of the text tower and TEMPLATES, a row for each class
    # or name (see clipdense.clip.tables): its path, also relative to the folder of the datasets; "": none.
    keys.TEXT_TABLE = ""
    # Published list of class names for the datasets of DATASETS.TEST, such as voc21_sclip
    # (clipdense/systems/training_free/class_names.json); "": the names of the datasets.
    keys.CLASS_NAMES = ""
    # Names, separated by bars ("sky|wall|tree"), that stand for a class called background; "": its own name.
    keys.BACKGROUND = ""
    # Factor of the cosines in the softmax over the names; 0: the scale that CLIP has learned.
    keys.LOGIT_SCALE = 40.0
    # Pixels whose best class has a lower score, 0 to 1, get the class called background, or no class.
    keys.PROB_THRESHOLD = 0.0
    # A class keeps its pixels if it is the best class of more than this share, 0 to 1, of the pixels that are
    # not background; 0: always.
    keys.AREA_THRESHOLD = 0.0
    # A class is left out of an image if no pixel gives it at least this score, 0 to 1; 0: never.
    keys.CLASS_THRESHOLD = 0.0
    # Divide class scores by their sum, after labels are taken (NACLIP, ResCLIP).
    keys.NORMALIZE_SCORES = False
    # PAMR: number of steps (0: none), and distances of the neighbours in pixels.
    keys.PAMR_STEPS = 0
    keys.PAMR_DILATIONS = (8, 16)
    # LPOSS+: propagate scores over the pixels.
    keys.PIXEL_PROPAGATION = False
    # MaskCLIP: thresholds, 0 to 1, of prompt denoising and key smoothing; 0: none. Keys are normalised over
    # "channels" (paper) or "tokens" (released code).
    keys.PROMPT_DENOISING = 0.0
    keys.KEY_SMOOTHING = 0.0
    keys.KEY_NORM = "channels"
    # pacl: file of the patch embedder (export.safetensors of a training of PACL on the same CLIP).
    keys.EMBEDDER = ""
    # CorrCLIP: a folder of label maps (.png) named as the images, or "sam".
    keys.REGIONS = ""
    # The second model of proxyclip, trident, corrclip and lposs: a name of timm, such as
    # vit_base_patch8_224.dino, or clip: and the name of another CLIP. PRETRAINED: "" for its weights,
    # "random", or a file in timm's layout (of a CLIP: as MODEL.CLIP.PRETRAINED).
    keys.FEATURES = CN()
    keys.FEATURES.NAME = ""
    keys.FEATURES.PRETRAINED = ""
    # SAM of transformers, such as facebook/sam-vit-base. PRETRAINED: "" for its weights, or "random".
    keys.SAM = CN()
    keys.SAM.NAME = ""
    keys.SAM.PRETRAINED = ""
    # Refine labels by SAM's masks (Trident), and the settings of clipdense.inference.RefineSettings: score
    # (0 to 1) that a pixel of a region needs, its least area in pixels of the halved image, and predicted
    # IoU (0 to 1) that a mask needs.
    keys.SAM.REFINE = False
    keys.SAM.COARSE_THRESHOLD = 0.2
    keys.SAM.MINIMAL_AREA = 225
    keys.SAM.IOU_THRESHOLD = 0.9


def option_pairs(entries: Sequence[Any]) -> dict[str, Any]:
    """Return names and values given in turn as a dict; lists become tuples.

    Raises:
        ValueError: If their number is odd, or a name is not a text.
    """
    names, values = entries[::2], entries[1::2]
    if len(names) != len(values) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"MODEL.ZERO_SHOT.OPTIONS must be names and values in turn, not {list(entries)}")
    return {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in zip(names, values, strict=True)
    }
