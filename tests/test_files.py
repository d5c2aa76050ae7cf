"""Atomic writing, the error of a full disk, and the cache folder."""

import errno
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from clipdense.files import (
    WriteError,
    atomic_path,
    cache_dir,
    json_text,
    read_text,
    write_atomically,
    write_text,
)


@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()])
def test_previous_file_survives_an_error(tmp_path, error):
    path = tmp_path / "x.txt"
    path.write_text("before")
    with pytest.raises(type(error)), atomic_path(path) as partial:
        partial.write_text("half")
        raise error
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_atomic_path_replaces_the_file_and_creates_its_folder(tmp_path):
    path = tmp_path / "new" / "x.txt"
    for content in ("first", "second"):
        with atomic_path(path) as partial:
            partial.write_text(content)
        assert path.read_text() == content
    assert list(path.parent.iterdir()) == [path]


def test_full_disk_error_names_file_reason_and_free_space(tmp_path):
    path = tmp_path / "model.pth"
    path.write_bytes(b"old")

    def write(file):
        file.write(b"new, but")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(WriteError, match=r"cannot write .*model\.pth: No space left on device \(\d+ MB free"):
        write_atomically(path, write)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "model.pth"
    path.write_bytes(b"old")

    def write(file):
        file.write(b"new, but")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, write)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_error_of_torch_names_its_cause(tmp_path):
    class Full:
        """A file on a full disk: torch raises RuntimeError from its OSError."""

        def write(self, content):
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

        def flush(self):
            pass

    with pytest.raises(WriteError, match=r"quota.*free in"):
        write_atomically(tmp_path / "model.pth", lambda file: torch.save({"a": torch.zeros(2)}, Full()))


def test_file_in_place_of_the_folder_is_a_write_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match="cannot write .*x.txt"):
        write_text(tmp_path / "file" / "x.txt", "content")


def test_text_is_utf8(tmp_path):
    write_text(tmp_path / "x.txt", "naïve")
    assert (tmp_path / "x.txt").read_bytes() == "naïve".encode()


def test_text_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa\xc3\xa9\n")
    assert read_text(tmp_path / "a.txt") == "aé\n"
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"b\.txt: not text in UTF-8 \(.*byte 3"):
        read_text(tmp_path / "b.txt")


def test_json_has_no_nan():
    content = {"AP": math.nan, "list": [1.5, -math.inf, ("a", math.inf)], "n": 3, "none": None, "on": True}
    expected = {"AP": None, "list": [1.5, None, ["a", None]], "n": 3, "none": None, "on": True}
    assert json.loads(json_text(content, indent=1)) == expected


def test_cache_folder(monkeypatch):
    monkeypatch.setenv("CLIPDENSE_CACHE", "~/kept")
    assert cache_dir() == Path.home() / "kept"
    monkeypatch.delenv("CLIPDENSE_CACHE")
    assert "clipdense" in cache_dir().parts


def test_leftovers_of_killed_writers_are_removed(tmp_path):
    code = (
        "import os, sys; from clipdense.files import atomic_path\n"
        "with atomic_path(sys.argv[1]) as partial:\n"
        "    partial.write_bytes(b'half'); partial.with_name('.tmp_of_a_library').write_bytes(b'half')\n"
        "    os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "a.bin"], check=False)
    (tmp_path / ".b.bin.12345678").touch()
    assert len(list(tmp_path.iterdir())) == 2
    write_atomically(tmp_path / "a.bin", lambda file: file.write(b"whole"))
    assert sorted(p.name for p in tmp_path.iterdir()) == [".b.bin.12345678", "a.bin"]


def test_files_of_living_writers_stay(tmp_path):
    with atomic_path(tmp_path / "a.bin") as first:
        first.write_bytes(b"first")
        write_atomically(tmp_path / "a.bin", lambda file: file.write(b"second"))
        assert first.read_bytes() == b"first"
    assert (tmp_path / "a.bin").read_bytes() == b"first"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_failing_disk_is_named_with_the_file(tmp_path, number):
    """Such errors come from a write, which does not know the name."""
    with pytest.raises(WriteError, match=r"cannot write .*table\.bin: "), atomic_path(tmp_path / "table.bin"):
        raise OSError(number, os.strerror(number))
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "table.bin"):
        (tmp_path / "other").read_text()
    assert list(tmp_path.iterdir()) == []
