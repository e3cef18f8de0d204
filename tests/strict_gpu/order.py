"""Streams, events and graphs; and the check that something orders all accesses to the same bytes.

Every operation runs when it is called, on memory of this process. What a GPU may do in another order is found by a
happens-before check with vector clocks. Each operation has a place (stream, number). Each stream, and the host, has a
clock: for each stream the number of its last operation that is surely done. Events, waits and the legacy default stream
carry clocks over. An access to bytes whose last writer (for a write: or last reader) is not done by the clock raises
StreamRace, with both operations and their lines.
"""

from __future__ import annotations

import os
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from .memory import Allocation

HOST = -1  # the host's key in a clock; the other keys are the pointers of streams
OWN_FILES = {
    str(Path(__file__).with_name(f"{name}.py"))
    for name in ("arrays", "functions", "kernels", "memory", "modules", "order")
}
Clock = dict[int, int]


class CUDARuntimeError(RuntimeError):
    """What CUDA itself refuses."""


class StreamRace(AssertionError):  # noqa: N818
    """Two operations touch the same bytes, and nothing orders them."""


class Access(NamedTuple):
    """What an operation reads or writes: a view of an allocation, or the elements `index` of it."""

    allocation: Allocation
    view: np.ndarray
    index: Any = None


Accesses = Sequence[Access] | Callable[[], Sequence[Access]]  # a function is called when the operation has run

# What was done, for tests: operations by name, and waits of the host by name and line.
work: Counter[str] = Counter()
waits: Counter[str] = Counter()


def place() -> str:
    """The line outside this package that asked for the operation."""
    frame: Any = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename in OWN_FILES:
        frame = frame.f_back
    return "?" if frame is None else f"{'/'.join(frame.f_code.co_filename.split(os.sep)[-2:])}:{frame.f_lineno}"


def note_wait(what: str) -> None:
    waits[f"{what} at {place()}"] += 1


# --- operations --------------------------------------------------------------------------------------------------


_words: dict[tuple[int, int], str] = {}  # of each operation: by stream and number
_blocking: list[Stream] = []  # kept, since the default stream waits for them even when nothing else names them
_known: set[int] = set()  # streams since the last `forget`, and those that lived then
_ended: set[int] = set()  # streams that were gone at the last `forget`: all that they did is done
host_clock: Clock = {}


def join(clock: Clock, other: Clock) -> None:
    for stream, number in other.items():
        if clock.get(stream, 0) < number:
            clock[stream] = number


def forget() -> None:
    """All that was done is from now on done for every stream and for the host. Between tests."""
    clocks = [host_clock, *(stream.clock for stream in list(streams.values()))]
    done: Clock = {}
    for clock in clocks:
        join(done, clock)
    _ended.update(_known - set(streams))
    _known.intersection_update(streams)
    for clock in clocks:
        clock.clear()
        clock.update((stream, number) for stream, number in done.items() if stream not in _ended)
    _words.clear()
    _blocking.clear()


def _check(words: str, stream: int, clock: Clock, access: Access, write: bool) -> None:
    for other, number in access.allocation.last_operations(access, write):
        if other != stream and other not in _ended and clock.get(other, 0) < number:
            where = "page-locked host" if access.allocation.on_host else "device"
            raise StreamRace(
                f"{words} {'writes' if write else 'reads'} {where} memory of {access.allocation.size} bytes; nothing "
                f"orders it after {_words.get((other, number), 'an operation before')}"
            )


def _perform(words: str, stream: int, clock: Clock, reads: Sequence[Access], writes: Sequence[Access]) -> None:
    number = clock[stream] = clock.get(stream, 0) + 1
    for write, accesses in ((False, reads), (True, writes)):
        for access in accesses:
            _check(words, stream, clock, access, write)
    _words[stream, number] = words
    for write, accesses in ((False, reads), (True, writes)):
        for access in accesses:
            access.allocation.note(stream, number, access, write)


def host_access(allocation: Allocation, view: np.ndarray, write: bool) -> None:
    """The host itself reads or writes page-locked memory, now."""
    access = [Access(allocation, view)]
    _perform(f"the host at {place()}", HOST, host_clock, () if write else access, access if write else ())


def enqueue(reads: Accesses, writes: Accesses, name: str, run: Callable[[], Any], stream: Stream | None = None) -> None:
    """`run` as the next operation of the stream. While the stream is captured, it is recorded and does not run."""
    stream = current_stream() if stream is None else stream
    work[name] += 1
    if stream.captured is not None:
        stream.captured.append((reads, writes, name, run))
        return
    if stream.ptr == 0 and any(other.captured is not None and other.blocking for other in list(streams.values())):
        raise CUDARuntimeError("cudaErrorStreamCaptureImplicit: the default stream is used during a capture")
    run()
    reads = reads() if callable(reads) else reads
    writes = writes() if callable(writes) else writes
    clock = stream.whole_clock()
    join(clock, host_clock)
    _perform(f"{name} on {stream!r} at {place()}", stream.ptr, clock, reads, writes)


def refuse_in_capture(what: str, stream: Stream | None = None) -> None:
    stream = current_stream() if stream is None else stream
    if stream.captured is not None:
        stream.broken = True
        raise RuntimeError(f"the current stream is capturing, so {what} are disallowed")


# --- events, streams, graphs -------------------------------------------------------------------------------------


class Event:
    def __init__(self, block: bool = False, disable_timing: bool = False, interprocess: bool = False) -> None:
        if interprocess and not disable_timing:
            raise ValueError("Timing must be disabled for interprocess events")
        self.ptr, self.clock, self.timing, self.captured = id(self), Clock(), not disable_timing, False

    def record(self, stream: Stream | None = None) -> None:
        stream = current_stream() if stream is None else stream
        self.captured = stream.captured is not None
        if not self.captured:
            self.clock = dict(stream.whole_clock())

    @property
    def done(self) -> bool:
        return all(host_clock.get(stream, 0) >= number for stream, number in self.clock.items())

    def synchronize(self) -> None:
        note_wait("Event.synchronize")
        if self.captured:
            raise CUDARuntimeError("cudaErrorCapturedEvent: the event was recorded in a captured stream")
        join(host_clock, self.clock)


class Stream:
    null: Stream
    _next = 0x5000

    def __init__(
        self, null: bool = False, non_blocking: bool = False, ptds: bool = False, priority: int | None = None
    ) -> None:
        if ptds or priority is not None:
            raise NotImplementedError("the stand-in has no ptds and no priority")
        if not null:
            Stream._next += 16
        self.ptr = 0 if null else Stream._next
        self.blocking = not null and not non_blocking  # waits for the default stream, and the default stream for it
        self.clock: Clock = {}
        self.captured: list[tuple[Accesses, Accesses, str, Callable[[], Any]]] | None = None
        self.broken = False  # the capture, by something that CUDA forbids
        streams[self.ptr] = self
        _known.add(self.ptr)
        if self.blocking:
            _blocking.append(self)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and self.ptr == other.ptr

    def __hash__(self) -> int:
        return self.ptr

    def __repr__(self) -> str:
        return f"<Stream {self.ptr}>"

    def __enter__(self) -> Stream:
        _stack().append(self)
        return self

    def __exit__(self, *args: object) -> None:
        _stack().pop()

    def use(self) -> Stream:
        _stack()[-1] = self
        return self

    def whole_clock(self) -> Clock:
        """The stream's clock, with what the legacy default stream adds."""
        if self.ptr == 0:
            for other in list(streams.values()):
                if other.blocking:
                    join(self.clock, other.clock)
        elif self.blocking:
            join(self.clock, Stream.null.clock)
        return self.clock

    @property
    def done(self) -> bool:
        return all(host_clock.get(stream, 0) >= number for stream, number in self.clock.items())

    def synchronize(self) -> None:
        note_wait("Stream.synchronize")
        if self.captured is not None:
            self.broken = True
            raise CUDARuntimeError("cudaErrorStreamCaptureUnsupported: a captured stream cannot be waited for")
        join(host_clock, self.whole_clock())

    def record(self, event: Event | None = None) -> Event:
        event = Event() if event is None else event
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        if event.captured and self.captured is None:
            raise CUDARuntimeError("cudaErrorStreamCaptureIsolation: the event belongs to a capture")
        join(self.clock, event.clock)

    def begin_capture(self, mode: int | None = None) -> None:
        if self.ptr == 0:
            raise RuntimeError("cannot capture on the default (legacy) stream")
        if self.captured is not None:
            raise CUDARuntimeError("cudaErrorIllegalState: the stream is captured already")
        self.captured, self.broken = [], False

    def end_capture(self) -> Graph:
        if self.captured is None:
            raise CUDARuntimeError("cudaErrorIllegalState: the stream is not captured")
        graph, self.captured = Graph(), None if self.broken else self.captured
        recorded, self.captured = self.captured, None
        if recorded is None:
            raise CUDARuntimeError("cudaErrorStreamCaptureInvalidated: the capture did what CUDA forbids")
        graph.recorded = recorded
        return graph

    def is_capturing(self) -> bool:
        return self.captured is not None


class Graph:
    recorded: list[tuple[Accesses, Accesses, str, Callable[[], Any]]]

    def launch(self, stream: Stream | None = None) -> None:
        stream = current_stream() if stream is None else stream
        for reads, writes, name, run in self.recorded:
            enqueue(reads, writes, name, run, stream)


streams: weakref.WeakValueDictionary[int, Stream] = weakref.WeakValueDictionary()  # by pointer
Stream.null = Stream(null=True)
_of_thread = threading.local()


def _stack() -> list[Stream]:
    if not hasattr(_of_thread, "stack"):
        _of_thread.stack = [Stream.null]
    stack: list[Stream] = _of_thread.stack
    return stack


def current_stream(device_id: int = -1) -> Stream:
    return _stack()[-1]


def synchronize_device() -> None:
    note_wait("Device.synchronize")
    for stream in list(streams.values()):
        if stream.captured is not None:
            stream.broken = True
            raise CUDARuntimeError("cudaErrorStreamCaptureUnsupported: a stream is captured")
        join(host_clock, stream.clock)
