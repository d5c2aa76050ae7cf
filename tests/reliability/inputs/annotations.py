"""Damaged LVIS, panoptic and caption files, image lists, shards, mask pairs, proposals and label maps."""

import io
import itertools
import json
import pickle
import random
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tests.reliability.mutations import damage_bytes, damage_json
from tests.reliability.outcomes import Case, WrongResultError
from tests.reliability.world import CONFIG, World

Damage = Callable[[random.Random], tuple[str, bytes]]
Use = Callable[[World, Path], object]


def cases(world: World, seed: int) -> Iterator[Case]:
    """Yield damaged files of each format in turn, without end."""
    rng, folder = random.Random(seed), world.folder / "annotations"
    folder.mkdir(exist_ok=True)
    formats = _formats(world)
    for i in itertools.count():
        name, (extension, damage, use) = list(formats.items())[i % len(formats)]
        kind, data = damage(rng)
        path = folder / f"{i:04d}_{name}_{kind.replace(' ', '')}{extension}"
        path.write_bytes(data)
        names = (path.name, str(world.shapes4 / "val"), "/etc/passwd", str(world.lvis8))
        yield Case(path.stem, lambda use=use, path=path: use(world, path), names)


def _formats(world: World) -> dict[str, tuple[str, Damage, Use]]:
    """Return name of the format -> (extension, damage to a whole file, use of a file)."""

    def read(path: Path) -> Any:
        return json.loads(path.read_text())

    own = world.shapes4 / "annotations"
    instances = read(own / "instances_closed_val_4.json")
    names = {image["id"]: image["file_name"] for image in instances["images"]}
    proposals = [{key: a[key] for key in ("image_id", "segmentation")} for a in instances["annotations"]]
    pairs = [
        {
            "file_name": names[a["image_id"]],
            "height": 256,
            "width": 256,
            "noun": f"thing {k}",
            "segmentation": a["segmentation"],
        }
        for k, a in enumerate(instances["annotations"])
    ]
    captions = [
        {"file_name": "000000.png", "captions": ["a red star"]},
        {"file_name": "000001.png", "captions": ["a"]},
    ]
    labels = (world.shapes4 / "panoptic_val/000000.png").read_bytes()
    objects = pickle.dumps({"objectnames": ["a", "b"], "filename": ["x"], "obj": np.arange(3)}, protocol=2)
    return {
        "lvis": (".json", _json(read(world.lvis8 / "annotations/lvis_lvis_val_8.json")), _lvis),
        "panoptic": (".json", _json(read(own / "panoptic_closed_val_4.json")), _panoptic),
        "captions": (".json", _json(read(own / "captions_val_4.json")), _captions),
        "caption_lines": (".jsonl", _lines(captions), _captions),
        "image_list": (".json", _json(instances), _image_list),
        "shards": (".tar", _bytes(_archive(world)), _shards),
        "pairs": (".jsonl", _lines(pairs), _pairs),
        "proposals": (".json", _json(proposals), _proposals),
        "labels": (".png", _bytes(labels), _labels),
        "object_names": (".pkl", _bytes(objects), _object_names),
        "matlab": (".mat", _bytes(_matlab()), _matlab_labels),
    }


def _json(content: Any) -> Damage:
    return lambda rng: damage_json(content, rng)


def _bytes(data: bytes) -> Damage:
    return lambda rng: damage_bytes(data, rng)


def _lines(rows: list[dict[str, Any]]) -> Damage:
    def damage(rng: random.Random) -> tuple[str, bytes]:
        kind, data = damage_json(rows, rng)
        if kind != "edit":
            return damage_bytes("\n".join(map(json.dumps, rows)).encode(), rng)
        return kind, "\n".join(map(json.dumps, json.loads(data))).encode()

    return damage


def _archive(world: World) -> bytes:
    """Return a tar archive with images, one text file, paths that lead elsewhere and a link."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for i, name in enumerate(("a.png", "../../../b.png", "/abs/c.png", "d.jpg", "e/f.png", "g.txt")):
            data = (world.shapes4 / f"val/{i % 4:06d}.png").read_bytes()
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    return file.getvalue()


def _matlab() -> bytes:
    import scipy.io

    file = io.BytesIO()
    scipy.io.savemat(file, {"LabelMap": np.arange(12).reshape(3, 4)})
    return file.getvalue()


def _map_all(records: list[dict[str, Any]]) -> str:
    """Send records through the mapper, as training would."""
    from clipdense.data.mappers import DetectionMapper
    from clipdense.run.setup import load_config

    mapper, count = DetectionMapper(load_config(CONFIG), True), 0
    for record in records:
        instances = mapper(record).get("instances")
        if instances is None or not len(instances):
            continue
        count += len(instances)
        if not instances.gt_boxes.tensor.isfinite().all():
            raise WrongResultError("a box is not finite")
        if int(instances.gt_classes.min()) < 0:
            raise WrongResultError(f"class {instances.gt_classes.min()}")
    return f"{len(records)} images, {count} objects"


def _lvis(world: World, path: Path) -> str:
    from clipdense.data.datasets.layouts import load_lvis

    return _map_all(load_lvis(str(path), str(world.lvis8)))


def _panoptic(world: World, path: Path) -> str:
    from clipdense.data.datasets.layouts import load_panoptic

    root, ids = world.shapes4, {i + 1: i for i in range(88)}
    maps = root / "panoptic_val", ids, set(range(80)), root / "semantic_val"
    return _map_all(load_panoptic(str(path), root / "val", *maps))


def _captions(world: World, path: Path) -> int:
    from clipdense.data.captions import captioned_images
    from clipdense.data.image import read_image

    records = captioned_images(str(path), str(world.shapes4 / "val"), captions=2)
    for record in records:
        read_image(record["file_name"])
        if not all(isinstance(caption, str) for caption in record["captions"]):
            raise WrongResultError(f"captions {record['captions']}")
    return len(records)


def _image_list(world: World, path: Path) -> int:
    return _read_registered(str(path), str(world.shapes4 / "val"))


def _shards(world: World, path: Path) -> int:
    return _read_registered(str(path), "")


def _read_registered(source: str, image_root: str) -> int:
    from clipdense.data.datasets.images import register_images
    from clipdense.data.image import read_image

    from detectron2.data import DatasetCatalog

    register_images(f"damaged {source}", source, image_root)
    records = DatasetCatalog.get(f"damaged {source}")
    for record in records:
        read_image(record["file_name"])
    return len(records)


def _pairs(world: World, path: Path) -> int:
    from clipdense.data.mask_pairs import pair_mask, read_pairs

    records = read_pairs(path)
    for record in records:
        mask = pair_mask(record)
        if mask.shape != (record["height"], record["width"]):
            raise WrongResultError(f"mask {mask.shape} of image {record['height']} x {record['width']}")
        if (pair_mask(record) != mask).any():
            raise WrongResultError("the mask is not the same twice: uninitialised memory")
    return len(records)


def _proposals(world: World, path: Path) -> int:
    from clipdense.data.proposals import FileProposals

    proposals, count = FileProposals(str(path)), 0
    for i in range(4):
        image = world.shapes4 / f"val/{i:06d}.png"
        sample = {"image_id": i, "file_name": str(image), "height": 256, "width": 256}
        masks = proposals.propose_masks(sample)
        count += len(masks)
        if (proposals.propose_masks(sample) != masks).any():
            raise WrongResultError("a mask is not the same twice: uninitialised memory")
    return count


def _labels(world: World, path: Path) -> str:
    from clipdense.data.image import read_labels

    labels = read_labels(path)
    if labels.min() < 0:
        raise WrongResultError(f"label {labels.min()}")
    return f"{labels.shape}"


def _object_names(world: World, path: Path) -> int:
    from clipdense.data.preparation.ade20k import read_object_names

    return len(read_object_names(path))


def _matlab_labels(world: World, path: Path) -> str:
    from clipdense.data.preparation.labels import read_matlab_labels

    return f"{read_matlab_labels(path).shape}"
