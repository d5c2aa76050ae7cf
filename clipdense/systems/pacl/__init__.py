"""PACL (Mukhoti et al., CVPR 2023): a patch embedder on a frozen CLIP, trained on image-text pairs."""

from clipdense.data import caption_mapper as caption_mapper  # registers the mapper of the training
from clipdense.systems.pacl.alignment import patch_alignment, patch_contrastive_loss
from clipdense.systems.pacl.config import add_pacl_config
from clipdense.systems.pacl.meta_arch import PACL

__all__ = ["PACL", "add_pacl_config", "patch_alignment", "patch_contrastive_loss"]
