"""A photo index: pictures found again by words, by pictures, or both.

import runtime
clip = runtime.load("bundle/")
index = runtime.Index.open("photos.idx", clip)
index.add("Pictures")
index.search("a dog on a beach", k=10)

An index is a folder (docs/index-format.md is normative): who writes it holds its lock, anyone may search it meanwhile.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from runtime.errors import SearchError
from runtime.index_coding import DTYPES, Coding
from runtime.index_files import Files, condition, damaged
from runtime.index_models import check_query_model, identity
from runtime.index_vectors import Vectors

if TYPE_CHECKING:
    from runtime.encoder import Clip
    from runtime.index_adapter import Adapter
    from runtime.index_adding import Report
    from runtime.preprocess import ImageSource

DATABASE, SEGMENTS = "index.sqlite", "segments"
MOST_WIDENED = 4096
"""Rows that a filtered search looks through by rank before it compares every row that passes the filter instead."""


@dataclass(frozen=True, slots=True)
class Hit:
    """A picture that was found.

    Attributes:
        path: absolute; a name that is not UTF-8 has surrogate escapes (`os.fsencode` gives its bytes).
        score: cosine to the query.
        taken: "YYYY-MM-DDTHH:MM:SS", from EXIF or the file's time.
        copies: further files with the same content.
    """

    path: str
    score: float
    taken: str
    copies: tuple[str, ...] = ()


class Index:
    """An open index. Searching may be done from any thread.

    Attributes:
        folder: where it lies.
        settings: dtype, dims, rescore, width and the model that made it.
    """

    def __init__(self, folder: Path, clip: Clip | None = None, adapter: Adapter | None = None, same_space: bool = False) -> None:
        self.folder, self.clip, self.adapter = folder, clip, adapter
        self.files = Files(folder / DATABASE)
        try:
            found = self.files.meta("settings")
            if not isinstance(found, dict):
                raise damaged(folder / DATABASE, "its settings are missing")
            self.settings: dict[str, Any] = found
            if clip is not None:
                check_query_model(folder, self.settings["model"], identity(clip.manifest), adapter, same_space)
            full = Coding(dtype=self.settings["rescore"], dims=self.settings["width"]) if self.settings["rescore"] else None
            self.vectors = Vectors(folder / SEGMENTS, self._main_coding(), full)
            self._version = -1
            with self._moment():
                pass
        except BaseException:
            self.files.close()
            raise

    @classmethod
    def open(
        cls, path: str | os.PathLike[str], clip: Clip | None = None, *, adapter: Adapter | None = None, same_space: bool = False, create: bool = True
    ) -> Index:
        """Open an index; where there is none, make an empty one with the usual settings (`create`).

        Args:
            clip: the model to ask (and add) with. None: only vectors can be asked with.
            adapter: `runtime.index_adapter.read_adapter(FILE)`, when `clip` is a newer model than the one that made the index.
            same_space: take `clip` although another model made the index, because you know that both embed into the same space
                (a student and the teacher that it followed feature by feature).

        Raises:
            SearchError: no index, damaged, or made by another model.
        """
        folder = Path(path)
        if not (folder / DATABASE).is_file():
            if not create or clip is None:
                raise SearchError(f"{folder} is no photo index (it has no {DATABASE}); make one with 'mclip index PICTURES --out {folder}'")
            return cls.create(folder, clip)
        return cls(folder, clip, adapter, same_space)

    @classmethod
    def create(
        cls, path: str | os.PathLike[str], model: Clip | dict[str, Any], *, dtype: str = "float16", dims: int | None = None, rescore: str | None = None
    ) -> Index:
        """Make an empty index.

        Args:
            model: the model that will embed the pictures, or its identity as `runtime.index_models.identity` gives it.
            dtype: of the vectors that are scanned: "float16", "int8" or "binary" (one bit a dimension).
            dims: keep the first `dims` values only (models trained with nested dimensions); None = all.
            rescore: "float16" or "int8": also keep vectors of all dimensions, by which the best candidates are scored again.

        Raises:
            SearchError: there is something already, or a setting makes no sense.
        """
        folder = Path(path)
        clip = None if isinstance(model, dict) else model
        made_by = model if isinstance(model, dict) else identity(model.manifest)
        width = int(made_by["embed_dim"])
        if dtype not in DTYPES or rescore not in (None, "float16", "int8"):
            raise SearchError(f"dtype is {dtype!r} and rescore {rescore!r}; expected one of {', '.join(DTYPES)}, and float16, int8 or none to rescore with")
        if dims is not None and not 1 <= dims <= width:
            raise SearchError(f"dims is {dims}, expected 1 to {width}, the width of the model's embeddings")
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise SearchError(f"{folder} exists already and is not empty; choose another place, or remove it first")
        part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
        try:
            (part / SEGMENTS).mkdir(parents=True)
            files = Files(part / DATABASE, create=True)
            settings = {"dtype": dtype, "dims": dims or width, "rescore": rescore, "width": width, "model": made_by}
            files.set_meta("settings", settings)
            files.close()
            if folder.is_dir():
                folder.rmdir()
            os.replace(part, folder)
        except OSError as error:
            raise SearchError(f"{folder} cannot be made ({error.strerror or error}); choose another place") from error
        finally:
            shutil.rmtree(part, ignore_errors=True)
        return cls(folder, clip)

    def _main_coding(self) -> Coding:
        dtype, dims = self.settings["dtype"], self.settings["dims"]
        if dtype != "binary":
            return Coding(dtype=dtype, dims=dims)
        centre, rotation = (self.files.meta(f"blob.{name}") for name in ("centre", "rotation"))
        if centre is None or rotation is None:
            return Coding(dtype=dtype, dims=dims)
        return Coding(dtype=dtype, dims=dims, centre=np.frombuffer(centre, "<f4"), rotation=np.frombuffer(rotation, "<f4").reshape(dims, dims))

    def __len__(self) -> int:
        """Files that can be found."""
        return int(self.files.rows("SELECT count(*) FROM files WHERE content IS NOT NULL")[0][0])

    def close(self) -> None:
        """Let go of the files."""
        self.vectors.segments = {}
        self.files.close()

    def __enter__(self) -> Index:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def refresh(self, force: bool = False) -> None:
        """See what another process has added since; every search does it."""
        version = self.files.version()
        if version == self._version and not force:
            return
        if self.settings["dtype"] == "binary" and self.vectors.main.centre is None:
            self.vectors.main = self._main_coding()
        self.vectors.open(self.files.segments())
        self._version = version

    @contextmanager
    def _moment(self) -> Iterator[None]:
        """The state of one moment: rows and segments that belong together."""
        for attempt in range(5):
            with self.files.snapshot():
                try:
                    self.refresh()
                except SearchError:
                    pass
                else:
                    yield
                    return
                version = self._version = self.files.version()
            # A writer may have merged segments between the reading of their table and the opening of their files.
            self._version = -1
            if attempt == 4 or self.files.version() == version:
                self.refresh(force=True)

    # ------------------------------------------------------------ adding

    def add(
        self, *paths: str | os.PathLike[str], progress: Callable[[int, int, float], None] | None = None, threads: int | None = None, batch: int = 32
    ) -> Report:
        """Bring the index up to date with folders (or single files): see `runtime.index_adding.add`."""
        from runtime.index_adding import add

        return add(self, [os.fsencode(os.path.abspath(path)) for path in paths], progress=progress, threads=threads, batch=batch)

    def add_vectors(self, paths: Sequence[str | os.PathLike[str]], vectors: np.ndarray, taken: str = "1970-01-01T00:00:00") -> None:
        """Add pictures that were embedded elsewhere by the index's model, float32 (n, width), unit norm; call `settle` after the last.

        Raises:
            SearchError: shapes that do not fit, values that are not finite, or another process writes.
        """
        from runtime.index_writing import add_vectors

        add_vectors(self, [os.fsencode(os.path.abspath(path)) for path in paths], vectors, taken)

    def settle(self) -> None:
        """Merge small segments and make lists for large ones, as `add` does at its end."""
        from runtime.index_writing import settle, writing

        with writing(self):
            settle(self)

    def remove(self, path: str | os.PathLike[str]) -> int:
        """Forget all files at or below a path; the pictures themselves are not touched. Returns how many."""
        from runtime.index_writing import remove

        return remove(self, os.fsencode(os.path.abspath(path)))

    # ------------------------------------------------------------ searching

    def search(
        self,
        text: str | None = None,
        *,
        image: ImageSource | None = None,
        weight: float = 0.5,
        k: int = 10,
        folder: str | os.PathLike[str] | None = None,
        since: str | None = None,
        until: str | None = None,
    ) -> list[Hit]:
        """The k pictures that fit best, best first; fewer when there are no more.

        Args:
            text, image: what to look for. With both, the score is (1 - weight) times the text's plus weight times the picture's cosine.
            folder: only pictures at or below it.
            since, until: only pictures taken from the begin of one date to the end of another: "2024", "2024-05", "2024-05-31" or
                "2024-05-31T18:00", local time.

        Raises:
            SearchError: nothing to look for, or the index is damaged.
        """
        if self.clip is None:
            raise SearchError(f"{self.folder} was opened without a model; give one to Index.open, or search by vector")
        if text is not None and not text.strip():
            raise SearchError("the query is empty; say in words what the picture shows")
        if text is None and image is None:
            raise SearchError("there is nothing to look for; give a text, a picture, or both")
        parts = []
        if text is not None:
            found = self.clip.encode_text([text])[0]
            parts.append(((1 - weight) if image is not None else 1.0, self.adapter.text(found) if self.adapter else found))
        if image is not None:
            found = self.clip.encode_image([image])[0]
            parts.append((weight if text is not None else 1.0, self.adapter.image(found) if self.adapter else found))
        query = np.sum([share * vector for share, vector in parts], axis=0)
        return self.search_vector(np.asarray(query, np.float32), k=k, folder=folder, since=since, until=until)

    def search_vector(
        self, query: np.ndarray, *, k: int = 10, folder: str | os.PathLike[str] | None = None, since: str | None = None, until: str | None = None
    ) -> list[Hit]:
        """As `search`, by float32 (width,); scores are inner products with it."""
        if k < 1:
            raise SearchError(f"k is {k}, expected at least 1")
        query = np.ascontiguousarray(query, np.float32)
        if query.shape != (self.settings["width"],) or not np.isfinite(query).all():
            raise SearchError(f"the query has shape {query.shape}, expected ({self.settings['width']},), all finite")
        where, values = condition(None if folder is None else os.fsencode(os.path.abspath(folder)), since, until)
        with self._moment():
            return self._ranked(query, k, where, values)

    def _ranked(self, query: np.ndarray, k: int, where: str, values: Sequence[Any]) -> list[Hit]:
        want = k + 6 if not where else 4 * k + 64
        while True:
            best, more = self.vectors.best(query, want)
            hits = self._hits(best, k, where, values)
            if len(hits) == k or not more:
                return hits
            if where and want >= MOST_WIDENED:
                return self._filtered(query, k, where, values)
            want *= 8

    def _hits(self, best: list[tuple[float, int, int]], k: int, where: str, values: Sequence[Any]) -> list[Hit]:
        """The first k of ranked rows that belong to files (which pass the filter)."""
        hits: list[Hit] = []
        for start in range(0, len(best), k):
            part = best[start : start + k]
            files = {number: self.files.found(number, [row for _, segment, row in part if segment == number], where, values) for number in {entry[1] for entry in part}}
            for score, segment, row in part:
                paths = files[segment][row]
                if paths and len(hits) < k:
                    hits.append(Hit(os.fsdecode(paths[0][0]), score, paths[0][1], tuple(os.fsdecode(path) for path, _ in paths[1:])))
            if len(hits) == k:
                break
        return hits

    def _filtered(self, query: np.ndarray, k: int, where: str, values: Sequence[Any]) -> list[Hit]:
        """Compare every row that passes the filter."""
        statement = f"SELECT DISTINCT segment, row FROM files JOIN contents ON contents.id = files.content WHERE {where} ORDER BY segment, row"
        allowed: dict[int, list[int]] = {}
        for number, row in self.files.rows(statement, values):
            allowed.setdefault(number, []).append(row)
        best: list[tuple[float, int, int]] = []
        for number, rows in allowed.items():
            segment = self.vectors.segments[number]
            places = np.array(rows, np.int64)
            scores = np.concatenate([segment.exact(part, query) for part in np.array_split(places, -(-len(places) // 4096))])
            best += [(float(score), number, row) for score, row in zip(scores, rows, strict=True)]
        best.sort(key=lambda entry: (-entry[0], entry[1], entry[2]))
        return self._hits(best[: k + 6], k, where, values)

    def duplicates(self, threshold: float = 0.95, progress: Callable[[int, int], None] | None = None) -> list[list[str]]:
        """Groups of files that show the same: equal content, or a chain of cosines of at least `threshold`. Largest group first."""
        from runtime.index_duplicates import duplicates

        return duplicates(self, threshold, progress)

    def verify(self) -> dict[str, Any]:
        """Read every byte and compare it with what was written; facts as `facts`. Raises SearchError at the first difference."""
        from runtime.index_models import verify

        return verify(self)

    def facts(self) -> dict[str, Any]:
        """Counts, settings and the bytes of each part on disk."""
        from runtime.index_models import facts

        return facts(self)
