"""Damaged images, as a predictor and a data loader read them."""

import io
import itertools
import random
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from clipdense.data.image import read_image
from tests.reliability.mutations import damage_bytes
from tests.reliability.outcomes import Case, WrongResultError
from tests.reliability.world import World


def cases(world: World, seed: int) -> Iterator[Case]:
    """Yield whole files of every format and mode, hand-made bad ones, then damaged ones."""
    rng, folder = random.Random(seed), world.folder / "images"
    folder.mkdir(exist_ok=True)
    whole = dict(_whole(Image.open(world.shapes4 / "val/000003.png").convert("RGB").resize((96, 80))))

    def case(name: str, data: bytes) -> Case:
        path = folder / name
        path.write_bytes(data)
        return Case(name, lambda: _read(path), (name,))

    for name, data in itertools.chain(whole.items(), _special()):
        yield case(name, data)
    for i in itertools.count():
        base = rng.choice(list(whole))
        kind, data = damage_bytes(whole[base], rng)
        yield case(f"{i:04d}_{kind.replace(' ', '')}_{base}", data)


def _read(path: Path) -> str:
    image = read_image(path)
    if image.ndim != 3 or image.shape[2] != 3 or min(image.shape) < 1 or image.dtype != np.uint8:
        raise WrongResultError(f"an image of shape {image.shape}, type {image.dtype}")
    return f"{image.shape}"


def _whole(rgb: Image.Image) -> Iterator[tuple[str, bytes]]:
    grey, transparent = rgb.convert("L"), rgb.copy()
    transparent.putalpha(grey)
    palette = rgb.convert("P", palette=Image.Palette.ADAPTIVE, colors=16)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    values = np.asarray(grey)
    frames = [rgb.rotate(20 * i) for i in range(4)]
    saves: dict[str, Callable[[io.BytesIO], object]] = {
        "rgb.png": lambda f: rgb.save(f, "PNG"),
        "rgba.png": lambda f: transparent.save(f, "PNG"),
        "grey_alpha.png": lambda f: transparent.convert("LA").save(f, "PNG"),
        "palette.png": lambda f: palette.save(f, "PNG", transparency=bytes([0, 100, 255] * 5)),
        "one_bit.png": lambda f: rgb.convert("1").save(f, "PNG", transparency=0),
        "grey_transparent.png": lambda f: grey.save(f, "PNG", transparency=7),
        "rgb_transparent.png": lambda f: rgb.save(f, "PNG", transparency=(1, 2, 3)),
        "grey16.png": lambda f: Image.fromarray(values.astype(np.uint16) * 257).save(f, "PNG"),
        "exif.png": lambda f: rgb.save(f, "PNG", exif=exif),
        "profile.png": lambda f: rgb.save(f, "PNG", icc_profile=b"\0\0\2\x0c" + bytes(520)),
        "rgb.jpg": lambda f: rgb.save(f, "JPEG", quality=80),
        "exif.jpg": lambda f: rgb.save(f, "JPEG", exif=exif),
        "progressive.jpg": lambda f: rgb.save(f, "JPEG", progressive=True),
        "grey.jpg": lambda f: grey.save(f, "JPEG"),
        "cmyk.jpg": lambda f: rgb.convert("CMYK").save(f, "JPEG"),
        "frames.gif": lambda f: palette.save(f, "GIF", save_all=True, append_images=[palette.rotate(20)]),
        "frames.webp": lambda f: rgb.save(f, "WEBP", save_all=True, append_images=frames[1:]),
        "lossless.webp": lambda f: transparent.save(f, "WEBP", lossless=True, exif=exif),
        "frames.png": lambda f: rgb.save(f, "PNG", save_all=True, append_images=frames[1:]),
        "lab.tif": lambda f: rgb.convert("LAB").save(f, "TIFF"),
        "cmyk.tif": lambda f: rgb.convert("CMYK").save(f, "TIFF"),
        "float.tif": lambda f: Image.fromarray(values.astype(np.float32) / 255).save(f, "TIFF"),
        "int32.tif": lambda f: Image.fromarray(values.astype(np.int32) * -70000).save(f, "TIFF"),
        "exif.tif": lambda f: rgb.save(f, "TIFF", exif=exif),
    }
    for compression in ("raw", "tiff_lzw", "tiff_deflate", "jpeg", "packbits"):
        saves[f"{compression}.tif"] = lambda f, kind=compression: rgb.save(f, "TIFF", compression=kind)
    for extension, format in (
        ("bmp", "BMP"),
        ("ppm", "PPM"),
        ("tga", "TGA"),
        ("pcx", "PCX"),
        ("jp2", "JPEG2000"),
    ):
        saves[f"rgb.{extension}"] = lambda f, format=format: rgb.save(f, format)
    for name, save in saves.items():
        file = io.BytesIO()
        save(file)
        yield name, file.getvalue()


def _png(width: int, height: int, pixels: bytes, *chunks: tuple[bytes, bytes], depth: int = 8) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, 2 if depth == 8 else 0, 0, 0, 0)
    out = b"\x89PNG\r\n\x1a\n"
    for kind, data in ((b"IHDR", header), *chunks, (b"IDAT", zlib.compress(pixels, 9)), (b"IEND", b"")):
        out += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return out


def _special() -> Iterator[tuple[str, bytes]]:
    """Yield hand-made bad files: bombs, sizes of zero, other formats under the name of an image."""
    yield "empty.png", b""
    yield "bomb_declared.png", _png(50_000, 50_000, bytes(100))
    yield "bomb_178_megapixels.png", _png(13_300, 13_300, bytes(13_300 * 1664), depth=1)
    yield "bomb_widest.png", _png(2**31 - 1, 1, bytes(100))
    yield "no_width.png", _png(0, 10, bytes(100))
    yield "bomb_text.png", _png(2, 2, bytes(14), (b"zTXt", b"a\0\0" + zlib.compress(bytes(200_000_000), 9)))
    yield "bad_exif.png", _png(2, 2, bytes(14), (b"eXIf", b"II*\0\xff\xff\xff\xff"))
    yield "wide.png", _png(20_000, 1, bytes(60_001))
    yield "one_pixel.png", _png(1, 1, bytes(4))
    yield "heic.jpg", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(200)
    yield "vector.png", b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>"
    yield "page.jpg", b"<!DOCTYPE html><html>404</html>"
    yield (
        "program.jpg",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(x) (w) file\n%%EOF\n",
    )
    yield "bomb.gif", b"GIF89a\xff\xff\xff\xff\0\0\0,\0\0\0\0\xff\xff\xff\xff\0\x08\0;"
    yield "bomb.ppm", b"P6\n99999 99999\n255\n" + bytes(100)
    yield "negative.ppm", b"P6\n-5 5\n255\n" + bytes(100)
    for kind, value in (("nan", np.nan), ("infinite", np.inf)):
        file = io.BytesIO()
        Image.fromarray(np.full((8, 8), value, np.float32)).save(file, "TIFF")
        yield f"{kind}.tif", file.getvalue()
