"""CLIPSelf (Wu et al., ICLR 2024): a CLIP distils its image embeddings of crops into its own dense map."""

from clipdense.systems.clipself.config import add_clipself_config
from clipdense.systems.clipself.mapper import CLIPSelfMapper
from clipdense.systems.clipself.meta_arch import CLIPSelf

__all__ = ["CLIPSelf", "CLIPSelfMapper", "add_clipself_config"]
