"""Registry of closed-vocabulary heads."""

import pytest

from clipdense.data.heads import HeadClasses, head_classes, register_head_classes

BOXES = HeadClasses("MODEL.ROI_HEADS.NUM_CLASSES", "thing")


@pytest.mark.parametrize(
    ("meta_architecture", "key"),
    [
        ("DenseCLIPRCNN", "MODEL.ROI_HEADS.NUM_CLASSES"),
        ("DenseCLIPRetinaNet", "MODEL.RETINANET.NUM_CLASSES"),
        ("MaskFormer", "MODEL.SEM_SEG_HEAD.NUM_CLASSES"),
        ("PixelTextSupervised", "MODEL.RETINANET.NUM_CLASSES"),
    ],
)
def test_heads_of_clipdense(cfg, meta_architecture: str, key: str):
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.PIXEL_TEXT.BASE = meta_architecture, "MMDetRetinaNet"
    assert [head.key for head in head_classes(cfg)] == [key]


def test_an_open_vocabulary_model_has_no_entry(cfg):
    cfg.MODEL.META_ARCHITECTURE = "OVSeg"
    assert head_classes(cfg) == ()


def test_an_entry_cannot_be_replaced():
    register_head_classes("GeneralizedRCNN", BOXES)  # equal to the existing entry
    with pytest.raises(ValueError, match="GeneralizedRCNN are already registered"):
        register_head_classes("GeneralizedRCNN", base="RetinaNet")


@pytest.mark.parametrize("given", [{}, {"base": "RetinaNet", "base_key": "MODEL.PIXEL_TEXT.BASE"}])
def test_heads_come_from_one_place(given: dict[str, str]):
    with pytest.raises(ValueError, match="exactly one"):
        register_head_classes("NewDetector", **given)
