"""How every command writes a file: checked before the work starts, whole or not at all, one sentence where it fails."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ... import timeline

if TYPE_CHECKING:
    from ...timeline.events import Event, Log

ROOM = 4096  # bytes: a disk that has not even these is full


def check_writable(path: Path, name: str = "") -> None:
    """Raise ValueError, with `name` (the option) before the path, where `path` cannot become a file. Writes nothing."""
    folder = path.resolve().parent
    if path.is_dir():
        reason: str | None = "it is a directory"
    elif not folder.is_dir():
        reason = f"there is no directory {path.parent}"
    elif path.exists() and not os.access(path, os.W_OK):
        reason = "it is read-only"
    elif path.exists() and not (path.is_file() and os.access(folder, os.W_OK)):  # as write_text: it stays where it is
        reason = None
    else:
        reason = _why_not_in(folder)
    if reason is not None:
        raise _error(f"{name} {path}".strip(), reason)


def check_folder(path: Path, name: str = "") -> None:
    """Raise ValueError where `path` is no directory for new files, and cannot become one. Makes nothing."""
    there = next(place for place in (path, *path.absolute().parents) if place.exists())
    if (reason := _why_not_in(there)) is not None:
        raise _error(f"{name} {path}".strip(), reason)


def _why_not_in(folder: Path) -> str | None:
    """Why no file can be made in the folder: the rights, the file system, a full disk; None where one can."""
    try:
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(ROOM))
    except OSError as error:
        return f"no file can be made in {folder}: {error.strerror}"
    return None


def write_text(path: Path, text: str) -> None:
    """Write the file in one step: a reader sees the old content or the new one. Raises ValueError."""
    with _named(path):
        if (path.exists() and not path.is_file()) or not os.access(path.parent, os.W_OK):
            path.write_text(text, encoding="utf-8")  # a pipe or a device, or a place that takes no second file
            return
        target = path.resolve()  # a symbolic link stays one
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
            whole = Path(folder) / target.name
            whole.write_text(text, encoding="utf-8")
            if target.exists():
                whole.chmod(target.stat().st_mode)
            whole.replace(target)


def write_json(path: Path, value: Any) -> None:
    """`value` as indented JSON. Raises ValueError where the file cannot be written."""
    write_text(path, json.dumps(value, indent=1) + "\n")


@contextlib.contextmanager
def recording(path: Path | None) -> Iterator[Log | None]:
    """What writes each event to the file as one line, for `viz` and `monitor`; None without a path.

    The file is open before anything runs, and grows line by line: `monitor` follows it meanwhile. Raises ValueError.
    """
    if path is None:
        yield None
        return
    what = f"--record {path}"
    with _named(what):
        file = path.open("w", encoding="utf-8", buffering=1)

    def log(event: Event) -> None:
        with _named(what):
            timeline.events.write_events([event], file)

    try:
        yield log
    finally:
        with _named(what):
            file.close()


@contextlib.contextmanager
def _named(what: object) -> Iterator[None]:
    """An OSError in this block becomes a ValueError that names the file."""
    try:
        yield
    except OSError as error:
        raise _error(what, error.strerror) from None


def _error(what: object, reason: str | None) -> ValueError:
    return ValueError(f"{what} cannot be written: {reason}")
