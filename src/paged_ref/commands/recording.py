"""`--record FILE`: where a command writes what happens, as JSON lines for `viz FILE` and `monitor FILE`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO


@contextmanager
def record_to(path: Path | None) -> Iterator[TextIO | None]:
    """The file, open before anything runs; None without a path. Raises ValueError where it cannot be written."""
    if path is None:
        yield None
        return
    try:
        file = path.open("w", encoding="utf-8", buffering=1)  # whole lines, for who follows it (paged-ref monitor)
    except OSError as error:
        raise ValueError(f"--record {path} cannot be written: {error.strerror}") from None
    with file:
        yield file
