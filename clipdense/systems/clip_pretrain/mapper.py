"""Captioned crops from data sets of the `shapes` world."""

from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode

from clipdense.clip import load_clip
from clipdense.data.image import read_image
from clipdense.data.mappers import MAPPER_REGISTRY
from clipdense.data.shapes.draw import Rng
from clipdense.data.shapes.world import CLASSES, GROUNDS
from clipdense.systems.clip_pretrain.crops import AnnotatedThing, CropSampler


@MAPPER_REGISTRY.register()
class CropCaptionMapper:
    """Turns an annotated scene into ``INPUT.CROP_CAPTION.PER_IMAGE`` captioned crops.

    Reads ``file_name``, ``sem_seg_file_name`` (labels: things 0..79, grounds from 80) and ``annotations`` of a dataset
    dict; adds ``crops`` (n, 3, S, S) uint8 RGB, ``captions`` (n strings) and ``contents`` (n, 96) uint8.
    Evaluation draws the same crops every time.
    """
