"""What mining has found, in numbers and in pictures."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
from PIL import Image, ImageDraw, ImageFont
from tabulate import tabulate

from clipdense.clip.vocabulary import Vocabulary
from clipdense.data.image import read_image
from clipdense.systems.mining.pairs import RLE, Record, ground_truth_masks
from clipdense.visualization.panels import save_picture

__all__ = ["ClassAgreement", "MiningStatistics", "draw_pairs", "statistics_table"]

_QUANTILES = (0, 5, 25, 50, 75, 95, 100)


class ClassAgreement:
    """How often a noun that is a class's name has a mask of that class.

    A noun names a class if it is, or ends in, one of the class's names or its plural: "dog", "dogs", "brown
    dog"; the longest name counts ("hot dog" is no dog). Such a pair is right if its mask has an IoU of at
    least 0.5 with an annotated segment of that class, or with all of them together (plurals); it is inside if
    at least half of it lies on them.
    """

    def __init__(self, records: Iterable[Record], vocabulary: Vocabulary, ignore_label: int = 255) -> None:
        """
        Args:
            records: dataset dicts with segments, whose classes `vocabulary` names.
            ignore_label: void in semantic maps.
        """
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
        """The class that a noun names."""
        words = noun.split()
        for start in range(len(words)):
            if (found := self._classes.get(" ".join(words[start:]))) is not None:
                return found
        return None

    def add(self, pair: Record) -> None:
        """Count a pair; pairs of one image should come together."""
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
        """``named``: pairs whose noun names a class that their image has; ``right`` and ``inside``: shares of
        them, 0 .. 1; ``absent``: pairs that name a class that their image does not have.
        """
        named = self._counts["named"]
        shares = {key: self._counts[key] / max(named, 1) for key in ("right", "inside")}
        return {"named": named, "absent": self._counts["absent"], **shares}


class MiningStatistics:
    """Numbers of a run, gathered shard by shard."""

    def __init__(self, agreement: ClassAgreement | None = None) -> None:
        """
        Args:
            agreement: counts the pairs, too.
        """
        self._agreement = agreement
        self._totals: Counter[str] = Counter()
        self._nouns: Counter[str] = Counter()
        self._too_long: set[str] = set()
        self._unreadable: list[str] = []
        self._images: set[Any] = set()
        self._scores: list[float] = []
        self._areas: list[float] = []

    def add(self, shard: Mapping[str, Any]) -> None:
        """Count a shard, see `clipdense.systems.mining.run.mine_shard`."""
        self._totals.update({key: shard[key] for key in ("images", "captions", "nouns")})
        self._too_long.update(shard["too_long"])
        self._unreadable += shard["unreadable"]
        for pair in shard["pairs"]:
            self._nouns[pair["noun"]] += 1
            self._images.add(pair["file_name"])
            self._scores.append(pair["score"])
            pixels = pair["height"] * pair["width"]
            self._areas.append(float(mask_util.area(pair["segmentation"])) / pixels)
            if self._agreement is not None:
                self._agreement.add(pair)

    def result(self) -> dict[str, Any]:
        """Numbers of images, of those with pairs, of captions, of nouns before filters (an image's, each
        once), of pairs and of distinct nouns; pairs an image; the 30 most frequent nouns; quantiles (percent
        -> value) of scores and of mask areas (share of the image); what was skipped; agreement with classes.
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
            "unreadable": self._unreadable,
            **({} if self._agreement is None else {"classes": self._agreement.result()}),
        }


def statistics_table(statistics: Mapping[str, Any]) -> str:
    """The numbers of `MiningStatistics.result` as lines to print."""
    keys = ("images", "images_with_pairs", "captions", "nouns_of_images", "pairs", "nouns", "pairs_per_image")
    rows = [(key.replace("_", " "), statistics[key]) for key in keys]
    for name in ("scores", "areas"):
        if name in statistics:
            values = "  ".join(f"{percent}%: {value:.3f}" for percent, value in statistics[name].items())
            rows.append((f"quantiles of {name}", values))
    rows.append(("most frequent", ", ".join(f"{noun} {n}" for noun, n in statistics["most_frequent"][:12])))
    for key in ("too_long", "unreadable"):
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
    """A contact sheet: what each mask shows, around it dimmed, with its noun and score.

    Args:
        path: PNG to write.
        cell: side of a crop, in pixels.
        columns: crops in a row.
    """
    strip, font = 28, ImageFont.load_default(11)
    rows = max(1, -(-len(pairs) // columns))
    sheet = Image.new("RGB", (columns * (cell + 4), rows * (cell + strip)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, pair in enumerate(pairs):
        left, top = i % columns * (cell + 4), i // columns * (cell + strip)
        sheet.paste(_crop(pair, cell), (left, top))
        noun = pair["noun"]
        while draw.textlength(noun, font) > cell:
            noun = noun[:-2]
        draw.text((left, top + cell), f"{noun}\n{pair['score']:.3f}", "black", font, spacing=0)
    save_picture(np.asarray(sheet), path)


def _crop(pair: Record, cell: int) -> Image.Image:
    """The mask's box and a quarter more on each side, in a square of the given size."""
    image = read_image(pair["file_name"])
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
    """A name and its regular plurals."""
    plurals = [f"{name}s", f"{name}es"]
    if name.endswith("y"):
        plurals.append(f"{name[:-1]}ies")
    if name.endswith(("fe", "f")):
        plurals.append(name.removesuffix("e").removesuffix("f") + "ves")
    return [name, *plurals]
