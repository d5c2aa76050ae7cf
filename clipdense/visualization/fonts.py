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

    A warning says so once for each script.
    """
    if find_font(name) is not None:
        return name
    strange = next(c for c in name if find_font(c) != DEFAULT_FONT)
    _warn(unicodedata.name(strange, "some").split()[0], name, number)
    return f"#{number}"


def drawable_text(text: str) -> str:
    """Replace characters that no installed font can draw beside the others by question marks."""
    if find_font(text) is not None:
        return text
    return "".join(character if find_font(character) == DEFAULT_FONT else "?" for character in text)


def _warn(script: str, name: str, number: int) -> None:
    if script not in _missing_scripts():
        _missing_scripts().add(script)
        logger.warning(
            "No installed font has the %s characters of class names such as '%s': pictures show the numbers "
            "of these classes, from #0 in the order of the class names, here #%d. Install a font of the "
            "script, e.g. Noto Sans CJK or Noto Sans Devanagari.",
            script,
            name,
            number,
        )


@lru_cache(maxsize=1)
def _missing_scripts() -> set[str]:
    """Return the scripts that a warning has named."""
    return set()


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
