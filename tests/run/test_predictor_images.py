"""`Predictor` on images of every kind, one by one and in batches."""

import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from clipdense.data.image import BadImageError, array_to_image, image_to_array, load_image
from clipdense.run.memory import available_memory, is_out_of_memory, within_memory
from clipdense.run.predictor import Predictor
from tests.helpers.bright_box import CLASSES, check_box, scene, write_model

ORIENTATIONS = range(1, 9)


def test_paths_arrays_and_pil_images_are_the_same(predictor: Predictor, tmp_path: Path) -> None:
    Image.fromarray(scene()).save(tmp_path / "a.png")
    outputs = [
        predictor(image)
        for image in (
            tmp_path / "a.png",
            str(tmp_path / "a.png"),
            scene(),
            Image.fromarray(scene()),
            Image.open(tmp_path / "a.png"),  # not decoded yet
        )
    ]
    check_box(outputs[0])
    for output in outputs[1:]:
        assert torch.equal(output["instances"].pred_boxes.tensor, outputs[0]["instances"].pred_boxes.tensor)
        assert torch.equal(output["instances"].scores, outputs[0]["instances"].scores)


@pytest.mark.parametrize("color", [0, 1, 2])
@pytest.mark.parametrize("channels", ["RGB", "BGR"])
def test_channel_order(config: Path, color: int, channels: str) -> None:
    """The model sees what INPUT.FORMAT says; an image is RGB always."""
    output = Predictor(config, opts=("INPUT.FORMAT", channels))(
        scene(tuple(220 * np.eye(3, dtype=int)[color]))
    )
    check_box(output, color if channels == "RGB" else 2 - color)


def arrays() -> dict[str, np.ndarray]:
    rgb, grey = scene(), scene()[..., 2]
    return {
        "uint8": rgb,
        "not contiguous": np.ascontiguousarray(rgb[..., ::-1])[..., ::-1],
        "grey": grey,
        "grey with an axis": grey[..., None],
        "RGBA": np.dstack([rgb, np.full_like(grey, 255)]),
        "uint16": rgb.astype(np.uint16) * 257,
        "grey uint16": grey.astype(np.uint16) * 257,
        "bool": grey > 0,
        "float": rgb / 255,
        "float32 to 255": rgb.astype(np.float32),
    }


@pytest.mark.parametrize("kind", arrays())
def test_arrays_of_every_kind(predictor: Predictor, kind: str) -> None:
    array = arrays()[kind]
    before = array.copy()
    colored = array.ndim == 3 and array.shape[2] > 1
    check_box(predictor(array), 2 if colored else 0)  # grey: all channels are equal, the first wins
    assert np.array_equal(array, before)
    grey = np.repeat(scene()[..., 2:], 3, -1)
    expected = scene() if colored else np.where(grey, 255, 0) if array.dtype == bool else grey
    assert np.array_equal(load_image(array), expected)


def test_transparency_is_white() -> None:
    rgba = np.dstack([scene(), np.full((60, 80), 255, np.uint8)])
    rgba[:5, :, 3] = 0
    assert (load_image(rgba)[:5] == 255).all() and np.array_equal(load_image(rgba)[5:], scene()[5:])


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 4, 2), np.uint8),
        np.zeros((1, 4, 4, 3), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros((3, 40, 50), np.uint8),
        np.zeros((4, 4), np.int64),
        np.full((4, 4), np.nan),
        np.full((4, 4), -0.5),
    ],
)
def test_arrays_that_are_no_images(predictor: Predictor, array: np.ndarray) -> None:
    with pytest.raises(ValueError, match="an image array"):
        predictor(array)


COLORED = ["P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "RGBX", "RGBa"]


@pytest.mark.parametrize("mode", [*COLORED, "1", "L", "LA", "La", "PA", "I", "I;16", "F"])
def test_pil_images_of_every_mode(predictor: Predictor, mode: str) -> None:
    grey = Image.fromarray(scene()[..., 2])
    if mode in COLORED:
        image = Image.fromarray(scene()).convert("RGBA" if mode == "RGBa" else "RGB").convert(mode)
    elif mode in ("I", "I;16", "F"):
        kind, factor = {"I": ("i4", 257), "I;16": ("u2", 257), "F": ("f4", 1)}[mode]
        image = Image.fromarray(np.asarray(grey).astype(kind) * factor)
    else:
        image = grey.convert("LA" if mode in ("La", "PA") else "L").convert(mode)
    assert image.mode == mode
    check_box(predictor(image), 2 if mode in COLORED else 0)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_exif_gives_upright_coordinates(predictor: Predictor, tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    path = tmp_path / "turned.jpg"
    # as a camera stores it: what shows the scene upright once the tag is applied
    turns = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
    stored = Image.fromarray(scene())
    if orientation > 1:
        stored = stored.transpose(Image.Transpose(turns[orientation]))
    stored.save(path, exif=exif, quality=95)
    check_box(predictor(path))
    with Image.open(path) as image:
        check_box(predictor(image))
    # an array has no tag: it is taken as it lies
    size = predictor(np.asarray(stored))["instances"].image_size
    assert size == ((80, 60) if orientation > 4 else (60, 80))


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 2), (500, 40)])
def test_odd_sizes(predictor: Predictor, size: tuple[int, int]) -> None:
    assert predictor(np.full((*size, 3), 250, np.uint8))["instances"].image_size == size


def test_conversions_are_the_files_ones(tmp_path: Path) -> None:
    """An array, and a file that holds it, are the same image."""
    for kind, array in arrays().items():
        if array.dtype in (np.uint8, bool) or kind == "grey uint16":
            array_to_image(array).save(tmp_path / "a.png")
            assert np.array_equal(load_image(tmp_path / "a.png"), load_image(array)), kind
    assert np.array_equal(image_to_array(array_to_image(scene())), scene())


def test_batches_keep_order_and_go_on_after_bad_images(predictor: Predictor, tmp_path: Path) -> None:
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    images: list[Any] = [
        scene(),
        tmp_path / "bad.jpg",
        scene((220, 0, 0)),
        np.zeros(3),
        tmp_path / "none.png",
    ]
    images += [scene((0, 220, 0))]
    for size in (1, 2, 4, 9):
        outputs = list(predictor.batch(images, batch_size=size))
        assert [type(o) for o in outputs] == [dict, BadImageError, dict, ValueError, FileNotFoundError, dict]
        assert [o["instances"].pred_classes.tolist() for o in outputs[::2] if isinstance(o, dict)] == [
            [2],
            [0],
        ]
        check_box(outputs[5], 1)
        assert "bad.jpg" in str(outputs[1]) and "none.png" in str(outputs[4])
    first = next(iter(predictor.batch(image for image in images)))  # of any length; nothing is read ahead
    check_box(first)
    assert list(predictor.batch([])) == []
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        list(predictor.batch(images, batch_size=0))


def test_the_largest_image_is_that_of_the_config(config: Path, tmp_path: Path) -> None:
    Image.fromarray(scene()).save(tmp_path / "a.png")
    pixels = scene().shape[0] * scene().shape[1]
    Predictor(config, opts=["INPUT.MAX_PIXELS", pixels])(tmp_path / "a.png")
    with pytest.raises(BadImageError, match=r"a\.png: .* raise INPUT\.MAX_PIXELS"):
        Predictor(config, opts=["INPUT.MAX_PIXELS", pixels - 1])(tmp_path / "a.png")


def test_one_bad_image_raises(predictor: Predictor, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="none.png"):
        predictor(tmp_path / "none.png")


def test_score_threshold(config: Path) -> None:
    dim, bright = scene((0, 0, 150)), scene((0, 0, 250))
    for threshold, found in ((None, 1), (0.5, 1), (0.9, 0)):
        predictor = Predictor(config, score_threshold=threshold)
        assert len(predictor(dim)["instances"]) == found and len(predictor(bright)["instances"]) == 1


def test_a_batch_that_does_not_fit_is_predicted_in_pieces(
    predictor: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One by one; an image that does not fit alone is an error, and the others are done."""
    forward, sizes = predictor.model.forward, []

    def limited(samples: list[dict]) -> object:
        sizes.append(len(samples))
        if len(samples) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        if int(samples[0]["image"].max()) == 60:
            raise RuntimeError("[enforce fail] . DefaultCPUAllocator: can't allocate memory")
        return forward(samples)

    monkeypatch.setattr(predictor.model, "forward", limited)
    images = [np.full((40, 50, 3), value, np.uint8) for value in (40, 60, 50)]
    first, failed, last = predictor.batch(images, batch_size=3)
    assert first["instances"].image_size == (40, 50) == last["instances"].image_size
    assert isinstance(failed, MemoryError) and "40 x 50 pixels" in str(failed)
    assert sizes == [3, 1, 1, 1]


HUGE = """
import sys
import torch
import clipdense
from clipdense.run import predictor as room
from tests.helpers.bright_box import BrightBox

forward = BrightBox.forward
def convolve(self, batch):
    for sample in batch:
        torch.nn.functional.conv2d(sample["image"][None].float(), torch.ones(16, 3, 3, 3), stride=2)
    return forward(self, batch)
BrightBox.forward = convolve

cfg, *images = sys.argv[1:]
predictor = clipdense.Predictor(cfg, opts=["INPUT.MIN_SIZE_TEST", 2800, "INPUT.MAX_SIZE_TEST", 100000])
room.available_memory = lambda: 2**29
for output in predictor.batch(images):
    print(output if isinstance(output, Exception) else f"{len(output['instances'])} found")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="main memory is bounded on Linux only")
def test_an_image_whose_input_does_not_fit_is_an_error_and_the_others_are_done(
    run_python: Callable[..., str], tmp_path: Path
) -> None:
    """Real requests of a convolution, for an input of 2800 x 28000 pixels, with 512 MiB to spare."""
    config, paths = write_model(tmp_path, thing_classes=CLASSES), []
    for i, size in enumerate([(10, 10), (100, 10), (12, 10)]):
        Image.new("RGB", size).save(tmp_path / f"{i}.png")
        paths.append(str(tmp_path / f"{i}.png"))
    lines = run_python(HUGE, str(config), *paths).splitlines()[-3:]
    assert [line.endswith("found") for line in lines] == [True, False, True]
    assert lines[1].startswith(
        "not enough memory for an image of 10 x 100 pixels (2800 x 28000 in the model)"
    )


def test_the_limit_on_memory_is_lifted_again() -> None:
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with within_memory(2**28):
        with pytest.raises(RuntimeError) as error:
            torch.ones(2**28)  # 1 GiB
        assert is_out_of_memory(error.value)
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
    assert torch.ones(2**26).sum() == 2**26
    with within_memory(None):
        assert resource.getrlimit(resource.RLIMIT_DATA) == before
    assert available_memory() is None or available_memory() > 2**20


def test_an_image_too_large_to_read_is_an_error(
    predictor: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr("clipdense.run.predictor.load_image", refuse)
    (error,) = predictor.batch([np.zeros((4, 4, 3), np.uint8)])
    assert isinstance(error, MemoryError) and "not enough memory to read" in str(error)


def test_other_errors_of_the_model_are_raised(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(predictor.model, "forward", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        list(predictor.batch([np.zeros((40, 40, 3), np.uint8)]))
