"""Core ML packages whose image tower takes a picture (a CVPixelBuffer) instead of a tensor: scale and shift are inside, as Vision and the camera give pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import export.to_coreml
from export.draft import Draft, Job

PRECISIONS = export.to_coreml.PRECISIONS
EXTRA = export.to_coreml.EXTRA


def require() -> None:
    """Raises MissingExtraError where coremltools is not installed."""
    export.to_coreml.require()


def drafts(job: Job, precisions: Sequence[str]) -> Iterator[Draft]:
    """The image tower, one package a precision; the text tower takes tokens, so it is in `coreml` alone."""
    if job.tower == "image":
        yield from export.to_coreml.packages(job, precisions, "coreml-image", picture=True)
