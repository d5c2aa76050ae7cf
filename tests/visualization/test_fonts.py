"""Class names in any script, and with signs that matplotlib reads as mathematics."""

import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen

from clipdense.visualization import fonts
from clipdense.visualization.canvas import Canvas
from clipdense.visualization.fonts import DEFAULT_FONT, drawable_name, drawable_text, find_font, load_font
from clipdense.visualization.pictures import add_title, list_contents

from detectron2.data.catalog import Metadata

IMAGE = np.full((96, 128, 3), 120, np.uint8)
CAT = "\u732b"
CACHES = (fonts.find_font, fonts._installed_fonts, fonts._missing_scripts)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Fonts of the system, none unless a test adds some."""
    paths: list[str] = []
    monkeypatch.setattr(fonts, "findSystemFonts", lambda: paths)
    for cache in CACHES:
        cache.cache_clear()
    yield paths
    for cache in CACHES:
        cache.cache_clear()


@pytest.fixture
def cat_font(tmp_path: Path) -> str:
    """A font with one character, which is a square."""
    pen = TTGlyphPen(None)
    pen.moveTo((100, 0))
    for corner in ((100, 700), (800, 700), (800, 0)):
        pen.lineTo(corner)
    pen.closePath()
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", "cat"])
    builder.setupCharacterMap({ord(CAT): "cat"})
    builder.setupGlyf({".notdef": TTGlyphPen(None).glyph(), "cat": pen.glyph()})
    builder.setupHorizontalMetrics({".notdef": (900, 0), "cat": (900, 100)})
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Cat", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(tmp_path / "Cat-Regular.ttf")
    return str(tmp_path / "Cat-Regular.ttf")


def draw(names: list[str]) -> np.ndarray:
    canvas = Canvas(IMAGE, 256)
    canvas.things(np.array([[30.0, 30, 90, 80]]), None, [0], Metadata(thing_classes=names))
    return canvas.picture()


@pytest.mark.parametrize(
    "name", ["cat", "\u043a\u043e\u0448\u043a\u0430", "\u03b3\u03ac\u03c4\u03b1", "\u0642\u0637\u0629"]
)
def test_scripts_of_the_default_font(name: str, installed: list[str]) -> None:
    """Latin, Cyrillic, Greek and Arabic."""
    assert drawable_name(name, 3) == name and find_font(name) == DEFAULT_FONT
    assert not np.array_equal(draw([name]), draw([""]))


@pytest.mark.parametrize("name", [CAT, "\u092c\u093f\u0932\u094d\u0932\u0940", f"cat {CAT}"])
def test_names_without_a_font_are_numbers(
    name: str, installed: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Chinese, Devanagari, and two scripts; one sentence for each script."""
    with caplog.at_level(logging.WARNING):
        assert np.array_equal(draw([name]), draw(["#0"]))
        draw([name])
    assert [name in record.getMessage() and "#0" in record.getMessage() for record in caplog.records] == [
        True
    ]
    assert drawable_text(f"a {CAT}") == "a ?"


def test_installed_fonts_are_used(installed: list[str], cat_font: str, tmp_path: Path) -> None:
    broken = tmp_path / "Broken-Regular.ttf"
    broken.write_bytes(b"no font")
    installed += [str(broken), cat_font]
    assert find_font(CAT) == cat_font and load_font(20, CAT).getname()[0] == "Cat"
    assert drawable_name(CAT, 0) == CAT
    assert not np.array_equal(draw([CAT]), draw(["#0"]))
    assert not np.array_equal(add_title(IMAGE, CAT), add_title(IMAGE, "?"))


def test_dollars_are_literal(installed: list[str]) -> None:
    assert not np.array_equal(draw(["$x$"]), draw(["x"]))
    wide = Canvas(IMAGE, 256)
    wide.things(np.array([[30.0, 30, 90, 80]]), None, [0], Metadata(thing_classes=["$\\frac$"]))
    assert wide.picture().shape == (192, 256, 3)  # invalid mathematics is no error


def test_legends_show_numbers(installed: list[str]) -> None:
    labels = np.zeros((4, 4), np.int64)
    rows = list_contents({"sem_seg_labels": labels}, "semantic", Metadata(stuff_classes=[CAT]), 0.5)
    assert rows == [("#0  100%", 0)]
