"""Run-length encodings are measured as pycocotools writes them."""

import numpy as np
import pycocotools.mask
import pytest

from clipdense.data.validation import rle_fault, rle_length


@pytest.mark.parametrize("seed", range(20))
def test_length_of_compressed_text_is_the_number_of_pixels(seed):
    rng = np.random.default_rng(seed)
    height, width = (int(side) for side in rng.integers(1, 300, 2))
    mask = np.asfortranarray((rng.random((height, width)) < rng.random()).astype(np.uint8))
    counts = pycocotools.mask.encode(mask)["counts"]
    assert rle_length(counts) == height * width
    assert rle_fault({"size": [height, width], "counts": counts.decode()}, height, width) is None


def test_long_runs():
    mask = np.zeros((4000, 5000), np.uint8, order="F")
    mask[100:, 4000:] = 1
    assert rle_length(pycocotools.mask.encode(mask)["counts"]) == 20_000_000


@pytest.mark.parametrize("text", ["o", "aa\x01", "PPPPPPPPPPP0"])
def test_damaged_text_is_refused(text):
    with pytest.raises(ValueError, match="run-length encoding"):
        rle_length(text)


def test_text_that_is_cut_short_covers_too_little():
    counts = pycocotools.mask.encode(np.eye(50, dtype=np.uint8, order="F"))["counts"].decode()
    fault = rle_fault({"size": [50, 50], "counts": counts[:-3]}, 50, 50)
    assert fault is not None
    assert "add up to" in fault or "cut short" in fault
