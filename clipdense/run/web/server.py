"""Server of the web page."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipdense.run.web.limits import Limits

if TYPE_CHECKING:
    from clipdense.run.web.models import ServedModel

__all__ = ["LOCAL_HOSTS", "check_port", "serve"]

logger = logging.getLogger(__name__)

LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")
"""Hosts that only programs of the same machine can reach."""


def serve(
    models: Sequence[ServedModel],
    limits: Limits | None = None,
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
    block: bool = True,
) -> Any:
    """Serve the page until Ctrl-C.

    The page reads and writes one temporary folder, which is removed at the end. It sends nothing to other
    servers, and loads nothing from them: gradio's telemetry, sharing, fonts and version check are off.

    Args:
        models: models to choose from; the first is chosen at the start and loaded at once.
        limits: of a request.
        host: address to listen on; "0.0.0.0" for all networks of the machine.
        port: TCP port.
        block: wait for Ctrl-C; False returns at once.

    Returns:
        gradio's page if ``block`` is False; `Blocks.close` ends it.

    Raises:
        OSError: If the port is in use.
        ModuleNotFoundError: If gradio is not installed.
    """
    limits = limits or Limits()
    if block:  # end as after Ctrl-C, so that the folder is removed
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    check_port(host, port)
    models[0].predictor()
    folder = Path(tempfile.mkdtemp(prefix="clipdense-serve-")).resolve()
    _prepare_gradio(folder)
    from clipdense.run.web.page import CSS, build_page

    try:
        page = build_page(models, limits, folder)
        page.launch(**_launch_options(folder, limits, host, port), theme=_theme(), css=CSS)
        if host not in LOCAL_HOSTS:
            logger.warning("The page has no password: everybody who reaches %s can use it.", host)
        print(f"clipdense is at http://{host}:{port} (Ctrl-C to stop)", flush=True)
        if not block:
            return page
        page.block_thread()
    finally:
        if block:
            shutil.rmtree(folder, ignore_errors=True)
    return page


def _prepare_gradio(folder: Path) -> None:
    """Set the variables that gradio reads when it is imported, and drop those that would open more."""
    os.environ.update(
        GRADIO_TEMP_DIR=str(folder),
        GRADIO_ANALYTICS_ENABLED="False",
        HF_HUB_DISABLE_TELEMETRY="1",
    )
    for name in ("GRADIO_ALLOWED_PATHS", "GRADIO_SHARE", "GRADIO_MCP_SERVER", "GRADIO_NUM_WORKERS"):
        os.environ.pop(name, None)


def _launch_options(folder: Path, limits: Limits, host: str, port: int) -> dict[str, Any]:
    from starlette.middleware import Middleware

    from clipdense.run.web.gate import Gate

    # one byte more for each part of the form than the files have
    max_bytes = limits.images * limits.megabytes * 2**20 + 2**20
    hosts = LOCAL_HOSTS if host in LOCAL_HOSTS else ()
    gate = Middleware(Gate, folder=folder, max_bytes=max_bytes, hosts=hosts)
    return {
        "server_name": host,
        "server_port": port,
        "share": False,
        "show_error": False,
        "quiet": True,
        "inbrowser": False,
        "prevent_thread_lock": True,
        "allowed_paths": [],
        "max_file_size": limits.megabytes * 2**20,
        "enable_monitoring": False,
        "run_history": False,
        "mcp_server": False,
        "ssr_mode": False,
        "pwa": False,
        "footer_links": [],
        "app_kwargs": {"middleware": [gate], "docs_url": None, "redoc_url": None, "openapi_url": None},
    }


def _theme() -> Any:
    """Return a theme with the fonts of the browser: gradio's own come from another server."""
    import gradio as gr

    return gr.themes.Soft(
        font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"], primary_hue="teal"
    )


def check_port(host: str, port: int) -> None:
    """Check that a server can listen on a port; gradio would report it after the model is loaded.

    Args:
        host: address to listen on.
        port: TCP port.

    Raises:
        OSError: If it cannot; names host, port and reason.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as test:
        test.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            test.bind((host, port))
        except OSError as error:
            raise OSError(
                f"cannot listen on {host}:{port}: {error.strerror}; choose another --port"
            ) from error
