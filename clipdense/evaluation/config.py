"""Configuration keys of `clipdense.evaluation`."""

from detectron2.config import CfgNode as CN


def add_evaluation_config(cfg: CN) -> None:
    """Add the keys of `clipdense.evaluation` to ``cfg`` (in place)."""
    # Who computes AP and PQ: "hotcoco" (Rust, fast) or "reference" (pycocotools, panopticapi). The numbers
    # are the same.
    cfg.TEST.METRIC_BACKEND = "hotcoco"
    # Highest-scoring detections that count: per image and class (COCO), or per image (LVIS).
    # 0: what the benchmark prescribes, 100 for COCO and 300 for LVIS.
    cfg.TEST.MAX_DETS = 0
    # Whether results hold one entry per class as well: AP-<class>, PQ-<class>, IoU-<class> and ACC-<class>.
    cfg.TEST.PER_CLASS = False
    # Up to so many classes open-vocabulary semantic segmentation gives a map of scores for each of them,
    # "sem_seg" (K, H, W); beyond, the best class of every pixel, "sem_seg_labels" (H, W). 0: always all maps.
    cfg.TEST.MAX_DENSE_CLASSES = 256

    cfg.TEST.SEMANTIC = CN()
    # Classes that may stand for others, beside the strict score: a list of "data_set:file.json", where the
    # file holds {"true class": ["class that may stand for it", ...]}. "~" and environment variables are
    # expanded. Results get mIoU_relaxed, mIoU_d2_forgiving and pACC_forgiving.
    cfg.TEST.SEMANTIC.ALLOWED_PAIRS = []

    # CLIPSelf's measure of dense features, for models that give a CLIP as output "clip".
    cfg.TEST.DENSE_REGIONS = CN()
    # Last-block mode of the image tower; "" for the best of an image tower as it is ("clipself", "value").
    cfg.TEST.DENSE_REGIONS.MODE = ""
    # Side of the square that images are letterboxed to, a multiple of the tower's stride (CLIPSelf: 1024 for
    # B/16, 896 for L/14). 0: their own longest side, rounded up to one.
    cfg.TEST.DENSE_REGIONS.IMAGE_SIZE = 0
    # Whether masks are resized to the map with antialiasing; published numbers are without.
    cfg.TEST.DENSE_REGIONS.ANTIALIAS = False
    # Prompt templates of the class names (CLIPSelf: "vild_63"), or a file with the class embeddings.
    cfg.TEST.DENSE_REGIONS.TEMPLATES = "single"
    cfg.TEST.DENSE_REGIONS.TABLE = ""

    # Prompt templates of the class names that a model's region encoder (its output "region_encoder") tells
    # ground-truth masks by.
    cfg.TEST.MASK_CLASSIFICATION = CN()
    cfg.TEST.MASK_CLASSIFICATION.TEMPLATES = "ovseg_14"
