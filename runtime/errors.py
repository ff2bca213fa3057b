"""The error tree of the whole project.

    ClipError                     anything a user can cause or meet; the CLI prints it as one sentence and exits 1
    ├── PairsError                a pairs folder or one of its shards is unusable
    │   └── ImageError            one picture does not decode (callers may skip and count it)
    ├── StoreError                a reinforcement store is missing, incomplete or disagrees with itself
    ├── CheckpointError           a checkpoint's keys, shapes, config or layout are not what was expected
    ├── BundleError               a bundle or its manifest is missing, changed or not understood
    ├── ParityError               an exported artefact does not give the checkpoint's embeddings
    ├── RecipeError               a recipe or setting is unknown or contradicts another one
    ├── TrainingError             training cannot go on (diverged, or its data changed under it)
    ├── SampleError               a sample data set cannot be fetched, checked or drawn
    ├── SearchError               a photo index is missing, damaged, held by another process or of another model; or a query is empty
    ├── DeviceError               a device cannot be reached or measured
    └── MissingExtraError         an optional dependency is not installed; the message names the extra

Messages say what was wrong, what was found, what was expected and what to do.
"""

from __future__ import annotations


def shown(text: str) -> str:
    """Text for people: bytes that are no text and control characters as \\xNN."""
    return "".join(
        f"\\x{ord(sign) - 0xDC00:02x}" if 0xDC80 <= ord(sign) <= 0xDCFF else sign if sign.isprintable() else sign.encode("unicode_escape", "backslashreplace").decode()
        for sign in text
    )


class ClipError(Exception):
    """Base of every error that this project raises on purpose. Its message may name what a stranger's file says: it stays one line of printable letters."""

    def __str__(self) -> str:
        said = super().__str__()
        return said if said.isprintable() else shown(said)


class PairsError(ClipError):
    """A pairs folder, shard, caption or sidecar cannot be used."""


class ImageError(PairsError):
    """One picture cannot be decoded."""


class StoreError(ClipError):
    """A reinforcement store cannot be read, written or trusted."""


class CheckpointError(ClipError):
    """A checkpoint does not match its config or the model it is loaded into."""


class BundleError(ClipError):
    """A bundle cannot be read or does not match its manifest."""


class ParityError(ClipError):
    """An artefact's embeddings differ from the checkpoint's by more than its threshold."""


class RecipeError(ClipError):
    """An unknown recipe or an impossible combination of settings."""


class TrainingError(ClipError):
    """Training stopped because going on would be wrong."""


class SampleError(ClipError):
    """A sample data set cannot be made."""


class DeviceError(ClipError):
    """A device cannot be reached or measured."""


class SearchError(ClipError):
    """A photo index cannot be used, or not in this way."""


class MissingExtraError(ClipError):
    """An optional dependency is absent."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs the package '{package}', which is not installed; install it with: pip install 'mobileclip-edge[{extra}]'")
        self.package = package
        self.extra = extra
