"""Files that are whole or not there."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import pytest

from runtime.files import write_whole


def test_threads_may_write_the_same_file_at_once(tmp_path: Path) -> None:
    """As the students of one experiment do with their common recipe: whoever is last wins, nobody fails, nothing is left over."""
    place, errors = tmp_path / "recipe.json", []
    start = threading.Barrier(8)

    def work(n: int) -> None:
        start.wait()
        try:
            for _ in range(20):
                write_whole(place, str(n).encode() * 1000)
        except OSError as error:
            errors.append(error)

    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(switch)
    assert errors == []
    assert len(set(place.read_text())) == 1
    assert list(tmp_path.iterdir()) == [place]


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    place = tmp_path / "file"
    write_whole(place, b"old")
    with pytest.raises(TypeError):
        write_whole(place, "no bytes")  # type: ignore[arg-type]
    assert place.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [place]
