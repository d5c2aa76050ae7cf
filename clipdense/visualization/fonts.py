"""Fonts for class names in any script."""

from __future__ import annotations

import logging
import os
import unicodedata
from functools import lru_cache

import matplotlib
from matplotlib.font_manager import findSystemFonts
from matplotlib.ft2font import FT2Font
from PIL import ImageFont

__all__ = ["drawable_name", "drawable_text", "find_font", "load_font"]

logger = logging.getLogger(__name__)

DEFAULT_FONT = os.path.join(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
"""Font of all pictures. It has Latin, Greek, Cyrillic, Hebrew, Arabic and some other scripts."""


def load_font(size: int, text: str = "") -> ImageFont.FreeTypeFont:
    """Load the font of pictures at a size in pixels, or an installed font that has the script of a text."""
    return ImageFont.truetype(find_font(text) or DEFAULT_FONT, size)


@lru_cache(maxsize=4096)
def find_font(text: str) -> str | None:
    """Find a font file with all characters of a text; None if no installed font has them."""
    needed = {ord(character) for character in text if unicodedata.category(character)[0] not in "CZ"}
    if needed <= _characters(DEFAULT_FONT):
        return DEFAULT_FONT
    return next((path for path in _installed_fonts() if needed <= _characters(path)), None)


def drawable_name(name: str, number: int) -> str:
    """Return a class name, or the number of the class if no installed font has the name's characters.

    The first time that a name is replaced, a warning says which name the number stands for.
    """
    if find_font(name) is not None:
        return name
    _warn(name, number)
    return f"#{number}"


def drawable_text(text: str) -> str:
    """Replace characters that no installed font can draw beside the others by question marks."""
    if find_font(text) is not None:
        return text
    return "".join(character if find_font(character) == DEFAULT_FONT else "?" for character in text)


@lru_cache(maxsize=4096)
def _warn(name: str, number: int) -> None:
    logger.warning(
        "No installed font has the characters of the class name '%s': pictures show #%d for it. Install a "
        "font of its script, e.g. Noto Sans CJK or Noto Sans Devanagari.",
        name,
        number,
    )


@lru_cache(maxsize=1)
def _installed_fonts() -> tuple[str, ...]:
    """List the fonts of the system: regular ones and Noto's first, without fonts of placeholders."""

    def rank(path: str) -> tuple[bool, bool, str]:
        name = os.path.basename(path).lower()
        return "regular" not in name, "noto" not in name, path

    return tuple(sorted((p for p in findSystemFonts() if "lastresort" not in p.lower()), key=rank))


@lru_cache(maxsize=4096)
def _characters(path: str) -> frozenset[int]:
    """Return the code points of a font file; none if it cannot be read."""
    try:
        return frozenset(FT2Font(path).get_charmap())
    except (OSError, RuntimeError):
        return frozenset()
