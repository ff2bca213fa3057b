"""The browser package against Python, in node; in Chromium where there is one (`slow`)."""

from __future__ import annotations

import http.client
import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from benchmarks.browser import find_chromium
from runtime.errors import ClipError
from runtime.web_server import HEADERS, main, open_server
from tests.web.run import NODE_TESTS, run_node
from tests.web.vectors import write_vectors

ROOT = Path(__file__).parents[2]
SITE = ROOT / "out/web"


def node_version() -> int:
    """Major version of node; 0 where there is none."""
    found = shutil.which("node") and subprocess.run(["node", "--version"], capture_output=True, text=True, check=False).stdout
    return int(found.strip().lstrip("v").split(".")[0]) if found else 0


@pytest.mark.skipif(node_version() < 20, reason="node 20 or later is not installed")
def test_tokens_pixels_index_and_bundles_in_node(tmp_path: Path) -> None:
    write_vectors(tmp_path, [], 1600)
    done = run_node(NODE_TESTS, tmp_path, tmp_path / "summary.json")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    figures = json.loads((tmp_path / "summary.json").read_text())
    assert figures["web_tokenizer_texts"] >= 2000
    assert figures["web_pictures"] >= 40
    assert (figures["web_tokenizer_mismatches"], figures["web_pixel_mismatches"]) == (0, 0)


@pytest.mark.slow
@pytest.mark.skipif(find_chromium() is None, reason="chromium is not installed")
@pytest.mark.skipif(not (SITE / "index.html").is_file(), reason="out/web is not there; run 'make web'")
def test_page_in_chromium(tmp_path: Path) -> None:
    write_vectors(tmp_path, [], 100)
    done = run_node(("browser.test.js",), tmp_path, tmp_path / "summary.json", SITE, timeout=400)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]


def test_server_isolates_the_page_and_serves_nothing_else(tmp_path: Path) -> None:
    site = tmp_path / "site"
    site.mkdir()
    (site / "index.html").write_text("<!doctype html>")
    (site / "ort.mjs").write_text("export {};")
    (site / "folder").mkdir()
    (tmp_path / "secret").write_text("no")
    server = open_server(site)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        assert server.server_address[0] == "127.0.0.1"
        connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=10)
        for path, status in (("/", 200), ("/ort.mjs", 200), ("/folder/", 404), ("/../secret", 404), ("/%2e%2e/secret", 404), ("/none", 404)):
            connection.request("GET", path)
            response = connection.getresponse()
            response.read()
            assert response.status == status, path
            assert {name: response.headers[name] for name in HEADERS} == HEADERS
            if path == "/ort.mjs":
                assert response.headers["Content-Type"] == "text/javascript"
        with pytest.raises(ClipError, match="cannot be used"):
            open_server(site, server.server_address[1])
        connection.close()
    finally:
        server.shutdown()
        server.server_close()


def test_server_refuses_a_folder_without_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 1
    assert "make web" in capsys.readouterr().err


def test_server_needs_no_heavy_import() -> None:
    code = "import sys, runtime.web_server; print([m for m in ('torch', 'numpy', 'onnxruntime', 'PIL') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"
