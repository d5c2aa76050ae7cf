"""CLIPpy (Ranasinghe et al., ICCV 2023): image-text training whose patches group by what they show."""

from clipdense.data import caption_mapper as caption_mapper  # registers the mapper of the training
from clipdense.systems.clippy.config import add_clippy_config
from clipdense.systems.clippy.image import PatchEncoder
from clipdense.systems.clippy.meta_arch import CLIPpy
from clipdense.systems.clippy.text import CLIPTexts, SentenceT5, TextEncoder

__all__ = ["CLIPTexts", "CLIPpy", "PatchEncoder", "SentenceT5", "TextEncoder", "add_clippy_config"]
