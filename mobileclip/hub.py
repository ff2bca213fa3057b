"""What `pretrained=` names: a file, a folder, or a repository of the Hugging Face hub, fetched once and kept in the hub's own cache.

The cache is huggingface_hub's (HF_HOME, HF_HUB_CACHE); HF_HUB_OFFLINE, HF_ENDPOINT and HF_TOKEN are obeyed by that library.
"""

from __future__ import annotations

import glob
import os
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar, cast

from mobileclip.weights import find_weights, the_weights, weights_candidates
from runtime.errors import CheckpointError, MissingExtraError
from runtime.files import file_sha256

T = TypeVar("T")

TIMEOUT = 5.0
"""Seconds to wait for the hub's first answer; without one the cache has to do."""

_PREFIX = re.compile(r"hf[-_]hub:", re.IGNORECASE)
_NAME = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
_REVISION = re.compile(r"[\w][\w./-]*")

# Files by repository, from Apple's model cards and the configs of open_clip: what to download where there is no connection.
_PICKLES = {f"apple/MobileCLIP-{size}": f"mobileclip_{size.lower()}.pt" for size in ("S0", "S1", "S2", "S3", "S4", "B")}
_PICKLES |= {f"apple/MobileCLIP2-{size}": f"mobileclip2_{size.lower()}.pt" for size in ("S0", "S2", "S3", "S4", "B")}
_PICKLES |= {"apple/MobileCLIP-B-LT": "mobileclip_blt.pt", "apple/MobileCLIP2-L-14": "mobileclip2_l14.pt"}
_OPEN_CLIP = [f"apple/MobileCLIP-{size}-OpenCLIP" for size in ("S1", "S2", "B", "B-LT")]
_OPEN_CLIP += [f"timm/MobileCLIP2-{size}-OpenCLIP" for size in ("S0", "S2", "S3", "S4", "B", "L-14")]
KNOWN_FILES = _PICKLES | dict.fromkeys(_OPEN_CLIP, "open_clip_model.safetensors")
"""The weights file of repositories that this project knows."""


def resolve(pretrained: str | os.PathLike[str]) -> Path:
    """The file or folder that `pretrained` names, there and holding weights.

    Args:
        pretrained: a weights file, a folder with one, or "hf-hub:owner/name", optionally with "@revision".

    Returns:
        The path as given, or the hub's folder of that revision in the cache (`weights.find_weights` tells its file).

    Raises:
        CheckpointError: nothing there, a URL, no such repository, terms not accepted, a download that failed, or no connection
            and nothing in the cache: the message then says which file to fetch from where.
        MissingExtraError: huggingface_hub is not installed.
    """
    text = os.fspath(pretrained)
    prefix = _PREFIX.match(text)
    if prefix:
        repo, _, revision = text[prefix.end() :].partition("@")
        if not _NAME.fullmatch(repo) or (revision and (not _REVISION.fullmatch(revision) or ".." in revision)) or text.endswith("@"):
            raise CheckpointError(f"'{text}' is no hub id; expected hf-hub:owner/name or hf-hub:owner/name@revision, as in hf-hub:apple/MobileCLIP2-S0")
        return _from_hub(repo, revision or "main")
    if "://" in text:
        page = re.match(r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)", text)
        do = f"write 'hf-hub:{page[1]}'" if page else "download the file and give its path"
        raise CheckpointError(f"pretrained '{text}' is a URL; expected a path, hf-hub:owner/name or None; {do}")
    path = Path(text).expanduser()
    if path.is_dir():
        find_weights(path)
    elif not path.is_file():
        do = f"if you mean the hub's repository, write 'hf-hub:{text}'" if _NAME.fullmatch(text) else "check the path, or give hf-hub:owner/name or None"
        raise CheckpointError(f"pretrained '{text}' is neither a file nor a folder; {do}")
    return path


def _from_hub(repo: str, revision: str) -> Path:
    try:
        from huggingface_hub import HfApi, constants, errors
    except ModuleNotFoundError:
        raise MissingExtraError("huggingface_hub", "train", f"pretrained='hf-hub:{repo}'") from None
    if constants.HF_HUB_OFFLINE:
        return _cached(repo, revision, _offline(repo, "HF_HUB_OFFLINE forbids to ask the hub"))
    try:
        info = _within(2 * TIMEOUT, lambda: HfApi().model_info(repo, revision=revision, timeout=TIMEOUT))
    except errors.RevisionNotFoundError:
        raise CheckpointError(f"hub id 'hf-hub:{repo}' has no revision '{revision}'; see {_page(repo)}/commits/main for those that it has") from None
    except Exception as error:  # of the hub and of whichever HTTP library it uses
        return _cached(repo, revision, _reason(repo, error, "asking the hub"))
    names = [sibling.rfilename for sibling in info.siblings or []]
    weights = the_weights([name for name in names if "/" not in name], f"the hub's repository {_page(repo)}")
    return _fetch(repo, revision, [weights, *(name for name in names if name.endswith(".json") and "/" not in name)])


def _within(seconds: float, ask: Callable[[], T]) -> T:
    """What `ask` returns or raises, or TimeoutError. HTTP timeouts do not cover the look-up of a host's name, which may take a minute."""
    outcome: list[tuple[T | None, Exception | None]] = []

    def run() -> None:
        try:
            outcome.append((ask(), None))
        except Exception as error:  # handed to the caller's thread
            outcome.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise TimeoutError(f"no answer within {seconds:g} s")
    answer, error = outcome[0]
    if error is not None:
        raise error
    return cast("T", answer)


def _cached(repo: str, revision: str, otherwise: str) -> Path:
    """The folder of a revision in the cache; a CheckpointError with the message `otherwise` if its weights are not there."""
    from huggingface_hub import snapshot_download

    try:
        # No pattern: no file is compared with the list of a whole repository, of which only parts are ever fetched.
        folder = Path(snapshot_download(repo, revision=revision, local_files_only=True, allow_patterns=[]))
        names = [entry.name for entry in folder.iterdir() if entry.is_file()]
    except Exception:  # not there, in any of its forms
        names = []
    if not weights_candidates(names):
        raise CheckpointError(otherwise)
    find_weights(folder)
    return folder


def _fetch(repo: str, revision: str, names: list[str]) -> Path:
    """Download files of a repository into the cache; the first of them is the weights."""
    from huggingface_hub import snapshot_download

    started = time.time()
    try:
        folder = snapshot_download(
            repo, revision=revision, allow_patterns=[glob.escape(name) for name in names], etag_timeout=TIMEOUT, max_workers=4, library_name="mobileclip-edge"
        )
    except Exception as error:  # of the hub, the file system and whichever HTTP library
        raise CheckpointError(_reason(repo, error, f"downloading {names[0]}")) from None
    path = Path(folder) / names[0]
    blob = path.resolve()
    # The cache names large files by their sha256, but only their length was compared while downloading.
    if re.fullmatch(r"[0-9a-f]{64}", blob.name) and blob.stat().st_mtime >= started - 2:
        found = file_sha256(blob)
        if found != blob.name:
            for damaged in (path, blob):
                damaged.unlink(missing_ok=True)
            raise CheckpointError(
                f"{names[0]} of {_page(repo)} was damaged on its way: sha256 is {found[:16]}…, the hub says {blob.name[:16]}…; "
                "it was removed from the cache, so run the same again"
            )
    return Path(folder)


def _reason(repo: str, error: Exception, doing: str) -> str:
    """One sentence for what the hub library raised."""
    from huggingface_hub import errors

    answer = getattr(error, "response", None)
    status = getattr(answer, "status_code", None)
    if isinstance(error, errors.GatedRepoError) or status == 403:
        return (
            f"hub id 'hf-hub:{repo}' is closed to you (HTTP {status}): its terms must be accepted or access granted; "
            f"open {_page(repo)}, accept them, run 'hf auth login' (or set HF_TOKEN) and try again"
        )
    if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 404):
        return (
            f"hub id 'hf-hub:{repo}' is not there or private (HTTP {status}); check its owner and name at {_page(repo)}, "
            f"and if it is private, run 'hf auth login' (or set HF_TOKEN) and try again; known ones are {', '.join(list(KNOWN_FILES)[:3])} …"
        )
    if isinstance(error, errors.LocalEntryNotFoundError) or not doing.startswith("downloading"):
        return _offline(repo, f"{doing} failed ({'HTTP ' + str(status) if status else _brief(error)})")
    return f"{doing} of {_page(repo)} stopped ({_brief(error)}); nothing half-finished is used, so run the same again, or {_by_hand(repo)}"


def _offline(repo: str, why: str) -> str:
    from huggingface_hub import constants

    return f"hub id 'hf-hub:{repo}' cannot be had: {why}, and the cache ({constants.HF_HUB_CACHE}) does not hold it; with a connection {_by_hand(repo)}"


def _by_hand(repo: str) -> str:
    file = KNOWN_FILES.get(repo, "its weights file (.safetensors or .pt)")
    return f"download {file} from {_page(repo)}, put it into any folder and give that path as pretrained="


def _page(repo: str) -> str:
    return f"https://huggingface.co/{repo}"


def _brief(error: Exception) -> str:
    text = (str(error).strip().splitlines() or [""])[0].rstrip(".")[:160]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
