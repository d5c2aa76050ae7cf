"""Datasets of images without annotations: a folder, a JSON list, or webdataset shards."""

import io
import os
import tarfile
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import IO, Any

from iopath.common.file_io import PathHandler
from tqdm import tqdm

from clipdense.data.datasets.layouts import DatasetDicts
from clipdense.data.datasets.registration import register_once
from clipdense.data.json_files import load_json
from clipdense.data.validation.report import DataError

from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

__all__ = ["ShardHandler", "register_images"]

EXTENSIONS = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


def register_images(name: str, source: str, image_root: str = "") -> None:
    """Register images as a dataset of records with ``file_name`` and ``image_id``.

    Shards are not streamed. Their headers are read once; each image is then read from its place in an
    uncompressed, local tar file. They are therefore shuffled as a whole, distributed among processes, and
    resumed like any other dataset.

    Args:
        name: of the dataset.
        source: one of three. A folder, searched with all its subfolders. A JSON file with the list ``images``
            of COCO's format (``id``, ``file_name``); its other entries are ignored. Tar files of the
            webdataset library, with braces for several of them (``shards/{000..331}.tar``).
        image_root: folder of the images of a JSON list.

    Raises:
        FileNotFoundError: If the folder, the file or a shard does not exist.
        ValueError: If the name is in use, or a JSON list has no image folder.
    """
    if source.endswith(".tar"):
        from webdataset.shardlists import expand_urls  # slow to import, and only shards need it

        paths = expand_urls(source)
        load = partial(_load_shards, paths)
    elif source.endswith(".json"):
        if not image_root:
            raise ValueError(
                f"dataset {name}: {source} needs the folder of its images: write {name}:{source}:image_folder"
            )
        paths = [source, image_root]
        load = partial(_load_list, source, image_root)
    else:
        paths = [source]
        load = partial(_load_folder, source)
    for path in paths:
        if not os.path.exists(path):
            raise FileNotFoundError(f"images of dataset {name}: {path} does not exist")
    register_once(name, load, {"images": ":".join(filter(None, (source, image_root)))})


def _load_folder(folder: str) -> DatasetDicts:
    files = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in EXTENSIONS)
    return _records(map(str, files), folder)


def _load_list(json_file: str, image_root: str) -> DatasetDicts:
    content = load_json(json_file)
    images = content.get("images") if isinstance(content, dict) else None
    if not isinstance(images, list):
        raise DataError(f'{json_file}: no list of images; expected an object with "images", as in COCO files')
    records: dict[int | str, dict[str, Any]] = {}
    for index, image in enumerate(images):
        entry = image if isinstance(image, dict) else {}
        identity, name = entry.get("id"), entry.get("file_name")
        if isinstance(identity, bool) or not isinstance(identity, int | str) or not isinstance(name, str):
            raise DataError(f"{json_file}: images[{index}] has no id and file_name: {str(image)[:60]}")
        if identity in records:
            raise DataError(
                f"{json_file}: two images with id {identity!r}: {records[identity]['file_name']} and {name}; "
                "give each an id of its own"
            )
        records[identity] = {"file_name": os.path.join(image_root, name), "image_id": identity}
    if not records:
        raise DataError(f"no images in {json_file}")
    return list(records.values())


def _load_shards(shards: list[str]) -> DatasetDicts:
    names: list[str] = []
    bar = tqdm(shards, "Reading headers", unit="shard", disable=None if comm.is_main_process() else True)
    for shard in bar:
        try:
            with tarfile.open(shard, "r:") as file:
                names += [
                    f"{ShardHandler.PREFIX}{shard}?{member.offset_data}+{member.size}#{member.name}"
                    for member in file
                    if member.isfile() and member.name.lower().endswith(EXTENSIONS)
                ]
        except (tarfile.TarError, OSError, EOFError) as error:
            raise ValueError(f"{shard}: not an uncompressed tar file ({error})") from error
    return _records(names, ", ".join(shards))


def _records(names: Iterable[str], source: str) -> DatasetDicts:
    records = [{"file_name": name, "image_id": i} for i, name in enumerate(names)]
    if not records:
        raise ValueError(f"no images ({', '.join(EXTENSIONS)}) in {source}")
    return records


class ShardHandler(PathHandler):
    """Path handler for files inside uncompressed tar files: ``shard://TAR?OFFSET+SIZE#NAME``."""

    PREFIX = "shard://"

    def _get_supported_prefixes(self) -> list[str]:
        return [self.PREFIX]

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs: Any) -> IO[Any]:
        shard, _, place = path.removeprefix(self.PREFIX).partition("#")[0].rpartition("?")
        offset, size = map(int, place.split("+"))
        with open(shard, "rb") as file:
            file.seek(offset)
            return io.BytesIO(file.read(size))


PathManager.register_handler(ShardHandler())
