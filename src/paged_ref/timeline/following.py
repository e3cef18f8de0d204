"""A log, as it grows or up to its end: the events of its whole lines, as far as they are written.

The writing program may be in the middle of a line, so the bytes after the last line break wait for the rest of
their line. A file that has become shorter was started anew, and is read from its beginning.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from ..extras.reading import JSON_LIMIT, open_file
from .events import Event, PoolOpened, from_json


class Follower:
    """Reads a log in pieces, and never waits: a file that is missing, or has nothing new, gives no events."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_lines = 0  # read, since the beginning of the file
        self.num_bytes = 0  # by the last poll
        self.restarted = False  # found by the last poll: the events before it are of another log
        self._file: BinaryIO | None = None
        self._rest = b""  # of a line that is not whole yet

    @property
    def exists(self) -> bool:
        """The file was there at the last poll."""
        return self._file is not None

    @property
    def in_partial_line(self) -> bool:
        """The log ends in the middle of a line: a program is writing it, or the log was cut off."""
        return bool(self._rest)

    def poll(self, max_bytes: int = 1 << 20) -> list[Event]:
        """The next events, out of at most `max_bytes`. `num_bytes` is 0 when there was nothing new.

        Raises ValueError, one sentence with file and line, for a whole line that is no event, or a log that
        does not begin as one.
        """
        self.restarted = False
        try:
            self._open()
            data = self._file.read(max_bytes) if self._file else b""
        except OSError as error:
            raise ValueError(f"{self.path} cannot be read: {error.strerror}") from None
        self.num_bytes = len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > JSON_LIMIT:
            raise ValueError(f"{self.path}, line {self.num_lines + len(lines) + 1}: more than {JSON_LIMIT} bytes")
        events = []
        for line in lines:
            self.num_lines += 1
            try:
                events.append(from_json(line.decode("utf-8")))
            except UnicodeDecodeError:
                raise ValueError(f"{self.path} is not a log: line {self.num_lines} is no text") from None
            except ValueError as error:
                raise ValueError(f"{self.path}, line {self.num_lines}: {error}") from None
            if self.num_lines == 1 and not isinstance(events[0], PoolOpened):
                name = type(events[0]).__name__
                raise ValueError(f"{self.path}, line 1: a run begins with PoolOpened; this is {name}")
        return events

    def to_the_end(self) -> Iterator[Event]:
        """All events of a log that is not waited for, up to the middle of its last line if it was cut off there. Raises
        ValueError as `poll` does, and for a log that is missing or has no event."""
        open_file(self.path).close()  # raises where the file is missing, which `poll` waits for
        try:
            while (events := self.poll()) or self.num_bytes:
                yield from events
        finally:
            self.close()
        with suppress(ValueError):  # only the line break may be missing: a part of an event is no event
            event = from_json(self._rest.decode("utf-8"))
            self.num_lines, self._rest = self.num_lines + 1, b""
            yield event
        if not self.num_lines:
            what = "has no whole line" if self.in_partial_line else "is empty"
            raise ValueError(f"{self.path} {what}; a log of events as JSON lines is needed (--record writes one)")

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self) -> None:
        if self._file is not None and self.path.exists() and self.path.stat().st_size < self._file.tell():
            self.close()
            self.num_lines, self._rest, self.restarted = 0, b"", True
        if self._file is None and self.path.exists():
            self._file = open_file(self.path)
