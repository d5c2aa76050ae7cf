"""Selection of categories from COCO and LVIS annotations."""

import json
from collections.abc import Collection
from pathlib import Path

from clipdense.data.json_files import load_json
from clipdense.files import write_text

__all__ = ["select_categories"]


def select_categories(
    source: Path,
    target: Path,
    annotated: Collection[int],
    listed: Collection[int] | None = None,
    *,
    all_images: bool = False,
) -> tuple[int, int] | None:
    """Write a COCO or LVIS JSON file with the annotations of some categories.

    Args:
        source: the original file.
        target: file to write.
        annotated: ids of the categories whose annotations are kept.
        listed: ids of the categories in the list of categories; None for all.
        all_images: also keep images that have no annotation left.

    Returns:
        The numbers of images and annotations; None if the target exists already.

    Raises:
        FileNotFoundError: If the source does not exist.
        ValueError: If it has another structure, or lacks one of the categories.
    """
    if target.is_file():
        return None
    content = load_json(source)
    for key in ("images", "annotations", "categories"):
        rows = content.get(key) if isinstance(content, dict) else None
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ValueError(f'{source}: no list of "{key}" in COCO\'s layout; is it the original file?')
    if missing := {*annotated, *(listed or ())} - {c.get("id") for c in content["categories"]}:
        raise ValueError(f"{source}: no categories {sorted(missing)}; is it the original file?")
    annotations = [a for a in content["annotations"] if a.get("category_id") in annotated]
    used = {a.get("image_id") for a in annotations}
    images = [i for i in content["images"] if all_images or i.get("id") in used]
    categories = [c for c in content["categories"] if listed is None or c.get("id") in listed]
    write_text(
        target, json.dumps(content | {"images": images, "annotations": annotations, "categories": categories})
    )
    return len(images), len(annotations)
