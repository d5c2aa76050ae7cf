"""Configuration keys of `clipdense.evaluation`."""

from detectron2.config import CfgNode as CN


def add_evaluation_config(cfg: CN) -> None:
    """Add the keys of `clipdense.evaluation` to ``cfg`` (in place)."""
    # Library that computes AP and PQ: "hotcoco" (Rust, fast) or "reference" (pycocotools, panopticapi). The
    # numbers are the same.
    cfg.TEST.METRIC_BACKEND = "hotcoco"
    # Limit on detections, the best scores first: per image and class (COCO), or per image (LVIS).
    # 0: the limit of the benchmark, 100 for COCO and 300 for LVIS.
    cfg.TEST.MAX_DETS = 0
    # Whether the results include each class: AP-<class>, PQ-<class>, IoU-<class> and ACC-<class>. The tools
    # print them as a table of their own.
    cfg.TEST.PER_CLASS = True
    # Up to this number of classes, open-vocabulary semantic segmentation gives a score map for each class,
    # "sem_seg" (K, H, W); above it, the best class of each pixel, "sem_seg_labels" (H, W). 0: no limit.
    cfg.TEST.MAX_DENSE_CLASSES = 256
    # The same limit as the size of "sem_seg" of one image in MiB, for mask classification (MaskFormer,
    # OVSeg): 150 classes reach 1024 MiB at 1.8 megapixels. Evaluators and pictures read either output. 0: no
    # limit.
    cfg.TEST.MAX_DENSE_MEGABYTES = 1024

    cfg.TEST.SEMANTIC = CN()
    # Predictions accepted besides the true class, as a list of "dataset:file.json"; the file holds
    # {"true class": ["accepted class", ...]}. "~" and environment variables are expanded. Adds mIoU_relaxed,
    # mIoU_d2_relaxed and pACC_relaxed to the results.
    cfg.TEST.SEMANTIC.ALLOWED_PAIRS = []

    # CLIPSelf's evaluation of dense features, for models that provide a dense probe.
    cfg.TEST.DENSE_REGIONS = CN()
    # Last-block mode of the image tower; "": "clipself" or "value" if the tower has it, else "plain".
    cfg.TEST.DENSE_REGIONS.MODE = ""
    # Side in pixels of the square that images are letterboxed to, a multiple of the tower's stride (CLIPSelf:
    # 1024 for B/16, 896 for L/14). 0: the longest side of each image, rounded up to a multiple.
    cfg.TEST.DENSE_REGIONS.IMAGE_SIZE = 0
    # Whether masks are resized to the map with antialiasing; published numbers are computed without.
    cfg.TEST.DENSE_REGIONS.ANTIALIAS = False
    # Prompt templates of the class names (CLIPSelf: "vild_63").
    cfg.TEST.DENSE_REGIONS.TEMPLATES = "single"
    # File with the class embeddings, used instead of the text encoder (see tools/make_text_table.py).
    cfg.TEST.DENSE_REGIONS.TABLE = ""

    # Measures of patch features on semantic datasets, for models that provide a patch probe (PACL, CLIPpy,
    # ZeroShotSegmentor). Semantic coherence: how well the cosine of two patches tells whether they have one
    # class.
    cfg.TEST.PATCHES = CN()
    cfg.TEST.PATCHES.COHERENCE = False
    # Perceptual grouping: number of groups in an image that are compared with its segments; 0: not measured.
    cfg.TEST.PATCHES.GROUPS = 0
    # How patches are grouped: "kmeans", or "principal" (the leading principal directions are the centres).
    cfg.TEST.PATCHES.GROUPING = "kmeans"

    # Classification of ground-truth masks, for models that provide a region probe.
    cfg.TEST.MASK_CLASSIFICATION = CN()
    # Templates for classifying ground-truth masks.
    cfg.TEST.MASK_CLASSIFICATION.TEMPLATES = "ovseg_14"
