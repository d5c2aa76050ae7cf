"""Middleware that lets through only the requests that the page makes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["Gate"]

_READ = (
    r"/|/config/?|/theme\.css|/favicon\.ico|/manifest\.json|/robots\.txt|/(assets|static)/.*|"
    r"/gradio_api/(info/?|app_id/?|theme\.css|startup-events|heartbeat/\w+|upload_progress|queue/(data|status))"
)
_UPLOAD = r"/gradio_api/upload/?"
_CALL = r"/gradio_api/(queue/join|cancel|reset)/?"
_MAX_CALL = 2**20
"""Bytes of a call, which holds texts and the paths of uploads."""
_FILE = re.compile(r"/gradio_api/file=(.*)", re.DOTALL)


class Gate:
    """ASGI middleware: an allow-list of gradio's routes, one folder of files, and a limit on uploads.

    gradio has routes that open addresses, run single functions past the queue, or record runs. The page needs
    none of them. gradio also downloads an address that a call names as an image: a call may only name files
    of the folder.

    Args:
        app: the application behind it.
        folder: the folder whose files can be read, which holds the uploads and results of the page.
        max_bytes: size of an upload.
        hosts: names in the Host header that are accepted, so that other sites cannot reach a local page by
            rebinding their name; empty for all.
    """

    def __init__(self, app: ASGIApp, folder: Path, max_bytes: int, hosts: Sequence[str] = ()) -> None:
        self._app, self._folder = app, folder.resolve()
        self._max_bytes, self._hosts = max_bytes, tuple(hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it with an error."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        status, text = self._refusal(scope)
        if not status and scope["type"] == "http" and re.fullmatch(_CALL, scope["path"]):
            body = await _read(receive)
            status, text = self._call_refusal(body)
            receive = _replay(body, receive)
        if status:
            await PlainTextResponse(text, status)(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _refusal(self, scope: Scope) -> tuple[int, str]:
        """Return status and reason for a request that is refused; 0 if it is not."""
        if scope["type"] != "http":
            return 404, "not found"
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        host = re.sub(r":\d+$", "", headers.get("host", ""))
        if self._hosts and host not in self._hosts:
            return 400, "unknown host"
        path, method = scope["path"], scope["method"]
        if method in ("GET", "HEAD"):
            if (file := _FILE.fullmatch(path)) is not None:
                return (0, "") if self._is_served(file[1]) else (403, "file not allowed")
            return (0, "") if re.fullmatch(_READ, path) else (404, "not found")
        is_call = re.fullmatch(_CALL, path) is not None
        if method != "POST" or not (is_call or re.fullmatch(_UPLOAD, path)):
            return 404, "not found"
        length = headers.get("content-length", "")
        if not length.isdigit():
            return 411, "the length of the request is missing"
        if int(length) > (limit := _MAX_CALL if is_call else self._max_bytes):
            return 413, f"the request is larger than {limit / 2**20:.0f} MB"
        return 0, ""

    def _call_refusal(self, body: bytes) -> tuple[int, str]:
        """Return status and reason for a call that names another file than an upload, or an address."""
        try:
            paths = list(_paths(json.loads(body)))
        except (ValueError, RecursionError):
            return 400, "not JSON"
        if all(isinstance(path, str) and self._is_served(path) for path in paths):
            return 0, ""
        return 403, "file not allowed"

    def _is_served(self, name: str) -> bool:
        """Return whether a name, decoded once more than the server did, is a file of the folder."""
        return all(
            "\0" not in form
            and Path(form).is_absolute()
            and Path(form).resolve().is_relative_to(self._folder)
            for form in (name, unquote(name))
        )


def _paths(content: Any) -> Iterator[Any]:
    """Yield what stands under "path" anywhere in JSON content, except null."""
    if isinstance(content, dict):
        if content.get("path") is not None:
            yield content["path"]
        content = list(content.values())
    if isinstance(content, list):
        for value in content:
            yield from _paths(value)


async def _read(receive: Receive) -> bytes:
    """Read the body of a request, whose length the server has checked."""
    parts, more = [], True
    while more:
        message = await receive()
        if message["type"] != "http.request":  # the client is gone
            break
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
    return b"".join(parts)


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives a body that has been read, and then what follows it."""
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return pending.pop() if pending else await receive()

    return replayed
