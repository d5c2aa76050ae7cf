"""Masks from annotations, JSON files and PNG folders as one source of proposals."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clipdense.data.proposals import FileProposals, FolderProposals, build_mask_source
from clipdense.data.validation import DataError
from clipdense.open_vocabulary import Proposals

from detectron2.data import DatasetCatalog

SAMPLE = {"file_name": "images/a.jpg", "image_id": 1, "height": 2, "width": 3}
LABELS = np.array([[0, 1, 1], [2, 2, 0]], np.uint8)


def save(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def test_a_map_holds_segments_without_overlap(tmp_path):
    save(tmp_path / "a.png", LABELS)
    masks = FolderProposals(tmp_path).propose_masks(SAMPLE)
    assert torch.equal(masks, torch.from_numpy(np.stack([LABELS == 1, LABELS == 2])))
    assert FolderProposals(tmp_path).propose_masks(SAMPLE | {"file_name": "b.jpg"}).shape == (0, 2, 3)


def test_panoptic_ids_are_colours(tmp_path):
    colours = np.zeros((2, 3, 3), np.uint8)
    colours[0, :, 1] = 1  # id 256
    save(tmp_path / "a.png", colours)
    assert torch.equal(FolderProposals(tmp_path).propose_masks(SAMPLE)[0].any(1), torch.tensor([True, False]))


def test_a_folder_holds_masks_that_may_overlap(tmp_path):
    save(tmp_path / "a" / "0.png", np.where(LABELS > 0, 255, 0).astype(np.uint8))
    save(tmp_path / "a" / "1.png", np.where(LABELS == 1, 255, 0).astype(np.uint8))
    masks = FolderProposals(tmp_path).propose_masks(SAMPLE)
    assert torch.equal(masks, torch.from_numpy(np.stack([LABELS > 0, LABELS == 1])))


def test_another_size_is_an_error(tmp_path):
    save(tmp_path / "a.png", LABELS.T.copy())
    with pytest.raises(DataError, match=r"a\.png has 3 x 2 pixels, but its image has 2 x 3"):
        FolderProposals(tmp_path).propose_masks(SAMPLE)


def test_the_config_names_the_source(tmp_path):
    assert build_mask_source("network", []) is None
    assert isinstance(build_mask_source(str(tmp_path), []), FolderProposals)
    (tmp_path / "masks.json").write_text(
        '[{"image_id": 1, "segmentation": {"size": [2, 3], "counts": [0, 1, 5]}}]'
    )
    source = build_mask_source(str(tmp_path / "masks.json"), [])
    assert isinstance(source, FileProposals) and isinstance(source, Proposals)
    assert source.propose_masks(SAMPLE).sum() == 1
    with pytest.raises(ValueError, match="ground_truth needs DATASETS.TEST"):
        build_mask_source("ground_truth", [])
    with pytest.raises(FileNotFoundError):
        build_mask_source(str(tmp_path / "none"), [])


def test_annotations_are_a_source(tmp_path, catalogs):
    save(tmp_path / "labels.png", LABELS)
    record = SAMPLE | {"sem_seg_file_name": str(tmp_path / "labels.png")}
    DatasetCatalog.register("proposals_test", lambda: [record])
    source = build_mask_source("ground_truth", ["proposals_test"], ignore_label=0)
    expected = torch.from_numpy(np.stack([LABELS == 1, LABELS == 2]))
    assert torch.equal(source.propose_masks(SAMPLE), expected)
