"""What `pretrained=` names, with the real hub library: its cache laid out by hand, and a server of ours in place of the hub.

Each case runs in a process of its own, because the library reads its environment when it is imported.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from mobileclip.hub import KNOWN_FILES, resolve
from mobileclip.presets import PRESETS, canonical_name
from mobileclip.weights import find_weights, weight_shapes
from runtime.errors import CheckpointError

ROOT = Path(__file__).resolve().parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def tiny_weights() -> bytes:
    header = json.dumps({"logit_scale": {"dtype": "F32", "shape": [200], "data_offsets": [0, 800]}}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(800)


WEIGHTS = tiny_weights()
FILES = {"model.safetensors": WEIGHTS, "config.json": b'{"architecture": "fastvit_mci0"}', "README.md": b"# card", "onnx/model.onnx": b"x" * 99}

# Repository -> its files. What goes wrong with it is in its name.
REPOSITORIES = {
    "apple/MobileCLIP-S0": {"mobileclip_s0.pt": WEIGHTS, "README.md": b"# card"},
    "o/good": FILES,
    "o/gated": FILES,
    "o/cut": FILES,
    "o/wrong-bytes": FILES,
    "o/too-short": FILES,
    "o/two": {"a.safetensors": WEIGHTS, "b.pt": WEIGHTS},
    "o/none": {"README.md": b"# card"},
}


class Hub(BaseHTTPRequestHandler):
    """The few endpoints that snapshot_download asks for."""

    asked: list[str]

    def log_message(self, *args: object) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None, length: int | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body) if length is None else length), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.server.asked.append(f"{self.command} {self.path}")  # type: ignore[attr-defined]
        path = self.path.split("?")[0].strip("/")
        if path.startswith("api/models/"):
            return self.about("/".join(path.split("/")[2:4]), path.split("/")[4:])
        owner, name, _, _, file = path.split("/", 4)
        return self.file(f"{owner}/{name}", file)

    def about(self, repo: str, rest: list[str]) -> None:
        if repo == "o/private":
            return self.answer(401, b"Invalid username or password.")
        if repo == "o/forbidden":
            return self.answer(403, b"no", {"X-Error-Message": "no"})
        if repo == "o/broken":
            return self.answer(500, b"no")
        if repo == "o/silent":
            time.sleep(8)
            return self.answer(500)
        if repo not in REPOSITORIES:
            return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        if rest[0] == "revision" and rest[1] not in ("main", "v1", COMMIT):
            return self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        files = REPOSITORIES[repo]
        if rest[0] == "tree":
            found: object = [{"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()} for path, data in files.items()]
        else:
            found = {"id": repo, "sha": COMMIT, "siblings": [{"rfilename": path} for path in files]}
        return self.answer(200, json.dumps(found).encode(), {"Content-Type": "application/json"})

    def file(self, repo: str, name: str) -> None:
        if repo == "o/gated":
            return self.answer(403, b"", {"X-Error-Code": "GatedRepo"})
        data = REPOSITORIES[repo][name]
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(data).hexdigest()}"', "Accept-Ranges": "bytes"}
        if name.endswith(".json") or self.command == "HEAD":
            return self.answer(200, data, headers)
        if repo == "o/wrong-bytes":
            return self.answer(200, data[:-1] + b"\1", headers)
        if repo == "o/too-short":
            return self.answer(200, data[:-100], headers)
        if repo == "o/cut":
            start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
            headers |= {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if start else {}
            self.answer(206 if start else 200, data[start:500], headers, length=len(data) - start)
            self.close_connection = True
            return None
        return self.answer(200, data, headers)


@pytest.fixture(scope="module")
def hub() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.daemon_threads = True
    server.asked = []  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def address(server: ThreadingHTTPServer) -> str:
    return f"http://127.0.0.1:{server.server_address[1]}"


DEAD = "http://127.0.0.1:9"  # nobody listens: the connection is refused at once


def run(home: Path, *pretrained: str, endpoint: str = DEAD, before: str = "", **environment: str) -> Any:
    """resolve(…) of each in one new process: {"path"} or {"error", "type"}, and {"seconds"}; a list when there are several."""
    code = f"""
import json, sys, time
from mobileclip import hub
{before}
outcomes = []
for pretrained in {pretrained!r}:
    started = time.monotonic()
    try:
        found = {{"path": str(hub.resolve(pretrained))}}
    except Exception as error:
        found = {{"error": str(error), "type": type(error).__name__}}
    outcomes.append({{**found, "seconds": time.monotonic() - started, "torch": "torch" in sys.modules}})
print(json.dumps(outcomes))
"""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGINGFACE_", "TRANSFORMERS_")) and "proxy" not in name.lower()}
    env = {**clean, "PYTHONPATH": str(ROOT), "HF_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_TELEMETRY": "1", **environment}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=home, env=env, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    outcomes = json.loads(done.stdout.splitlines()[-1])
    for found in outcomes:
        assert found["torch"] is False
        assert found.get("type", "CheckpointError") == "CheckpointError", found
        assert "\n" not in found.get("error", "")
    return outcomes if len(pretrained) > 1 else outcomes[0]


def fill_cache(home: Path, repo: str, files: dict[str, bytes], revision: str = "main") -> Path:
    """The library's layout: blobs by hash, snapshots of links, refs from a name to a commit."""
    folder = home / "hub" / ("models--" + repo.replace("/", "--"))
    snapshot = folder / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (folder / "blobs").mkdir()
    (folder / "refs").mkdir()
    (folder / "refs" / revision).write_text(COMMIT, encoding="utf-8")
    for name, data in files.items():
        blob = folder / "blobs" / hashlib.sha256(data).hexdigest()
        blob.write_bytes(data)
        (snapshot / name).symlink_to(os.path.relpath(blob, snapshot))
    return snapshot


def test_a_path_comes_back_checked(tmp_path, monkeypatch):
    (tmp_path / "model.safetensors").write_bytes(WEIGHTS)
    assert resolve(tmp_path / "model.safetensors") == tmp_path / "model.safetensors"
    assert resolve(str(tmp_path)) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/model.safetensors") == tmp_path / "model.safetensors"
    (tmp_path / "other.pt").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"2 files that may be the weights: model\.safetensors, other\.pt"):
        resolve(tmp_path)


@pytest.mark.parametrize(
    ("pretrained", "expected"),
    [
        ("no/such/file.pt", "'no/such/file.pt' is neither a file nor a folder; check the path, or give hf-hub:owner/name or None"),
        ("apple/MobileCLIP-S0", "neither a file nor a folder; if you mean the hub's repository, write 'hf-hub:apple/MobileCLIP-S0'"),
        ("datacompdr", "neither a file nor a folder"),
        ("https://huggingface.co/apple/MobileCLIP-S0/resolve/main/mobileclip_s0.pt", "is a URL; expected a path, hf-hub:owner/name or None; write 'hf-hub:apple/MobileCLIP-S0'"),
        ("https://example.org/mobileclip_s0.pt", "is a URL; expected a path, hf-hub:owner/name or None; download the file and give its path"),
        ("hf://apple/MobileCLIP-S0", "is a URL"),
        ("hf-hub:", "is no hub id"),
        ("hf-hub:MobileCLIP-S0", "is no hub id; expected hf-hub:owner/name or hf-hub:owner/name@revision"),
        ("hf-hub:a/b/c", "is no hub id"),
        ("hf-hub:../b", "is no hub id"),
        ("hf-hub:a/b@", "is no hub id"),
        ("hf-hub:a/b@../../secret", "is no hub id"),
    ],
)
def test_what_names_nothing_is_refused(pretrained, expected):
    with pytest.raises(CheckpointError) as caught:
        resolve(pretrained)
    assert expected in str(caught.value)


def test_known_repositories_are_models_that_we_know():
    assert {canonical_name(repo) for repo in KNOWN_FILES} <= set(PRESETS)
    assert all(Path(name).suffix in (".pt", ".safetensors") for name in KNOWN_FILES.values())


def test_the_cache_serves_without_a_connection(tmp_path):
    snapshot = fill_cache(tmp_path, "apple/MobileCLIP-S0", {"mobileclip_s0.pt": WEIGHTS, "config.json": b"{}"})
    for found in run(tmp_path, "hf-hub:apple/MobileCLIP-S0", "hf_hub:apple/MobileCLIP-S0", f"hf-hub:apple/MobileCLIP-S0@{COMMIT}"):
        assert found["path"] == str(snapshot)
        assert found["seconds"] < 10
    assert find_weights(snapshot).name == "mobileclip_s0.pt"


def test_the_cache_serves_when_the_network_is_forbidden(tmp_path):
    fill_cache(tmp_path, "o/good", {"model.safetensors": WEIGHTS}, revision="v1")
    moved = tmp_path / "elsewhere"
    (tmp_path / "hub").rename(moved)
    there, missing = run(tmp_path, "hf-hub:o/good@v1", "hf-hub:o/good", HF_HUB_OFFLINE="1", HF_HUB_CACHE=str(moved))
    assert there["path"].startswith(str(moved))
    assert "HF_HUB_OFFLINE forbids to ask the hub" in missing["error"]
    assert str(moved) in missing["error"]


def test_without_connection_and_cache_it_says_what_to_download_and_where_to_put_it(tmp_path):
    apple, timm, unknown = run(tmp_path, "hf-hub:apple/MobileCLIP-S0", "hf-hub:timm/MobileCLIP2-S0-OpenCLIP", "hf-hub:o/unknown")
    assert "asking the hub failed (ConnectError" in apple["error"]
    assert "download mobileclip_s0.pt from https://huggingface.co/apple/MobileCLIP-S0, put it into any folder and give that path as pretrained=" in apple["error"]
    assert apple["seconds"] < 10
    assert "download open_clip_model.safetensors from https://huggingface.co/timm/MobileCLIP2-S0-OpenCLIP" in timm["error"]
    assert "download its weights file (.safetensors or .pt) from https://huggingface.co/o/unknown" in unknown["error"]


def test_a_cache_without_the_weights_is_no_cache(tmp_path):
    fill_cache(tmp_path, "o/good", {"config.json": b"{}"})
    snapshot = fill_cache(tmp_path, "o/two", {"a.pt": WEIGHTS, "b.pt": WEIGHTS + b" "})
    (snapshot / "b.pt").resolve().unlink()  # a link without its blob does not count
    fill_cache(tmp_path, "o/three", {"a.pt": WEIGHTS, "b.pt": WEIGHTS + b" "})
    empty, one, several = run(tmp_path, "hf-hub:o/good", "hf-hub:o/two", "hf-hub:o/three")
    assert "cannot be had" in empty["error"]
    assert one["path"] == str(snapshot)
    assert "has 2 files that may be the weights: a.pt, b.pt" in several["error"]


@pytest.mark.parametrize(
    "before",
    [
        "import socket\nhub.TIMEOUT = 0.4\nsocket.getaddrinfo = lambda *a, **k: time.sleep(50)",
        "hub.TIMEOUT = 0.4",
    ],
    ids=["name look-up", "answer"],
)
def test_a_network_that_swallows_everything_is_given_up(before, hub, tmp_path):
    found = run(tmp_path, "hf-hub:o/silent", endpoint=address(hub) if "socket" not in before else "http://hub.invalid", before=before)
    assert "cannot be had" in found["error"]
    assert "Timeout" in found["error"]
    assert found["seconds"] < 5


def test_a_download_fetches_the_weights_and_configs_once(hub, tmp_path):
    hub.asked.clear()
    first, again, tagged = run(tmp_path, "hf-hub:o/good", "hf-hub:o/good", "hf-hub:o/good@v1", endpoint=address(hub))
    snapshot = Path(first["path"])
    assert again["path"] == tagged["path"] == str(snapshot)
    assert sorted(path.name for path in snapshot.iterdir()) == ["config.json", "model.safetensors"]
    assert weight_shapes(find_weights(snapshot)) == {"logit_scale": (200,)}
    assert sum("GET /o/good/resolve" in line for line in hub.asked) == 2
    assert run(tmp_path, "hf-hub:o/good")["path"] == str(snapshot)  # and now without a connection


ANSWERS = {
    "hf-hub:o/gone": "is not there or private (HTTP 404); check its owner and name at https://huggingface.co/o/gone",
    "hf-hub:o/private": "is not there or private (HTTP 401)",
    "hf-hub:o/forbidden": "is closed to you (HTTP 403): its terms must be accepted or access granted; open https://huggingface.co/o/forbidden",
    "hf-hub:o/gated": "is closed to you (HTTP 403)",
    "hf-hub:o/good@v9": "has no revision 'v9'; see https://huggingface.co/o/good/commits/main",
    "hf-hub:o/broken": "asking the hub failed (HTTP 500)",
    "hf-hub:o/two": "https://huggingface.co/o/two has 2 files that may be the weights: a.safetensors, b.pt",
    "hf-hub:o/none": "https://huggingface.co/o/none has no weights: it holds README.md",
    "hf-hub:o/too-short": "downloading model.safetensors of https://huggingface.co/o/too-short stopped",
    "hf-hub:o/wrong-bytes": "was damaged on its way: sha256 is",
}


def test_what_the_hub_answers_becomes_one_sentence(hub, tmp_path):
    for (pretrained, expected), found in zip(ANSWERS.items(), run(tmp_path, *ANSWERS, endpoint=address(hub)), strict=True):
        assert expected in found["error"], pretrained
        assert found["seconds"] < 10
    for found in run(tmp_path, *ANSWERS):
        assert "cannot be had" in found["error"]  # nothing of it was left in the cache


def test_a_body_that_is_cut_off_again_and_again_is_given_up(hub, tmp_path):
    found = run(tmp_path, "hf-hub:o/cut", endpoint=address(hub))
    assert "downloading model.safetensors of https://huggingface.co/o/cut stopped (RemoteProtocolError" in found["error"]
    assert "run the same again, or download its weights file" in found["error"]
    assert found["seconds"] < 15
    assert not list((tmp_path / "hub").rglob("*.incomplete"))


def test_what_is_in_the_cache_serves_when_the_hub_refuses(hub, tmp_path):
    snapshot = fill_cache(tmp_path, "o/private", {"model.safetensors": WEIGHTS})
    assert run(tmp_path, "hf-hub:o/private", endpoint=address(hub))["path"] == str(snapshot)


def test_without_the_hub_library_the_extra_is_named(tmp_path):
    code = "import sys\nsys.modules['huggingface_hub'] = None\nfrom mobileclip.hub import resolve\nresolve('hf-hub:apple/MobileCLIP-S0')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert "MissingExtraError: pretrained='hf-hub:apple/MobileCLIP-S0' needs the package 'huggingface_hub'" in done.stderr
