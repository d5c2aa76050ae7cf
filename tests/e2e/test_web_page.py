"""`clipdense serve` in a browser and over HTTP."""

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from tests.helpers.browser import open_page

pytest.importorskip("gradio", reason="the extra `web` is not installed")

# gradio and a model are loaded, and a browser is started
pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
SCENES = [str(ROOT / "projects" / "ShapesWorld" / "scenes" / f"{k}.jpg") for k in (1, 2)]


@pytest.fixture(scope="module")
def temporary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the server's temporary files; beside it is a file that nobody may read."""
    folder = tmp_path_factory.mktemp("server")
    (folder.parent / "secret.png").write_bytes(Path(SCENES[0]).read_bytes())
    return folder


@pytest.fixture(scope="module")
def address(temporary: Path) -> Iterator[str]:
    """Address of a running server; after the tests it is interrupted, and must clean up."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "clipdense", "serve", "--port", str(port), "--max-images", "2"]
    environment = {**os.environ, "TMPDIR": str(temporary), "PYTHONPATH": str(ROOT)}
    server = subprocess.Popen(command, cwd=temporary, env=environment, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        while not (line := server.stdout.readline()).startswith("clipdense is at"):
            assert line, "the server ended"
        yield f"http://127.0.0.1:{port}"
        server.send_signal(signal.SIGINT)
        assert server.wait(300) in (0, 130)
        assert not list(temporary.glob("clipdense-serve-*"))
    finally:
        server.kill()


def status(address: str, data: bytes | None = None, **headers: str) -> int:
    request = urllib.request.Request(address, data, headers)
    try:
        with urllib.request.urlopen(request, timeout=120) as reply:
            return int(reply.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_words_are_found_in_dropped_images(address: str, tmp_path: Path) -> None:
    with open_page(address, address) as visit:
        page = visit.page
        page.set_input_files("#images input[type=file]", SCENES)
        page.wait_for_selector("#images .grid-container img, #images .thumbnail-item")
        page.fill("#words textarea", "red heart, blue star\nheart, pink circle")
        page.click("#segment")
        page.wait_for_selector("#pictures img")
        assert page.locator("#pictures img").count() == 4
        picture = page.locator("#pictures img").first
        picture.evaluate("image => image.decode()")
        assert picture.evaluate("image => image.naturalWidth") == 384
        summary = page.locator("#summary").inner_text()
        assert "1.jpg, line 1: red heart" in summary and "2.jpg, line 2:" in summary
        assert "pink circle" in page.locator("#areas").inner_text()
        with page.expect_download() as download:
            page.click("#json")
        download.value.save_as(tmp_path / "a.json")
        with page.expect_download() as download:
            page.click("#png")
        download.value.save_as(tmp_path / "a.png")
        page.get_by_role("tab", name="Score maps").click()
        page.wait_for_selector("#scores img")
        assert page.locator("#scores img").count() == 8
    results = json.loads((tmp_path / "a.json").read_text())["results"]
    assert [(row["file_name"], row["line"]) for row in results] == [
        (name, line) for name in ("1.jpg", "2.jpg") for line in (1, 2)
    ]
    assert Image.open(tmp_path / "a.png").width == 2 * 384 + 8
    assert not visit.refused and not visit.errors


def test_the_page_says_what_is_wrong(address: str, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no image")
    with open_page(address, address) as visit:
        page = visit.page
        page.click("#segment")
        page.wait_for_selector("text=Drop an image first")
        page.set_input_files("#images input[type=file]", str(tmp_path / "text.png"))
        page.wait_for_selector("#images .thumbnail-item")
        page.click("#segment")
        page.wait_for_selector("#summary >> text=text.png: not an image")
        assert str(tmp_path) not in page.locator("#summary").inner_text()
        page.click("#example")
        page.wait_for_function("document.querySelector('#words textarea').value.includes(', ')")
        words = page.input_value("#words textarea")
        page.fill("#words textarea", "")
        page.click("#segment")
        page.wait_for_selector("#summary >> text=Type at least one word")
        page.fill("#words textarea", words)
        page.click("#segment")
        page.wait_for_selector("#pictures img")
    assert not visit.refused


def test_no_path_of_the_server_is_readable(address: str, temporary: Path) -> None:
    api = f"{address}/gradio_api"
    secret = temporary.parent / "secret.png"
    assert status(address) == 200
    (folder,) = temporary.glob("clipdense-serve-*")
    for name in ("/etc/passwd", secret, f"{folder}/../../secret.png", ROOT / "README.md", "README.md"):
        assert status(f"{api}/file={name}") == 403
    assert status(f"{api}/file=http://127.0.0.1:9/a.png") == 403
    assert status(f"{address}/assets/..%2f..%2f..%2fpackage.json") in (403, 404)
    assert status(f"{address}/static/%2e%2e/%2e%2e/package.json") in (403, 404)
    assert status(f"{api}/proxy=http://127.0.0.1:9/a.png") == 404
    assert status(address, host="attacker.example") == 400


def test_no_call_reads_a_path_of_the_server(address: str, temporary: Path) -> None:
    api, kind = f"{address}/gradio_api", {"content-type": "application/json"}
    secret = str(temporary.parent / "secret.png")
    for path in (secret, "http://127.0.0.1:9/a.png"):
        image = {"image": {"path": path, "meta": {"_type": "gradio.FileData"}}, "caption": None}
        call = {"data": ["shapes-rn (MaskCLIP)", [image], "heart", ""], "fn_index": 2, "session_hash": "a"}
        assert status(f"{api}/queue/join", json.dumps(call).encode(), **kind) == 403
        assert status(f"{api}/run/segment", json.dumps(call).encode(), **kind) == 404


def test_it_listens_on_this_machine_only(address: str) -> None:
    port = int(address.rpartition(":")[2])
    others = {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)}
    for host in others - {"127.0.0.1"}:
        if host.startswith("127."):
            continue
        with socket.socket() as probe:
            probe.settimeout(5)
            assert probe.connect_ex((host, port)) != 0


def test_a_port_in_use_is_named(address: str) -> None:
    port = address.rpartition(":")[2]
    command = [sys.executable, "-m", "clipdense", "serve", "--port", port]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert f"error: cannot listen on 127.0.0.1:{port}" in done.stderr and "--port" in done.stderr
