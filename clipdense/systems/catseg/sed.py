"""SED: cost aggregation on a hierarchical image tower, with category early rejection."""

from __future__ import annotations

from typing import Any

from torch import nn

from clipdense.systems.catseg.meta_arch import CATSeg
from clipdense.systems.catseg.sed_decoder import SEDAggregator

from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY

__all__ = ["SED"]


@META_ARCH_REGISTRY.register()
class SED(CATSeg):
    """A simple encoder-decoder for open-vocabulary segmentation (SED, Xie et al., CVPR 2024).

    As `CATSeg`, with three differences: the image tower is a ConvNeXt (or a ResNet), whose own stages guide
    the decoder; the classes are aggregated at each stage of the decoder (`SEDAggregator`); and small heads
    reject classes before each stage in evaluation.
    """

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read the constructor arguments from ``MODEL.CAT_SEG`` and ``MODEL.CLIP``.

        Raises:
            ValueError: If the tower has no stages of the sizes that the decoder needs.
        """
        keys = cfg.MODEL.CAT_SEG
        arguments = cls.shared_arguments(cfg)
        tower = arguments["clip"].visual
        sizes = [tower.stride // tower.tap_strides[tap] for tap in keys.GUIDANCE if tap in tower.tap_strides]
        if sizes != [2, 4, 8]:
            raise ValueError(
                f"MODEL.CAT_SEG.GUIDANCE {list(keys.GUIDANCE)}: SED needs maps of 2, 4 and 8 times the size "
                "of the dense map, such as the stages [4, 3, 2] of a ConvNeXt; the taps of a "
                f"{type(tower).__name__} have strides {tower.tap_strides}"
            )
        return arguments | {
            "aggregator": SEDAggregator(
                prompts=len(arguments["prompts"]),
                guidance_dims=[tower.tap_channels[tap] for tap in keys.GUIDANCE],
                hidden_dim=keys.HIDDEN_DIM,
                heads=keys.HEADS,
                decoder_guidance_dims=keys.DECODER_GUIDANCE_DIMS,
                decoder_dims=keys.DECODER_DIMS,
                kernels=keys.KERNELS,
            ),
            "upsampling": nn.ModuleList(nn.Identity() for _ in sizes),
        }
