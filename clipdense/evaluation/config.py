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
