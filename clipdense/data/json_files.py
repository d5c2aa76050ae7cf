"""Reader of JSON files."""

import json
from pathlib import Path
from typing import Any

from detectron2.utils.file_io import PathManager

__all__ = ["load_json"]


def load_json(path: str | Path) -> Any:
    """Read a JSON file in UTF-8, with or without a byte order mark.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file is not JSON, or nested too deeply; names it.
    """
    with PathManager.open(str(path), "r", encoding="utf-8-sig") as file:
        try:
            return json.load(file)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: not a JSON file ({error})") from error
