"""A folder of the browser demo, served on this machine alone: `python -m runtime.web_server out/web`.

Threads in WebAssembly need a page that is cross-origin isolated, which two headers bring about; the third keeps the page from talking to anyone else.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from runtime.errors import ClipError

POLICY = (
    "default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; worker-src 'self'; connect-src 'self'; img-src 'self' blob:; style-src 'self'; "
    "manifest-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
TYPES = {".js": "text/javascript", ".mjs": "text/javascript", ".wasm": "application/wasm", ".json": "application/json", ".onnx": "application/octet-stream"}


class Handler(SimpleHTTPRequestHandler):
    """Files of one folder with `HEADERS`; no listings, one line for each failure and none for the rest."""

    extensions_map = {**SimpleHTTPRequestHandler.extensions_map, **TYPES}
    protocol_version = "HTTP/1.1"

    def end_headers(self) -> None:
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def list_directory(self, path: Any) -> None:
        self.send_error(404, "there is no such file")

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        pass


class Server(ThreadingHTTPServer):
    """One thread a connection; a browser that hangs up is no event."""

    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


def open_server(folder: Path, port: int = 0) -> ThreadingHTTPServer:
    """A server of this folder on 127.0.0.1, not yet running; port 0: any that is free.

    Raises:
        ClipError: no page in the folder, or the port is taken.
    """
    if not (folder / "index.html").is_file():
        raise ClipError(f"{folder} holds no index.html; make the page with 'make web'")
    try:
        server = Server(("127.0.0.1", port), partial(Handler, directory=str(folder.resolve())))
    except (OSError, OverflowError) as error:
        raise ClipError(f"port {port} of this machine cannot be used ({error}); give another with --port") from error
    return server


def main(arguments: list[str] | None = None) -> int:
    """Serve until interrupted. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m runtime.web_server", description="Serve the browser demo on this machine alone.")
    parser.add_argument("folder", type=Path, help="what 'make web' made, e.g. out/web")
    parser.add_argument("--port", type=int, default=8765, help="0: any that is free (default: 8765)")
    options = parser.parse_args(arguments)
    try:
        server = open_server(options.folder, options.port)
    except ClipError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    sys.stdout.write(f"http://127.0.0.1:{server.server_address[1]}/\n")
    sys.stdout.flush()
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        return 130
    finally:
        server.server_close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
