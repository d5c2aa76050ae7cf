"""A contact sheet of the `shapes` world: scenes with masks, boxes, names and captions."""

import json
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
from PIL import Image, ImageDraw, ImageFont

from clipdense.data.shapes.make import annotation_file
from clipdense.data.shapes.records import png_folders

__all__ = ["draw_sheet"]

_MARGIN, _CAPTION = 8, 34


def draw_sheet(
    root: Path, split: str, path: Path, *, images: int | None = None, count: int = 24, columns: int = 6
) -> None:
    """Draw the first images of a generated split as one PNG.

    Masks are outlined and tinted. Boxes are labelled with class name and visible share. One caption stands
    below each image.

    Args:
        root: dataset folder.
        split: name of a split.
        path: PNG to write; its folder is created.
        images: number of images in the annotation files to read (default: the full split).
        count: maximum number of images on the sheet.
        columns: number of images in a row.

    Raises:
        ValueError: If there is no split of that name.
        FileNotFoundError: If the split has not been generated.
    """
    instances = json.loads(annotation_file(root, "instances_closed", split, images).read_text("utf-8"))
    captions = json.loads(annotation_file(root, "captions", split, images).read_text("utf-8"))
    names = {c["id"]: c["name"] for c in instances["categories"]}
    first_caption = {a["image_id"]: a["caption"] for a in reversed(captions["annotations"])}
    shown = instances["images"][:count]
    width, height = (max(image[side] for image in shown) + _MARGIN for side in ("width", "height"))
    columns = min(columns, len(shown))
    rows = -(-len(shown) // columns)
    sheet = Image.new("RGB", (columns * width + _MARGIN, rows * (height + _CAPTION) + _MARGIN), "white")
    for place, image in enumerate(shown):
        left = _MARGIN + place % columns * width
        top = _MARGIN + place // columns * (height + _CAPTION)
        own = [a for a in instances["annotations"] if a["image_id"] == image["id"]]
        pixels = np.asarray(Image.open(png_folders(root, split)["image"] / image["file_name"]).convert("RGB"))
        sheet.paste(_annotated(pixels, own, names), (left, top))
        _write(sheet, (left, top + image["height"] + 2), first_caption.get(image["id"], ""), image["width"])
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def _annotated(pixels: np.ndarray, annotations: list[dict], names: dict[int, str]) -> Image.Image:
    pixels = pixels.astype(np.float32)
    for annotation in annotations:
        mask = mask_util.decode(annotation["segmentation"]).astype(bool)
        inner = mask.copy()
        inner[1:-1, 1:-1] &= mask[:-2, 1:-1] & mask[2:, 1:-1] & mask[1:-1, :-2] & mask[1:-1, 2:]
        pixels[mask] = 0.75 * pixels[mask] + 0.25 * 255
        pixels[mask & ~inner] = (255, 255, 255)
    image = Image.fromarray(pixels.astype(np.uint8))
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(9)
    for annotation in annotations:
        x, y, w, h = annotation["bbox"]
        draw.rectangle((x, y, x + w - 1, y + h - 1), outline="black")
        text = f"{names[annotation['category_id']]} {annotation['visible']:.2f}"
        at = (min(x + 1, image.width - draw.textlength(text, font)), max(y - 11, 0))
        draw.rectangle(draw.textbbox(at, text, font), fill="white")
        draw.text(at, text, "black", font)
    return image


def _write(sheet: Image.Image, at: tuple[int, int], text: str, width: int) -> None:
    """Write text in at most two lines of the given width in pixels."""
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(10)
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if draw.textlength(longer, font) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    draw.text(at, "\n".join(lines[:2]), "black", font)
