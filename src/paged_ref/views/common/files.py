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


def check_writable(path: Path, name: str = "") -> None:
    """Raise ValueError, with `name` (the option) before the path, where `path` cannot become a file. Writes nothing."""
    folder = path.parent
    if path.is_dir():
        reason = "it is a directory"
    elif not folder.is_dir():
        reason = f"there is no directory {folder}"
    elif not os.access(path if path.exists() else folder, os.W_OK):
        reason = "it is read-only" if path.exists() else f"the directory {folder} is read-only"
    else:
        return
    raise _error(f"{name} {path}".strip(), reason)


def write_text(path: Path, text: str) -> None:
    """Write the file in one step: a reader sees the old content or the new one. Raises ValueError."""
    try:
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
    except OSError as error:
        raise _error(path, error.strerror) from None


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
    try:
        file = path.open("w", encoding="utf-8", buffering=1)
    except OSError as error:
        raise _error(f"--record {path}", error.strerror) from None

    def log(event: Event) -> None:
        try:
            timeline.events.write_events([event], file)
        except OSError as error:
            raise _error(f"--record {path}", error.strerror) from None

    with file:
        yield log


def _error(what: object, reason: str | None) -> ValueError:
    return ValueError(f"{what} cannot be written: {reason}")
