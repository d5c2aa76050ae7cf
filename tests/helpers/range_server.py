"""A file server on localhost that answers requests for parts of a file, as object stores do."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

__all__ = ["RangeServer", "range_server"]


class RangeServer:
    """Attributes:
    url: address of the folder.
    asked: name and Range header of each GET request.
    failures: number of GET requests that fail next, with status 503.
    ranges: whether requests for parts are answered.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.asked: list[tuple[str, str]] = []
        self.failures = 0
        self.ranges = True


def _handler(server: RangeServer, folder: Path) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: Any) -> None: ...

        def do_GET(self) -> None:
            path, part = folder / self.path.lstrip("/"), self.headers.get("Range", "")
            if self.command == "GET":
                server.asked.append((path.name, part))
                if server.failures:
                    server.failures -= 1
                    return self.send_error(503)
            if not path.is_file():
                return self.send_error(404)
            content, status = path.read_bytes(), 200
            total = len(content)
            if part and server.ranges:
                first, last = part.removeprefix("bytes=").split("-")
                content, status = content[int(first) : int(last) + 1], 206
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", f'"{path.stat().st_mtime_ns}"')
            if server.ranges:
                self.send_header("Accept-Ranges", "bytes")
            if status == 206:
                self.send_header("Content-Range", f"bytes {first}-{last}/{total}")
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        do_HEAD = do_GET

    return Handler


@contextmanager
def range_server(folder: Path) -> Iterator[RangeServer]:
    """Serve a folder while the block lasts."""
    http = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    server = RangeServer(f"http://127.0.0.1:{http.server_address[1]}")
    http.RequestHandlerClass = _handler(server, folder)
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
        thread.join()
