"""Reader of numeric matrices in MATLAB files (version 5 to 7).

scipy's reader crashes on files with damaged sizes; this one reads what label maps need and checks every size.
"""

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["read_matrix"]

_MATRIX, _COMPRESSED = 14, 15
_NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_MAX_BYTES = 2**30


def read_matrix(path: Path, name: str) -> npt.NDArray[Any]:
    """Read a numeric matrix (H, W) of a MATLAB file.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file is of another kind, damaged, or without this matrix; names it.
    """
    data = path.read_bytes()
    order = {b"IM": "<", b"MI": ">"}.get(data[126:128])
    try:
        if order is None:
            raise ValueError("its header is missing")
        for kind, body in _elements(data[128:], order):
            if kind == _COMPRESSED:
                body = zlib.decompressobj().decompress(body, _MAX_BYTES)
                kind, body = next(_elements(body, order), (0, b""))
            if kind == _MATRIX and (matrix := _matrix(body, order, name)) is not None:
                return matrix
    except (ValueError, struct.error, zlib.error) as error:
        raise ValueError(f"{path}: not a MATLAB file with a {name} ({error})") from error
    raise ValueError(f"{path}: not a MATLAB file with a {name}")


def _elements(data: bytes, order: str) -> Iterator[tuple[int, bytes]]:
    """Yield type and content of the elements in a block."""
    place = 0
    while place + 8 <= len(data):
        kind, size = struct.unpack_from(f"{order}II", data, place)
        if kind >> 16:  # up to four bytes, stored in the tag itself
            kind, size = kind & 0xFFFF, kind >> 16
            body, step = data[place + 4 : place + 4 + min(size, 4)], 8
        else:
            body = data[place + 8 : place + 8 + size]
            step = 8 + size + (0 if kind == _COMPRESSED else -size % 8)
        if len(body) < size:
            raise ValueError("an element is cut short")
        yield kind, body
        place += step


def _matrix(data: bytes, order: str, name: str) -> npt.NDArray[Any] | None:
    """Return the matrix of an element; None if it has another name."""
    parts = list(_elements(data, order))
    if len(parts) < 4 or parts[2][1].rstrip(b"\0") != name.encode():
        return None
    kind, body = parts[3]
    if kind not in _NUMBERS or len(parts[1][1]) % 4:
        raise ValueError("it is not a matrix of numbers")
    shape = tuple(np.frombuffer(parts[1][1], f"{order}i4").tolist())
    values = np.frombuffer(body, np.dtype(f"{order}{_NUMBERS[kind]}"))
    if len(shape) != 2 or min(shape) < 1 or shape[0] * shape[1] != len(values):
        raise ValueError(f"its shape {shape} does not fit {len(values)} values, or is not (height, width)")
    return values.reshape(shape, order="F")
