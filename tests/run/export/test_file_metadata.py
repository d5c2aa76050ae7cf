"""Metadata of exported files: what they may set, and what they may not."""

import json
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from clipdense.run.export.file_metadata import FileMetadata, FileMetadataError, read_pt2_metadata

METADATA = FileMetadata(
    system="FCCLIP",
    task="masks",
    clipdense="0.1.0",
    opset=18,
    channels="BGR",
    pixel_mean=(1.0, 2.0, 3.0),
    pixel_std=(4.0, 5.0, 6.0),
    classes=("red star", "日"),
    things=(0,),
    text="names",
)


def changed(**values: object) -> str:
    return json.dumps(json.loads(METADATA.to_json()) | values)


def test_metadata_come_back_as_they_were() -> None:
    assert FileMetadata.from_json(METADATA.to_json()) == METADATA


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"allow_pickle": True}, "may not set 'allow_pickle'"),
        ({"format": 2}, "format 2, expected 1: export the model again"),
        ({"task": "shell"}, "'task' must be one of semantic, masks, boxes"),
        ({"text": "pickle"}, "'text' must be one of names"),
        ({"opset": "18"}, "'opset' must be of type int"),
        ({"dynamic_batch": 1}, "'dynamic_batch' must be of type bool"),
        ({"opset": True}, "'opset' must be of type int"),
        ({"logit_scale": float("nan")}, "'logit_scale' must be finite"),
        ({"pixel_mean": [1.0]}, "must have 3 entries"),
        ({"pixel_std": [0.0, 1.0, 1.0]}, "pixel_std > 0"),
        ({"classes": "red"}, "'classes' must be a list"),
        ({"things": [0.5]}, "'things' must be of type int"),
        ({"shortest": 10**9}, "'shortest' must be in 0..16384"),
        ({"window": 64, "window_stride": 0}, "window_stride must be in 1..window"),
        ({"fixed_size": [64]}, "fixed_size must be a height and a width"),
    ],
)
def test_what_a_file_may_not_set_is_an_error(values: dict[str, object], message: str) -> None:
    with pytest.raises(FileMetadataError, match="^photo.onnx: .*" + message):
        FileMetadata.from_json(changed(**values), "photo.onnx")


@pytest.mark.parametrize("text", ["", "[1]", "{", "[" * 100_000, '{"format": 1}', " " * (2**24 + 1)])
def test_damaged_metadata_are_one_error(text: str) -> None:
    with pytest.raises(FileMetadataError, match="^model.onnx"):
        FileMetadata.from_json(text, "model.onnx")


def test_metadata_of_a_pt2_file_are_read_without_the_program(tmp_path: Path) -> None:
    path = tmp_path / "a.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/extra/clipdense.json", replace(METADATA, opset=0).to_json())
        archive.writestr("a/data.pkl", b"not a pickle")
    assert read_pt2_metadata(path) == replace(METADATA, opset=0)
    path.write_bytes(b"PK")
    with pytest.raises(FileMetadataError, match="not an exported file"):
        read_pt2_metadata(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/version", "1")
    with pytest.raises(FileMetadataError, match="clipdense export"):
        read_pt2_metadata(path)
    with pytest.raises(FileNotFoundError):
        read_pt2_metadata(tmp_path / "none.pt2")
