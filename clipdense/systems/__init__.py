"""One room a paper, or a family of papers that share a forward. Importing this registers all of them."""

from clipdense.systems.catseg import add_catseg_config
from clipdense.systems.clippy import add_clippy_config
from clipdense.systems.clipself import add_clipself_config
from clipdense.systems.denseclip import add_denseclip_config
from clipdense.systems.fvlm import add_fvlm_config
from clipdense.systems.mask_adaptation import add_adaptation_config
from clipdense.systems.mask_pooling import add_mask_pooling_config
from clipdense.systems.maskclip_plus import add_maskclip_plus_config
from clipdense.systems.pacl import add_pacl_config
from clipdense.systems.prompting import add_prompting_config
from clipdense.systems.segclip import add_segclip_config
from clipdense.systems.text_rcnn import add_text_rcnn_config
from clipdense.systems.training_free import add_training_free_config
from clipdense.systems.two_stage import add_two_stage_config

from detectron2.config import CfgNode as CN


def add_systems_config(cfg: CN) -> None:
    """Add the keys of every system to ``cfg`` (in place)."""
    add_catseg_config(cfg)
    add_clippy_config(cfg)
    add_clipself_config(cfg)
    add_denseclip_config(cfg)
    add_fvlm_config(cfg)
    add_text_rcnn_config(cfg)
    add_two_stage_config(cfg)
    add_adaptation_config(cfg)
    add_mask_pooling_config(cfg)
    add_maskclip_plus_config(cfg)
    add_pacl_config(cfg)
    add_prompting_config(cfg)
    add_segclip_config(cfg)
    add_training_free_config(cfg)
