"""Mining of the images of one part of a run (`clipdense.engine.parts`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from clipdense.engine.parts import FailureList, Loaded
from clipdense.systems.mining.pairs import MaskMiner, Record

__all__ = ["MiningWorker"]


class MiningWorker:
    """Mines the images of parts; an image that cannot be used does not stop the others.

    Args:
        miner: finds the pairs of an image.
        finder: returns the nouns of each caption.
    """

    def __init__(self, miner: MaskMiner, finder: Callable[[Sequence[str]], list[list[str]]]) -> None:
        self._miner, self._finder = miner, finder
        self._failures = FailureList()

    def __call__(self, records: Sequence[Record], images: Iterable[Loaded]) -> dict[str, Any]:
        """Mine the pairs of some images.

        Args:
            records: from `captioned_images`.
            images: of the records, or why they cannot be read.

        Returns:
            ``pairs``; the numbers of ``images``, ``captions`` and ``nouns`` (counted once for each image);
            the ``too_long`` nouns; the ``failed`` images.
        """
        captions = [caption for record in records for caption in record["captions"]]
        found = iter(zip(self._finder(captions), captions, strict=True))
        pairs: list[Record] = []
        too_long: set[str] = set()
        num_nouns = 0
        self._failures.clear()
        for record, image in zip(records, images, strict=True):
            nouns: dict[str, str] = {}  # noun -> the first caption that contains it
            for _ in record["captions"]:
                caption_nouns, caption = next(found)
                for noun in caption_nouns:
                    nouns.setdefault(noun, caption)
            num_nouns += len(nouns)
            too_long |= {noun for noun in nouns if self._miner.embed(noun) is None}
            with self._failures.of(record):
                if isinstance(image, Exception):
                    raise image
                pairs += self._miner(record, image, nouns)
        return {
            "images": len(records),
            "captions": len(captions),
            "nouns": num_nouns,
            "too_long": sorted(too_long),
            "failed": self._failures.entries,
            "pairs": pairs,
        }
