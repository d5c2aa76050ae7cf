"""A stand-in for the Hugging Face hub on localhost: repositories are made, filled and read, in memory."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

__all__ = ["StubHub", "stub_hub"]


class StubHub:
    """Attributes:
    url: address of the server.
    repositories: hub id -> file name -> content.
    private: hub ids that need the token.
    asked: method and path of each request.
    token: the token that is accepted.
    """

    def __init__(self, url: str) -> None:
        self.url, self.token = url, "hf_secret"
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.asked: list[str] = []


class _Handler(BaseHTTPRequestHandler):
    """Answers the requests of ``huggingface_hub``."""

    hub: StubHub

    def log_message(self, *args: Any) -> None: ...

    def answer(self, status: int, content: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def answer_json(self, content: Any) -> None:
        self.answer(200, json.dumps(content).encode(), Content_Type="application/json")

    def do_HEAD(self) -> None:
        self.hub.asked.append(f"{self.command} {self.path}")
        found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.path)
        authorised = self.headers.get("Authorization") == f"Bearer {self.hub.token}"
        if (
            found is None
            or found[1] not in self.hub.repositories
            or (found[1] in self.hub.private and not authorised)
        ):
            return self.answer(401, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
        content = self.hub.repositories[found[1]].get(found[3])
        if content is None:
            return self.answer(404, X_Error_Code="EntryNotFound", X_Error_Message="Entry not found")
        etag = hashlib.sha256(content).hexdigest()
        return self.answer(200, content, ETag=f'"{etag}"', X_Repo_Commit="c" * 40)

    do_GET = do_HEAD

    def do_POST(self) -> None:
        self.hub.asked.append(f"{self.command} {self.path}")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            return self.answer(401, X_Error_Message="Invalid token")
        if self.path == "/api/validate-yaml":
            return self.answer_json({"errors": [], "warnings": []})
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            self.hub.repositories.setdefault(name, {})
            if asked.get("private") or asked.get("visibility") == "private":
                self.hub.private.add(name)
            return self.answer_json({"url": f"{self.hub.url}/{name}"})
        name = "/".join(self.path.split("/")[3:5])
        if "/preupload/" in self.path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return self.answer_json({"files": files})
        lines = [json.loads(line) for line in body.splitlines()]
        for line in lines:
            if line["key"] == "file":
                self.hub.repositories[name][line["value"]["path"]] = base64.b64decode(
                    line["value"]["content"]
                )
        commit = {"commitUrl": f"{self.hub.url}/{name}/commit/{'c' * 40}", "commitOid": "c" * 40}
        return self.answer_json({**commit, "success": True})


@contextmanager
def stub_hub(cache: str) -> Iterator[StubHub]:
    """Run the server, and direct ``huggingface_hub`` to it and to an own cache, while the block lasts."""
    from huggingface_hub import constants

    server = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    hub = StubHub(f"http://127.0.0.1:{server.server_address[1]}")
    server.RequestHandlerClass = type("Handler", (_Handler,), {"hub": hub})
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", hub.url)
        template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr(constants, "HF_HUB_CACHE", cache)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.delenv("HF_TOKEN", raising=False)
        try:
            yield hub
        finally:
            server.shutdown()
            server.server_close()
            thread.join()
