"""What an exported file says about itself: the schema of its metadata, and a reader that trusts none of it.

This module needs the standard library only, so that it can be copied together with `runner.py`.
"""

from __future__ import annotations

import json
import zipfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

__all__ = ["FORMAT", "METADATA_KEY", "FileMetadata", "FileMetadataError", "read_pt2_metadata"]

METADATA_KEY = "clipdense"
"""Name of the metadata in an ONNX file (`metadata_props`); in a .pt2 file ``extra/clipdense.json``."""
FORMAT = 1
"""Version of the schema."""

_LIMIT = 2**24  # bytes of metadata; 21,000 class names take 1 MB


class FileMetadataError(ValueError):
    """The metadata of an exported file is missing, damaged, or not of this version."""


@dataclass(frozen=True)
class FileMetadata:
    """Description of an exported file. A file can set these fields, of these types, and nothing else.

    Attributes:
        system: class of the exported model, for people.
        task: "semantic" (one map per class or name), "masks" (masks of queries and their class scores) or
            "boxes" (detections).
        clipdense: version that wrote the file.
        format: version of the schema.
        opset: ONNX operator set; 0 in a .pt2 file.
        channels: order of the image's channels, "RGB" or "BGR".
        pixel_mean: of each channel, in 0..255, subtracted first.
        pixel_std: of each channel, in 0..255, divided by.
        shortest: shortest side that images are resized to, in pixels; 0: images keep their size.
        longest: limit of the longest side, in pixels; 0: none.
        multiple: images are padded with zeros (after the normalisation), right and below, to multiples of
            this.
        centred_padding: pad on all sides instead, the smaller half of an odd padding left or above.
        crop_padding: whether maps are cut to the part without the padding.
        fixed_size: height and width that the file takes; empty: any.
        min_size: smallest side that the file takes, in pixels.
        dynamic_batch: whether the file takes several images at once.
        dense_mode: last-block mode of CLIP's dense map; "" if there is none.
        text: convention of the text input: "names" (a row per name, and `synonyms`), "classes" (a row per
            class), "prompts" (P rows per class) or "none" (the classes are constants).
        embed_dim: D, length of a text row; 0 without a text input.
        prompts: P of the convention "prompts".
        own_text: only text that this model wrote fits, because its prompts are learned.
        clip: name of the CLIP that embeds the text.
        templates: name of the prompt templates.
        num_classes: number of classes that the file needs; 0: any.
        max_classes: largest number of classes; 0: no limit.
        classes: names of the classes; of a file without a text input, those that it predicts.
        things: indices in `classes` of countable things.
        base_names: names of the classes that were trained, in the form of `canonical`; classes of other
            names are novel.
        reads_base: whether the file has an input `base`, which classes are base.
        reads_image_size: whether the file has an input `image_size`, the image without its padding.
        logit_scale: factor of the logits.
        activation: "softmax" (over all names), "sigmoid" or "none".
        score_threshold: pixels whose best score is lower have no class, or detections that are left out.
        window: side of sliding windows in pixels; 0: the whole image.
        window_stride: distance of neighbouring windows in pixels.
        resize_to_input: resize maps to the input of the file before they are resized to the image.
        resize_masks_first: resize mask logits to the image, instead of class maps.
        object_threshold, overlap_threshold, pixel_threshold: of panoptic merging.
        calibration: amount subtracted from the maps of base classes.
        postprocessed: "boxes": whether the file holds the selection of detections.
        nms_threshold: "boxes": overlap above which detections are removed, if that is left to the caller.
        max_detections: "boxes": number of detections per image at most.
    """

    system: str
    task: str
    clipdense: str = ""
    format: int = FORMAT
    opset: int = 0
    channels: str = "RGB"
    pixel_mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    pixel_std: tuple[float, ...] = (1.0, 1.0, 1.0)
    shortest: int = 0
    longest: int = 0
    multiple: int = 0
    centred_padding: bool = False
    crop_padding: bool = True
    fixed_size: tuple[int, ...] = ()
    min_size: int = 1
    dynamic_batch: bool = False
    dense_mode: str = ""
    text: str = "none"
    embed_dim: int = 0
    prompts: int = 0
    own_text: bool = False
    clip: str = ""
    templates: str = ""
    num_classes: int = 0
    max_classes: int = 0
    classes: tuple[str, ...] = ()
    things: tuple[int, ...] = ()
    base_names: tuple[str, ...] = ()
    reads_base: bool = False
    reads_image_size: bool = False
    logit_scale: float = 1.0
    activation: str = "none"
    score_threshold: float = 0.0
    window: int = 0
    window_stride: int = 0
    resize_to_input: bool = True
    resize_masks_first: bool = False
    object_threshold: float = 0.8
    overlap_threshold: float = 0.8
    pixel_threshold: float = 0.0
    calibration: float = 0.0
    postprocessed: bool = False
    nms_threshold: float = 0.5
    max_detections: int = 100

    def to_json(self) -> str:
        """Write the metadata as JSON."""
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str, source: str = "the file") -> FileMetadata:
        """Read metadata.

        Args:
            text: JSON.
            source: name of the file, for errors.

        Raises:
            FileMetadataError: If it is not JSON, has a field that is not in the schema, a value of another
                type or out of range, or another version of the schema.
        """
        if len(text) > _LIMIT:
            raise FileMetadataError(f"{source}: more than {_LIMIT} bytes of metadata")
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise FileMetadataError(f"{source}: its metadata are not JSON ({error})") from None
        if not isinstance(content, dict):
            raise FileMetadataError(f"{source}: its metadata are not a dictionary")
        if content.get("format") != FORMAT:
            raise FileMetadataError(
                f"{source}: metadata of format {content.get('format')!r}, expected {FORMAT}: export the "
                f"model again"
            )
        kinds = {field.name: field for field in fields(cls)}
        values = {}
        for name, value in content.items():
            if name not in kinds:
                raise FileMetadataError(f"{source}: metadata may not set '{name[:60]}'")
            values[name] = _checked(value, str(kinds[name].type), f"{source}: metadata '{name}'")
        if missing := {"system", "task"} - values.keys():
            raise FileMetadataError(f"{source}: metadata lack {', '.join(sorted(missing))}")
        metadata = cls(**values)
        metadata._check(source)
        return metadata

    def _check(self, source: str) -> None:
        choices = {
            "task": ("semantic", "masks", "boxes"),
            "channels": ("RGB", "BGR"),
            "text": ("names", "classes", "prompts", "none"),
            "activation": ("softmax", "sigmoid", "none"),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise FileMetadataError(
                    f"{source}: metadata '{name}' must be one of {', '.join(known)}, not "
                    f"{getattr(self, name)[:60]!r}"
                )
        sides = {
            "shortest": 2**14,
            "longest": 2**15,
            "multiple": 2**12,
            "min_size": 2**14,
            "window": 2**14,
            "window_stride": 2**14,
            "max_detections": 2**20,
        }
        for name, limit in sides.items():
            if not 0 <= getattr(self, name) <= limit:
                raise FileMetadataError(f"{source}: metadata '{name}' must be in 0..{limit}")
        if len(self.pixel_mean) != 3 or len(self.pixel_std) != 3 or not all(s > 0 for s in self.pixel_std):
            raise FileMetadataError(f"{source}: pixel_mean and pixel_std must have 3 entries, pixel_std > 0")
        if len(self.fixed_size) not in (0, 2) or not all(0 < side <= 2**14 for side in self.fixed_size):
            raise FileMetadataError(f"{source}: fixed_size must be a height and a width, or empty")
        if self.window and not 0 < self.window_stride <= self.window:
            raise FileMetadataError(f"{source}: window_stride must be in 1..window")


def _checked(value: Any, kind: str, name: str) -> Any:
    """Return a value of the type that an annotation names; lists become tuples."""
    if kind.startswith("tuple"):
        entry = kind[6:].partition(",")[0]
        if not isinstance(value, list):
            raise FileMetadataError(f"{name} must be a list, not {str(value)[:60]!r}")
        return tuple(_checked(item, entry, name) for item in value)
    expected = {"str": str, "int": int, "float": (int, float), "bool": bool}[kind]
    wrong_bool = isinstance(value, bool) != (kind == "bool")
    if not isinstance(value, expected) or wrong_bool:  # type: ignore[arg-type]
        raise FileMetadataError(f"{name} must be of type {kind}, not {str(value)[:60]!r}")
    if kind == "float":
        number = float(value)
        if number != number or number in (float("inf"), float("-inf")):
            raise FileMetadataError(f"{name} must be finite")
        return number
    return value


def read_pt2_metadata(path: str | Path) -> FileMetadata:
    """Read the metadata of a .pt2 file from its archive, without loading the program.

    Raises:
        FileNotFoundError: If the file does not exist.
        FileMetadataError: If it is not an exported file of clipdense; see `FileMetadata.from_json`.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no exported file '{path}'")
    try:
        with zipfile.ZipFile(path) as archive:
            names = [info for info in archive.infolist() if info.filename.endswith("/clipdense.json")]
            if len(names) != 1 or names[0].file_size > _LIMIT:
                raise FileMetadataError(
                    f"{path} has no metadata of clipdense: export it with clipdense export"
                )
            text = archive.read(names[0]).decode("utf-8")
    except (zipfile.BadZipFile, OSError, UnicodeDecodeError) as error:
        raise FileMetadataError(f"{path} is not an exported file ({error})") from None
    return FileMetadata.from_json(text, str(path))
