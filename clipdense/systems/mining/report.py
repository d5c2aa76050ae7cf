"""Statistics and contact sheet of mined pairs."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
from PIL import Image, ImageDraw
from tabulate import tabulate

from clipdense.clip.vocabulary import Vocabulary
from clipdense.data.image import read_image
from clipdense.data.proposals import RLE, ground_truth_masks
from clipdense.visualization.fonts import drawable_text, load_font
from clipdense.visualization.pictures import save_picture

__all__ = ["ClassAgreement", "MiningStatistics", "draw_pairs", "statistics_table"]

Record = dict[str, Any]

_QUANTILES = (0, 5, 25, 50, 75, 95, 100)


class ClassAgreement:
    """Share of pairs whose noun is a class name and whose mask shows that class.

    A noun names a class if it is, or ends with, one of the class's names or their plurals: "dog", "dogs",
    "brown dog". The longest name counts: "hot dog" does not name the class dog. Such a pair is right if its
    mask has an IoU of at least 0.5 with an annotated segment of the class, or with all of them together
    (plurals). It is inside if at least half of the mask lies on them.

    Args:
        records: dataset dicts with segments.
        vocabulary: the classes of the segments.
        ignore_label: void in semantic maps.
    """

    def __init__(self, records: Iterable[Record], vocabulary: Vocabulary, ignore_label: int = 255) -> None:
        self._ignore_label = ignore_label
        self._records = {os.path.abspath(record["file_name"]): record for record in records}
        self._classes = {
            form: k
            for k, names in enumerate(vocabulary.synonyms)
            for name in names
            for form in _forms(name.lower())
        }
        self._counts: Counter[str] = Counter()
        self._last: tuple[str, list[tuple[int, RLE]]] = ("", [])

    def class_of(self, noun: str) -> int | None:
        """Return the class id that a noun names; None if it names no class."""
        words = noun.split()
        for start in range(len(words)):
            if (found := self._classes.get(" ".join(words[start:]))) is not None:
                return found
        return None

    def add(self, pair: Record) -> None:
        """Count a pair; fastest if the pairs of an image come one after the other."""
        known, label = self._records.get(pair["file_name"]), self.class_of(pair["noun"])
        if known is None or label is None:
            return
        if self._last[0] != pair["file_name"]:
            size = pair["height"], pair["width"]
            self._last = pair["file_name"], ground_truth_masks(known, size, self._ignore_label)
        segments = [mask for k, mask in self._last[1] if k == label]
        if not segments:
            self._counts["absent"] += 1
            return
        mask, union = pair["segmentation"], mask_util.merge(segments)
        overlap = mask_util.iou([mask], [*segments, union], [0] * (len(segments) + 1)).max()
        inside = mask_util.area(mask_util.merge([mask, union], intersect=True)) / mask_util.area(mask)
        self._counts["named"] += 1
        self._counts["right"] += bool(overlap >= 0.5)
        self._counts["inside"] += bool(inside >= 0.5)

    def result(self) -> dict[str, float]:
        """Return the counts and shares.

        Returns:
            ``named``: pairs whose noun names a class of their image; ``right`` and ``inside``: shares of
            them, 0 to 1; ``absent``: pairs whose noun names a class that is not in their image.
        """
        named = self._counts["named"]
        shares = {key: self._counts[key] / max(named, 1) for key in ("right", "inside")}
        return {"named": named, "absent": self._counts["absent"], **shares}


class MiningStatistics:
    """Statistics of a run, collected part by part.

    Args:
        agreement: compares the pairs with annotated classes; optional.
    """

    def __init__(self, agreement: ClassAgreement | None = None) -> None:
        self._agreement = agreement
        self._totals: Counter[str] = Counter()
        self._nouns: Counter[str] = Counter()
        self._too_long: set[str] = set()
        self._failed: list[dict[str, str]] = []
        self._images: set[Any] = set()
        self._scores: list[float] = []
        self._areas: list[float] = []

    def add(self, part: Mapping[str, Any]) -> None:
        """Add a part, see `clipdense.systems.mining.worker.MiningWorker`."""
        self._totals.update({key: part[key] for key in ("images", "captions", "nouns")})
        self._too_long.update(part["too_long"])
        self._failed += part["failed"]
        for pair in part["pairs"]:
            self._nouns[pair["noun"]] += 1
            self._images.add(pair["file_name"])
            self._scores.append(pair["score"])
            pixels = pair["height"] * pair["width"]
            self._areas.append(float(mask_util.area(pair["segmentation"])) / pixels)
            if self._agreement is not None:
                self._agreement.add(pair)

    def result(self) -> dict[str, Any]:
        """Return the statistics.

        Returns:
            Numbers of images, of images with pairs, of captions, of nouns before filters (counted once for
            each image), of pairs and of distinct nouns; pairs per image; the 30 most frequent nouns;
            quantiles (percent -> value) of scores and of mask areas (as a share of the image); skipped nouns
            and images; the agreement with classes.
        """
        count = len(self._scores)
        quantiles = {
            name: dict(
                zip(map(str, _QUANTILES), np.percentile(values, _QUANTILES).round(4).tolist(), strict=True)
            )
            for name, values in (("scores", self._scores), ("areas", self._areas))
            if values
        }
        return {
            "images": self._totals["images"],
            "images_with_pairs": len(self._images),
            "captions": self._totals["captions"],
            "nouns_of_images": self._totals["nouns"],
            "pairs": count,
            "nouns": len(self._nouns),
            "pairs_per_image": round(count / max(self._totals["images"], 1), 3),
            "most_frequent": self._nouns.most_common(30),
            **quantiles,
            "too_long": sorted(self._too_long),
            "failed": self._failed,
            **({} if self._agreement is None else {"classes": self._agreement.result()}),
        }


def statistics_table(statistics: Mapping[str, Any]) -> str:
    """Format the result of `MiningStatistics` as a table."""
    keys = ("images", "images_with_pairs", "captions", "nouns_of_images", "pairs", "nouns", "pairs_per_image")
    rows = [(key.replace("_", " "), statistics[key]) for key in keys]
    for name in ("scores", "areas"):
        if name in statistics:
            values = "  ".join(f"{percent}%: {value:.3f}" for percent, value in statistics[name].items())
            rows.append((f"quantiles of {name}", values))
    rows.append(("most frequent", ", ".join(f"{noun} {n}" for noun, n in statistics["most_frequent"][:12])))
    for key in ("too_long", "failed"):
        if statistics[key]:
            rows.append((f"skipped, {key.replace('_', ' ')}", len(statistics[key])))
    if "classes" in statistics:
        found = statistics["classes"]
        rows.append(("nouns that name a class of the image", found["named"]))
        rows.append(("of these, IoU with it at least 0.5", f"{100 * found['right']:.1f} %"))
        rows.append(("of these, at least half inside it", f"{100 * found['inside']:.1f} %"))
        rows.append(("nouns that name a class elsewhere", found["absent"]))
    return str(tabulate(rows, tablefmt="plain"))


def draw_pairs(pairs: Sequence[Record], path: Path, *, cell: int = 128, columns: int = 8) -> None:
    """Draw a contact sheet: each masked region with dimmed surroundings, its noun and its score.

    Args:
        pairs: as `clipdense.data.mask_pairs.read_pairs` returns them.
        path: PNG file to write.
        cell: side of a crop in pixels.
        columns: crops in a row.
    """
    strip = 28
    rows = max(1, -(-len(pairs) // columns))
    sheet = Image.new("RGB", (columns * (cell + 4), rows * (cell + strip)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, pair in enumerate(pairs):
        left, top = i % columns * (cell + 4), i // columns * (cell + strip)
        sheet.paste(_crop(pair, cell), (left, top))
        noun = drawable_text(pair["noun"])
        font = load_font(11, noun)
        while draw.textlength(noun, font) > cell:
            noun = noun[:-2]
        draw.text((left, top + cell), f"{noun}\n{pair['score']:.3f}", "black", font, spacing=0)
    save_picture(np.asarray(sheet), path)


def _crop(pair: Record, cell: int) -> Image.Image:
    """Cut the box of a mask, a quarter larger on each side, and fit it into a white square."""
    image = read_image(pair["file_name"], size=tuple(pair["segmentation"]["size"]))
    mask = mask_util.decode(pair["segmentation"]).astype(bool)
    image = np.where(mask[..., None], image, 255 - (255 - image) // 3)
    x, y, width, height = mask_util.toBbox(pair["segmentation"]).astype(int)
    left, top = max(0, x - width // 4), max(0, y - height // 4)
    shown = Image.fromarray(
        image[top : y + height + height // 4, left : x + width + width // 4].astype(np.uint8)
    )
    scale = cell / max(shown.size)
    shown = shown.resize([max(1, round(side * scale)) for side in shown.size])
    square = Image.new("RGB", (cell, cell), "white")
    square.paste(shown, ((cell - shown.width) // 2, (cell - shown.height) // 2))
    return square


def _forms(name: str) -> list[str]:
    """Return a name and its regular plurals."""
    plurals = [f"{name}s", f"{name}es"]
    if name.endswith("y"):
        plurals.append(f"{name[:-1]}ies")
    if name.endswith(("fe", "f")):
        plurals.append(name.removesuffix("e").removesuffix("f") + "ves")
    return [name, *plurals]
