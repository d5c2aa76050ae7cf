"""Conversion of semantic and panoptic label maps."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image
from tqdm import tqdm

from clipdense.data.image import read_labels
from clipdense.data.json_files import load_json
from clipdense.data.preparation.files import map_in_threads, save_image
from clipdense.data.preparation.matlab import read_matrix

__all__ = ["convert_labels", "panoptic_to_semantic", "read_matlab_labels"]

Labels = npt.NDArray[np.int64]


def convert_labels(
    source: Path,
    target: Path,
    convert: Callable[[Labels], Labels],
    names: Sequence[str] | None = None,
    *,
    suffix: str = ".png",
    read: Callable[[Path], Labels] = read_labels,
    wide: bool = False,
) -> int:
    """Convert every label map of a folder, in several threads.

    Args:
        source: folder of the original label maps.
        target: folder to write.
        convert: maps labels (H, W) to labels (H, W) in 0 to 255, or 0 to 65535 if ``wide``.
        names: file stems to convert (default: all files).
        suffix: of the source files.
        read: reads labels (H, W) from a source file.
        wide: write 16-bit .tif instead of 8-bit .png files.

    Returns:
        The number of files that this call has converted.

    Raises:
        FileNotFoundError: If the folder has no label maps, or a listed one is missing.
        ValueError: If a label is not in the table ``convert``.
    """
    paths = sorted(source.glob(f"*{suffix}")) if names is None else [source / f"{n}{suffix}" for n in names]
    if not paths:
        raise FileNotFoundError(f"no label maps (*{suffix}) in {source}")
    target.mkdir(parents=True, exist_ok=True)
    target_suffix, dtype = (".tif", np.uint16) if wide else (".png", np.uint8)
    jobs = {path: target / f"{path.stem}{target_suffix}" for path in paths}
    jobs = {path: output for path, output in jobs.items() if not output.is_file()}

    def run(path: Path) -> None:
        try:
            labels = convert(read(path))
        except IndexError as error:
            raise ValueError(f"{path}: unknown label ({error})") from error
        save_image(Image.fromarray(labels.astype(dtype)), jobs[path])

    return map_in_threads(run, list(jobs), str(target))


def panoptic_to_semantic(panoptic_json: Path, panoptic_root: Path, target: Path) -> int:
    """Write semantic label maps of COCO panoptic annotations: classes in order of category id, from 0; 255
    for pixels without a segment.

    Args:
        panoptic_json: annotations.
        panoptic_root: folder of the panoptic PNGs.
        target: folder to write.

    Returns:
        The number of files that this call has written.

    Raises:
        FileNotFoundError: If the JSON file or a panoptic PNG is missing.
        ValueError: If there are more than 255 classes.
    """
    content = load_json(panoptic_json)
    ids = {k: i for i, k in enumerate(sorted(c["id"] for c in content["categories"]))}
    if len(ids) > 255:
        raise ValueError(f"{panoptic_json}: {len(ids)} classes do not fit into 8-bit label maps")
    segments = {
        Path(a["file_name"]).stem: {s["id"]: ids[s["category_id"]] for s in a["segments_info"]}
        for a in content["annotations"]
    }
    num_written = 0
    target.mkdir(parents=True, exist_ok=True)
    for stem, classes in tqdm(segments.items(), desc=str(target), unit="file"):
        path = target / f"{stem}.png"
        if not path.is_file():
            labels = read_labels(panoptic_root / path.name)
            values, where = np.unique(labels, return_inverse=True)
            table = np.array([classes.get(int(v), 255) for v in values], np.uint8)
            save_image(Image.fromarray(table[where].reshape(labels.shape)), path)
            num_written += 1
    return num_written


def read_matlab_labels(path: Path) -> Labels:
    """Read ``LabelMap`` (H, W) from a MATLAB file of PASCAL-Context.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If it is not a MATLAB file, or has no ``LabelMap``.
    """
    return read_matrix(path, "LabelMap").astype(np.int64)
