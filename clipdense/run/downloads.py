"""Download of a file that resumes, and is checked."""

from __future__ import annotations

import shutil
import urllib.error
import urllib.request
from pathlib import Path

from tqdm import tqdm

from clipdense.files import file_sha256, write_error

__all__ = ["check_sum", "download"]

_CHUNK = 2**20


def download(url: str, path: Path, sha256: str | None = None) -> None:
    """Download a file; a download that was interrupted continues where it stopped.

    The file gets its name after it has been received and checked; until then its name ends in ``.part``.

    Args:
        url: address, http or https.
        path: file to write.
        sha256: checksum of the file; None does not check.

    Raises:
        ConnectionError: If it cannot be downloaded, ends early, or has another checksum.
        WriteError: If it cannot be written.
    """
    if not url.startswith(("http://", "https://")):
        raise ConnectionError(f"{url} is not an address of the web (http, https)")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    try:
        _receive(url, part)
    except (urllib.error.URLError, ConnectionError, TimeoutError) as error:
        reason = " ".join(str(getattr(error, "reason", None) or error).split())[:120]
        raise ConnectionError(
            f"{url} could not be downloaded ({reason}); try again, or put the file at {path}"
        ) from error
    except OSError as error:
        raise write_error(part, error) from error
    try:
        check_sum(part, sha256)
    except ConnectionError:
        part.unlink()
        raise
    part.replace(path)


def _receive(url: str, part: Path) -> None:
    done = part.stat().st_size if part.is_file() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {})
    try:
        answer = urllib.request.urlopen(request, timeout=60)  # noqa: S310 (http and https only)
    except urllib.error.HTTPError as error:
        if done and error.code == 416:  # nothing is left to send
            return
        raise
    with answer:
        resumes = answer.status == 206
        left = int(answer.headers.get("Content-Length") or 0)
        done = done if resumes else 0
        free = shutil.disk_usage(part.parent).free
        if left > free:
            raise OSError(28, f"{left / 2**20:.0f} MB are needed")
        with (
            part.open("ab" if resumes else "wb") as file,
            tqdm(
                total=done + left, initial=done, unit="B", unit_scale=True, desc=part.stem, disable=None
            ) as bar,
        ):
            received = 0
            while chunk := answer.read(_CHUNK):
                file.write(chunk)
                received += len(chunk)
                bar.update(len(chunk))
    if left and received < left:
        raise ConnectionError(f"it ended after {received} of {left} bytes")


def check_sum(path: Path, sha256: str | None) -> None:
    """Compare the checksum of a file; None does not.

    Raises:
        ConnectionError: If it differs.
    """
    if sha256 is None:
        return
    found = file_sha256(path)
    if found != sha256.lower():
        raise ConnectionError(
            f"{path} has the checksum {found[:12]}..., not {sha256[:12]}...: the file is damaged or another "
            "one; remove it and try again"
        )
