"""How often the host waits for the device for each image: a bound for each system, whatever there is in it.

A GPU computes while Python goes on, until Python asks for a value. A question in a loop over masks, classes
or levels makes the GPU idle. The counts below are exact, also without a GPU (`HostReads`).
"""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from clipdense.regions.crops import MaskCrops
from tests.helpers.host_reads import HostReads
from tests.helpers.nano_models import nano_model as model
from tests.helpers.nano_models import noise_image as image

Batch = list[dict[str, Any]]

# Detectron2's own code: it selects the proposals of the RPN and pastes masks with several reads an image, and
# computes the size of a batch on the host.
DETECTRON2 = ("find_top_rpn_proposals", "paste_masks_in_image", "detector_postprocess", "from_tensors")
# What `panoptic_inference` decides on the host, on one copy of its numbers.
ON_HOST = ("_segments",)


def reads(run: Callable[[], object]) -> HostReads:
    """Count the reads of the second run; the first one fills caches."""
    run()
    with HostReads(*DETECTRON2, *ON_HOST) as found:
        run()
    return found


def predict(built: Any, batch: Batch) -> Callable[[], object]:
    @torch.no_grad()
    def run() -> object:
        return built(batch)

    return run


def check(found: HostReads, images: int, bound: int) -> None:
    assert found.total <= images * bound, dict(found.places)


def test_ovseg(monkeypatch: pytest.MonkeyPatch) -> None:
    """6: which masks have a crop (3), and which of them are equal (3). Both decide what CLIP has to do."""
    monkeypatch.setattr(MaskCrops, "_bicubic_each", MaskCrops._bicubic_batched)  # as on a GPU
    keys = ["MODEL.MASK_FORMER.TEST.PANOPTIC_ON", False, "MODEL.MASK_FORMER.TEST.INSTANCE_ON", False]
    for masks in (4, 12):
        built = model("ovseg", 6, *keys, "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES", masks)
        check(reads(predict(built, [image(64, 96)])), 1, 6)
    check(reads(predict(built, [image(64, 96), image(64, 64)])), 2, 6)


def test_fcclip() -> None:
    """2 for panoptic segments: which queries are kept, and the numbers that decide on segments."""
    for classes in (4, 12):
        built = model("fcclip_rn", classes, "MODEL.MASK_FORMER.TEST.OBJECT_MASK_THRESHOLD", 0.0)
        built.select_outputs(["panoptic"])
        found = reads(predict(built, [image(64, 96)]))
        check(found, 1, 2)
    check(reads(predict(built, [image(64, 96), image(64, 64)])), 2, 2)


def test_catseg() -> None:
    """None."""
    for classes in (4, 12):
        check(reads(predict(model("catseg_vit", classes), [image(64, 96)])), 1, 0)


def test_catseg_training() -> None:
    """3: labels are checked for their range; and the length of the texts. Both are on the host."""
    built = model("catseg_vit", 0).train()
    batch = [{**image(64, 96), "sem_seg": torch.randint(0, 3, (64, 96))} for _ in range(2)]
    found = reads(lambda: sum(built(batch).values()).backward())
    texts = [number for place, number in found.places.items() if not place.endswith("_labels")]
    assert sum(texts) <= 1 and found.total - sum(texts) <= 2 * 3, dict(found.places)


def test_fvlm() -> None:
    """5: numbers of boxes by pyramid level, for boxes and for masks; candidates of NMS; its result (2)."""
    for classes in (4, 12):
        built = model("fvlm_vit", classes, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0)
        check(reads(predict(built, [image(64, 96)])), 1, 5)
    check(reads(predict(built, [image(64, 96), image(64, 64)])), 2, 5)


def clipself_batch(built: Any, images: int, crops: int) -> Batch:
    side = built.student.image_size[0]
    boxes = torch.tensor([[0.0, 0.0, 0.5, 0.5], [0.2, 0.2, 0.8, 1.0], [0.0, 0.0, 1.0, 1.0]])[:crops]
    pixels = torch.randint(0, 256, (crops, 3, side, side), dtype=torch.uint8)
    return [{"image": image(64, 64)["image"], "crops": pixels, "boxes": boxes} for _ in range(images)]


def test_clipself_step() -> None:
    """None, forward and backward."""
    built = model("clipself_vit_patches", 0).train()
    for images, crops in ((1, 2), (2, 3)):
        batch = clipself_batch(built, images, crops)
        check(reads(lambda batch=batch: sum(built(batch).values()).backward()), images, 0)


def test_the_counter_counts() -> None:
    x = torch.tensor([1.0, 0.0, 2.0])

    def count(run: Callable[[], object]) -> dict[str, int]:
        with HostReads() as found:
            run()
        return {re.split(" ", place)[0]: number for place, number in found.places.items()}

    assert count(lambda: [float(v) for v in x]) == {"_local_scalar_dense": 3}
    assert count(lambda: bool(x.sum() > 0)) == {"_local_scalar_dense": 1}
    assert count(lambda: (x.cpu(), x.tolist(), x.numpy())) == {"cpu": 1, "tolist": 1, "numpy": 1}
    assert count(lambda: x[x > 0]) == {"index": 1} and count(lambda: x[[0, 1]]) == {}
    assert count(lambda: (x > 0).nonzero()) == {"nonzero": 1}
    assert count(lambda: x.unique()) == {"_unique2": 1}
    assert count(lambda: x.repeat_interleave(2)) == {} == count(lambda: (x * 2).relu().sum(0, keepdim=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_no_hidden_wait_on_a_gpu() -> None:
    """CLIPSelf's step and CAT-Seg's inference never wait, as CUDA itself sees it."""
    clipself = model("clipself_vit_patches", 0).train().cuda()
    catseg = model("catseg_vit").cuda()
    pixels = [{**sample, "image": sample["image"].cuda()} for sample in [image(64, 96)]]
    batch = [{k: v.cuda() for k, v in sample.items()} for sample in clipself_batch(clipself, 2, 3)]
    runs = [lambda: sum(clipself(batch).values()).backward(), predict(catseg, pixels)]
    for run in runs:
        run()  # fills caches
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
