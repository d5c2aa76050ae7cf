"""Region-level CLIP by self-distillation (CLIPSelf, Wu et al., ICLR 2024), and its RegionCLIP baseline."""

from clipdense.systems.clipself.config import add_clipself_config
from clipdense.systems.clipself.mapper import CLIPSelfMapper
from clipdense.systems.clipself.meta_arch import CLIPSelf, RegionCLIPBaseline

__all__ = ["CLIPSelf", "CLIPSelfMapper", "RegionCLIPBaseline", "add_clipself_config"]
