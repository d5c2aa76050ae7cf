"""Mask R-CNN on DenseCLIP's backbone, with the auxiliary loss from boxes, as a LazyConfig.

python tools/train_net.py --config-file projects/PlugIn/configs/mask_rcnn.py train.max_iter=1000
"""

import torch
from fvcore.common.param_scheduler import CosineParamScheduler

from clipdense.backbone import FPN, CLIPTrunk, ContextDecoder, LanguageTrunk
from clipdense.backbone.class_text import ClassText
from clipdense.clip import load_clip
from clipdense.data.mappers import DetectionMapper
from clipdense.evaluation import InstanceEvaluator
from clipdense.systems.denseclip import PixelTextLoss, PixelTextSupervised

from detectron2.config import LazyCall as L
from detectron2.data import MetadataCatalog, build_detection_test_loader, build_detection_train_loader
from detectron2.data import get_detection_dataset_dicts as dataset_dicts
from detectron2.data import transforms as T
from detectron2.layers import ShapeSpec
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.proposal_generator import RPN, StandardRPNHead
from detectron2.modeling.roi_heads import (
    FastRCNNConvFCHead,
    FastRCNNOutputLayers,
    MaskRCNNConvUpsampleHead,
    StandardROIHeads,
)
from detectron2.solver.build import get_default_optimizer_params

TRAIN, TEST = "shapes_closed_mini_train", "shapes_closed_mini_val"
CLASSES = MetadataCatalog.get(TRAIN).thing_classes
CHANNELS = 96

# What clipdense adds: a backbone for any model ...
backbone = L(FPN)(
    bottom_up=L(LanguageTrunk)(
        trunk=L(CLIPTrunk)(
            tower=L(load_clip)(model="shapes-rn", text=False), freeze_at=2, norm="FrozenBN", joint=True
        ),
        text=L(ClassText)(clip=L(load_clip)(model="shapes-rn"), classes=CLASSES),
        context_decoder=L(ContextDecoder)(dim=128),
    ),
    in_features=["res3", "res4", "res5"],
    out_channels=CHANNELS,
)

# ... which is Detectron2's own.
model = L(GeneralizedRCNN)(
    backbone=backbone,
    proposal_generator=L(RPN)(
        in_features=["p3", "p4", "p5"],
        head=L(StandardRPNHead)(in_channels=CHANNELS, num_anchors=2, conv_dims=[64]),
        anchor_generator=L(DefaultAnchorGenerator)(
            sizes=[[20, 29], [42, 60], [86, 118]], aspect_ratios=[1.0], strides=[8, 16, 32], offset=0.0
        ),
        anchor_matcher=L(Matcher)(thresholds=[0.3, 0.7], labels=[0, -1, 1], allow_low_quality_matches=True),
        box2box_transform=L(Box2BoxTransform)(weights=[1.0, 1.0, 1.0, 1.0]),
        batch_size_per_image=64,
        positive_fraction=0.5,
        pre_nms_topk=(200, 100),
        post_nms_topk=(100, 50),
        nms_thresh=0.7,
    ),
    roi_heads=L(StandardROIHeads)(
        num_classes=len(CLASSES),
        batch_size_per_image=32,
        positive_fraction=0.5,
        proposal_matcher=L(Matcher)(thresholds=[0.5], labels=[0, 1], allow_low_quality_matches=False),
        box_in_features=["p3"],
        box_pooler=L(ROIPooler)(output_size=7, scales=(1 / 8,), sampling_ratio=0, pooler_type="ROIAlignV2"),
        box_head=L(FastRCNNConvFCHead)(
            input_shape=ShapeSpec(channels=CHANNELS, height=7, width=7), conv_dims=[], fc_dims=[256]
        ),
        box_predictor=L(FastRCNNOutputLayers)(
            input_shape=ShapeSpec(channels=256),
            box2box_transform=L(Box2BoxTransform)(weights=(10, 10, 5, 5)),
            num_classes=len(CLASSES),
            cls_agnostic_bbox_reg=True,
            test_score_thresh=0.05,
            test_topk_per_image=30,
        ),
        mask_in_features=["p3"],
        mask_pooler=L(ROIPooler)(output_size=14, scales=(1 / 8,), sampling_ratio=0, pooler_type="ROIAlignV2"),
        mask_head=L(MaskRCNNConvUpsampleHead)(
            input_shape=ShapeSpec(channels=CHANNELS, height=14, width=14),
            num_classes=1,
            conv_dims=[48, 48, 48],
        ),
    ),
    pixel_mean=[127.5, 127.5, 127.5],
    pixel_std=[127.5, 127.5, 127.5],
    input_format="RGB",
)

# The auxiliary loss wraps it.
model = L(PixelTextSupervised)(base=model, pixel_text_loss=L(PixelTextLoss)(source="boxes"))

optimizer = L(torch.optim.AdamW)(
    params=L(get_default_optimizer_params)(base_lr=0.001, weight_decay_norm=0.0), lr=0.001, weight_decay=0.05
)
lr_multiplier = L(CosineParamScheduler)(start_value=1.0, end_value=0.0)
mapper = L(DetectionMapper)(
    is_train=True,
    augmentations=[L(T.RandomFlip)(horizontal=True)],
    image_format="RGB",
    use_masks=True,
    mask_format="bitmask",
)
dataloader = {
    "train": L(build_detection_train_loader)(
        dataset=L(dataset_dicts)(names=TRAIN), mapper=mapper, total_batch_size=4, num_workers=0
    ),
    "test": L(build_detection_test_loader)(
        dataset=L(dataset_dicts)(names=TEST, filter_empty=False),
        mapper=L(DetectionMapper)(is_train=False, augmentations=[], image_format="RGB"),
        num_workers=0,
    ),
    "evaluator": L(InstanceEvaluator)(dataset_name=TEST),
}
train = {
    "output_dir": "output/plug_in/mask_rcnn",
    "init_checkpoint": "",
    "max_iter": 300,
    "eval_period": 0,
    "device": "cpu",
    "seed": 1,
}
