"""What the gate of the web page lets through."""

from pathlib import Path

import pytest

pytest.importorskip("gradio", reason="the extra `web` is not installed")

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from clipdense.run.web.gate import Gate


async def echo(request: Request) -> PlainTextResponse:
    return PlainTextResponse((await request.body()).decode() or "reached")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "a.png").write_text("picture")
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "served" / "link.png").symlink_to(tmp_path / "secret.txt")
    return tmp_path / "served"


@pytest.fixture
def client(folder: Path) -> TestClient:
    gate = Middleware(Gate, folder=folder, max_bytes=1000, hosts=("localhost",))
    routes = [Route("/{path:path}", echo, methods=["GET", "POST", "PUT"])]
    return TestClient(Starlette(routes=routes, middleware=[gate]), base_url="http://localhost:7860")


@pytest.mark.parametrize("path", ["/", "/config", "/assets/x.js", "/gradio_api/queue/data", "/theme.css"])
def test_routes_of_the_page_are_open(client: TestClient, path: str) -> None:
    assert client.get(path).text == "reached"


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/proxy=http://example.org/a.png",
        "/gradio_api/run-history/buckets",
        "/gradio_api/vibe-code/",
        "/gradio_api/deep_link",
        "/monitoring",
        "/gradio_api/openapi.json",
        "/gradio_api/custom_component/a/client/b/c",
    ],
)
def test_other_routes_are_closed(client: TestClient, path: str) -> None:
    assert client.get(path).status_code == 404


@pytest.mark.parametrize("path", ["/gradio_api/run/segment", "/gradio_api/component_server", "/"])
def test_other_calls_are_closed(client: TestClient, path: str) -> None:
    assert client.post(path, json={}).status_code == 404
    assert client.put("/gradio_api/queue/join", json={}).status_code == 404


def test_only_files_of_the_folder_are_served(client: TestClient, folder: Path) -> None:
    assert client.get(f"/gradio_api/file={folder}/a.png").text == "reached"
    refused = [
        "/etc/passwd",
        f"{folder}/../secret.txt",
        f"{folder}/%2e%2e/secret.txt",
        f"{folder}/%252e%252e/secret.txt",
        f"{folder}/link.png",
        "a.png",
        "http://example.org/a.png",
        "file:///etc/passwd",
    ]
    assert {client.get(f"/gradio_api/file={name}").status_code for name in refused} == {403}


def test_a_call_names_files_of_the_folder_only(client: TestClient, folder: Path) -> None:
    def call(path: object) -> int:
        data = {"data": ["model", [{"image": {"path": path, "meta": {"_type": "gradio.FileData"}}}]]}
        return client.post("/gradio_api/queue/join", json=data).status_code

    assert call(str(folder / "a.png")) == 200
    refused = ["/etc/passwd", str(folder.parent / "secret.txt"), "http://example.org/a.png", "", 3, ["/etc"]]
    assert {call(path) for path in refused} == {403}
    body = client.post("/gradio_api/queue/join", json={"data": ["kept", None]})
    assert body.text == '{"data":["kept",null]}'
    assert client.post("/gradio_api/queue/join", content="{").status_code == 400


def test_uploads_are_limited_in_size(client: TestClient) -> None:
    assert client.post("/gradio_api/upload", content="x" * 1000).status_code == 200
    assert client.post("/gradio_api/upload", content="x" * 1001).status_code == 413
    assert client.post("/gradio_api/upload", content=iter([b"x"])).status_code == 411


def test_other_names_of_this_host_are_refused(client: TestClient) -> None:
    assert client.get("/", headers={"host": "attacker.example:7860"}).status_code == 400
    assert client.get("/", headers={"host": "localhost"}).status_code == 200
