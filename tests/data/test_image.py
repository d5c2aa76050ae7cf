"""Images of every kind come out as 8-bit colour, damaged ones as an error that names the file."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipdense.data.image import BadImageError, header_size, read_image, read_labels
from clipdense.data.mappers import DetectionMapper

GRADIENT = np.stack([np.tile(np.arange(40) * 6, (30, 1)), np.full((30, 40), 90), np.full((30, 40), 200)], -1)
GRADIENT = GRADIENT.astype(np.uint8)


@pytest.fixture
def save(tmp_path: Path):
    def save(image: Image.Image, name: str = "image.png", **options: object) -> Path:
        image.save(tmp_path / name, **options)
        return tmp_path / name

    return save


def test_rgb_and_bgr(save):
    path = save(Image.fromarray(GRADIENT))
    assert np.array_equal(read_image(path), GRADIENT)
    assert np.array_equal(read_image(path, "BGR"), GRADIENT[..., ::-1])
    assert read_image(str(path), "L").shape == (30, 40, 1)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(save, orientation: int):
    marked = np.zeros((30, 40, 3), np.uint8)
    marked[:8, :8] = 255  # a corner that tells all eight orientations apart, with the sides
    exif = Image.Exif()
    exif[274] = orientation
    upright = {
        1: marked,
        2: marked[:, ::-1],
        3: marked[::-1, ::-1],
        4: marked[::-1],
        5: marked.transpose(1, 0, 2),
        6: np.rot90(marked, -1),
        7: marked.transpose(1, 0, 2)[::-1, ::-1],
        8: np.rot90(marked),
    }
    path = save(Image.fromarray(marked), exif=exif)
    assert np.array_equal(read_image(path), upright[orientation])


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_does_not_matter(save):
    path = save(
        Image.fromarray(GRADIENT), "image.jpg", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff", quality=95
    )
    assert read_image(path).shape == (30, 40, 3)


def test_grey_becomes_colour(save):
    grey = GRADIENT[..., 0]
    pixels = read_image(save(Image.fromarray(grey)))
    assert np.array_equal(pixels, np.stack([grey] * 3, -1))
    bilevel = read_image(save(Image.fromarray(grey > 100), "bilevel.png"))
    assert np.array_equal(bilevel[..., 0], np.where(grey > 100, 255, 0))


def test_transparent_pixels_are_white_whatever_lies_below(save):
    rgba = np.dstack([GRADIENT, np.full((30, 40), 255, np.uint8)])
    rgba[:10, :, :3], rgba[:10, :, 3] = 7, 0
    pixels = read_image(save(Image.fromarray(rgba)))
    assert (pixels[:10] == 255).all()
    assert np.array_equal(pixels[10:], GRADIENT[10:])


def test_palette_with_transparency(save):
    palette = Image.fromarray(GRADIENT).quantize(8)
    opaque = read_image(save(palette, "opaque.png"))
    assert np.array_equal(opaque, np.asarray(palette.convert("RGB")))
    index = int(np.asarray(palette)[0, 0])
    pixels = read_image(save(palette, "clear.png", transparency=index))
    assert (pixels[np.asarray(palette) == index] == 255).all()
    assert np.array_equal(pixels[np.asarray(palette) != index], opaque[np.asarray(palette) != index])


def test_cmyk(save):
    image = Image.fromarray(GRADIENT).convert("CMYK")
    pixels = read_image(save(image, "image.jpg", quality=98))
    assert np.abs(pixels.astype(int) - GRADIENT).mean() < 8


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_16_bit_is_scaled_not_cut(save, suffix: str):
    values = np.linspace(0, 65535, 30 * 40).reshape(30, 40).astype(np.uint16)
    pixels = read_image(save(Image.fromarray(values), f"image.{suffix}"))
    assert np.array_equal(pixels[..., 1], np.rint(values / 257).astype(np.uint8))


def test_float_and_32_bit(save):
    ramp = np.linspace(0, 1, 1200, dtype=np.float32).reshape(30, 40)
    assert np.array_equal(read_image(save(Image.fromarray(ramp), "f.tiff"))[..., 0], np.rint(ramp * 255))
    wide = np.linspace(0, 2**20, 1200).astype(np.int32).reshape(30, 40)
    pixels = read_image(save(Image.fromarray(wide), "i.tiff"))[..., 0]
    assert pixels.min() == 0 and pixels.max() == 255


def test_one_pixel(save):
    assert read_image(save(Image.new("RGB", (1, 1), (1, 2, 3)))).tolist() == [[[1, 2, 3]]]


def test_first_frame_of_an_animation(save):
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    path = save(frames[0], "a.gif", save_all=True, append_images=frames[1:])
    assert (read_image(path) == (255, 0, 0)).all()


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tiff", "bmp", "gif"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.9])
def test_cut_short(save, suffix: str, share: float):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    path = save(noise, f"image.{suffix}")
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(BadImageError, match=f"image.{suffix}"):
        read_image(path)


def test_not_an_image(tmp_path: Path):
    (tmp_path / "page.jpg").write_text("<html>404</html>")
    with pytest.raises(BadImageError, match="page.jpg"):
        read_image(tmp_path / "page.jpg")
    with pytest.raises(FileNotFoundError, match="absent.jpg"):
        read_image(tmp_path / "absent.jpg")


def test_unknown_format(save):
    with pytest.raises(ValueError, match=r"INPUT\.FORMAT"):
        read_image(save(Image.fromarray(GRADIENT)), "HSV")


def test_labels(save):
    labels = np.arange(1200).reshape(30, 40)
    small = (labels % 256).astype(np.uint8)
    assert np.array_equal(read_labels(save(Image.fromarray(small), "l.png")), small)
    assert np.array_equal(read_labels(save(Image.fromarray(labels.astype(np.uint16)), "w.png")), labels)
    palette = Image.fromarray(small)
    palette.putpalette([v for i in range(256) for v in (255 - i, i, 0)])
    assert np.array_equal(read_labels(save(palette, "p.png")), small)  # indices, not their colours
    ids = labels * 77
    rgb = np.stack([ids & 255, ids >> 8 & 255, ids >> 16], -1).astype(np.uint8)
    assert np.array_equal(read_labels(save(Image.fromarray(rgb), "pan.png")), ids)


TURNED = np.zeros((30, 40, 3), np.uint8)
TURNED[:8, :8] = 255


@pytest.fixture
def photograph(save):
    """A photograph of 30 x 40 stored pixels that viewers show as 40 x 30."""
    exif = Image.Exif()
    exif[274] = 6
    return save(Image.fromarray(TURNED), "photo.png", exif=exif)


@pytest.mark.parametrize(
    ("orientation", "size", "upright"),
    [
        ("auto", None, True),
        ("auto", (40, 30), True),  # annotated as viewers show it
        ("auto", (30, 40), False),  # annotated as it is stored
        ("auto", (7, 7), True),
        ("apply", (30, 40), True),
        ("ignore", (40, 30), False),
        ("ignore", None, False),
    ],
)
def test_both_conventions_of_the_exif_orientation(photograph, orientation, size, upright):
    expected = np.rot90(TURNED, -1) if upright else TURNED
    assert np.array_equal(read_image(photograph, size=size, orientation=orientation), expected)
    assert header_size(photograph) == (40, 30)
    assert header_size(photograph, "ignore") == (30, 40)


def test_a_mapper_follows_the_stated_size(photograph):
    def pixels(height, width, orientation="auto"):
        mapper = DetectionMapper(False, augmentations=[], image_format="RGB", exif_orientation=orientation)
        return mapper({"file_name": str(photograph), "height": height, "width": width})["image"].numpy()

    assert np.array_equal(pixels(30, 40), TURNED.transpose(2, 0, 1))
    assert np.array_equal(pixels(40, 30), np.rot90(TURNED, -1).transpose(2, 0, 1))
    assert np.array_equal(pixels(30, 40, "ignore"), TURNED.transpose(2, 0, 1))
    with pytest.raises(ValueError, match="photo.png"):
        pixels(30, 40, "apply")
    with pytest.raises(ValueError, match=r"INPUT\.EXIF_ORIENTATION = 'turn'"):
        pixels(30, 40, "turn")


def test_postscript_is_not_opened(tmp_path: Path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.png")  # Pillow looks at the content, not at the name
    with pytest.raises(BadImageError, match="a.png: not an image, or of a format that is not accepted"):
        read_image(tmp_path / "a.png")
    assert header_size(tmp_path / "a.png") is None


def test_pixels_are_bounded_before_decoding(save, monkeypatch):
    path = save(Image.fromarray(GRADIENT))
    assert read_image(path, max_pixels=1200).shape == (30, 40, 3)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    for read in (read_image, read_labels):
        with pytest.raises(
            BadImageError, match="image.png: 40 x 30 are more than 1199 pixels.*INPUT.MAX_PIXELS"
        ):
            read(path, max_pixels=1199)


def test_the_limit_is_ours_not_that_of_pillow(save, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert read_image(save(Image.fromarray(GRADIENT))).shape == (30, 40, 3)
    assert Image.MAX_IMAGE_PIXELS == 100


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_one_sample_that_is_not_finite_is_an_error(save, value: float):
    ramp = np.linspace(0, 1, 1200, dtype=np.float32).reshape(30, 40)
    ramp[3, 5] = value
    path = save(Image.fromarray(ramp), "f.tiff")
    with pytest.raises(BadImageError, match="f.tiff: an image with samples that are NaN or infinite"):
        read_image(path)
    with pytest.raises(BadImageError, match="not whole numbers"):
        read_labels(path)


def test_grey_with_alpha(save):
    grey_alpha = np.dstack([GRADIENT[..., 0], np.full((30, 40), 255, np.uint8)])
    grey_alpha[:10, :, 1] = 0
    path = save(Image.fromarray(grey_alpha, "LA"))
    pixels = read_image(path)
    assert (pixels[:10] == 255).all()
    assert np.array_equal(pixels[10:, :, 1], GRADIENT[10:, :, 0])
    with pytest.raises(BadImageError, match="label map of mode LA"):
        read_labels(path)


def test_a_1_bit_label_map_holds_0_and_1(save):
    mask = GRADIENT[..., 0] > 100
    assert np.array_equal(read_labels(save(Image.fromarray(mask))), mask.astype(int))
