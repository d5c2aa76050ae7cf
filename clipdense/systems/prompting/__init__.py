"""Image classification by a frozen CLIP with learned prompts (CoOp, CoCoOp, VPT)."""

from clipdense.data.object_crops import ObjectCropMapper
from clipdense.systems.prompting.config import add_prompting_config
from clipdense.systems.prompting.meta_arch import PromptedCLIP

__all__ = ["ObjectCropMapper", "PromptedCLIP", "add_prompting_config"]
