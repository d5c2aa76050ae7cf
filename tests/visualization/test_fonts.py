"""Class names in any script, and with signs that matplotlib reads as mathematics."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from PIL import Image

from clipdense.systems.mining.report import draw_pairs
from clipdense.visualization import fonts
from clipdense.visualization.canvas import Canvas
from clipdense.visualization.clusters import draw_clusters
from clipdense.visualization.curves import draw_curve
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


def test_dollars_in_curves_and_titles_are_literal(tmp_path: Path) -> None:
    """Invalid mathematics would be an error."""
    rows = [{"iteration": i, "total_loss": 1.0, "bbox/AP-$\\frac$": 9.0} for i in range(3)]
    (tmp_path / "metrics.json").write_text("\n".join(map(json.dumps, rows)))
    draw_curve(tmp_path / "metrics.json", tmp_path / "curve.png")
    draw_clusters([IMAGE], {"$\\frac$": [np.zeros(IMAGE.shape[:2], np.int32)]}, tmp_path / "clusters.png")
    assert (tmp_path / "curve.png").is_file() and (tmp_path / "clusters.png").is_file()


def test_mined_nouns_of_any_script(installed: list[str], cat_font: str, tmp_path: Path) -> None:
    Image.fromarray(IMAGE).save(tmp_path / "a.png")
    mask = {"size": list(IMAGE.shape[:2]), "counts": [0, IMAGE.shape[0] * IMAGE.shape[1]]}
    mask = mask_util.frPyObjects(mask, *IMAGE.shape[:2])

    def sheet(noun: str) -> np.ndarray:
        pair = {"file_name": str(tmp_path / "a.png"), "segmentation": mask, "noun": noun, "score": 0.5}
        draw_pairs([pair], tmp_path / "sheet.png")
        return np.asarray(Image.open(tmp_path / "sheet.png"))

    assert np.array_equal(sheet(CAT), sheet("?"))  # no font has it
    for cache in CACHES:
        cache.cache_clear()
    installed.append(cat_font)
    assert not np.array_equal(sheet(CAT), sheet("?"))


def test_legends_show_numbers(installed: list[str]) -> None:
    labels = np.zeros((4, 4), np.int64)
    rows = list_contents({"sem_seg_labels": labels}, "semantic", Metadata(stuff_classes=[CAT]), 0.5)
    assert rows == [("#0  100%", 0)]
