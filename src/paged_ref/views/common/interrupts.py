"""Ctrl-C ends a command within a second, whatever the command does."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

PATIENCE = 0.7  # seconds that Python has to see an interrupt
STATUS = 130  # 128 and the number of the signal, as shells count
MESSAGE = "paged-ref: interrupted"


@contextmanager
def ends_in_time() -> Iterator[None]:
    """Ctrl-C in this block is a KeyboardInterrupt, as everywhere; but if the block has not ended PATIENCE seconds
    later, the process ends, and its workers with it.

    Python sees an interrupt between two of its own instructions. A compiler, or a product of large matrices, can keep
    it from them for long. The signal's number reaches a pipe immediately. An interrupt that comes in a finalizer is
    dropped by Python; it is raised again a moment later.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    ended = threading.Event()
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reading, ended), daemon=True).start()
    hook, sys.unraisablehook = sys.unraisablehook, _raise_again
    try:
        yield
    finally:
        ended.set()
        sys.unraisablehook = hook
        signal.set_wakeup_fd(before)
        os.close(writing)


class Interrupts:
    """Ctrl-C in `with interrupts:` is a KeyboardInterrupt immediately, except in a block `with interrupts.whole():`,
    which comes to its end first and may take its time. A second Ctrl-C interrupts that block, too."""

    def __init__(self) -> None:
        self._in_whole = self._pending = False

    def __enter__(self) -> Interrupts:
        self._before = signal.signal(signal.SIGINT, self._handle), signal.set_wakeup_fd(-1)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before[0])
        signal.set_wakeup_fd(self._before[1])

    @contextmanager
    def whole(self) -> Iterator[None]:
        self._in_whole = True
        try:
            yield
        finally:
            self._in_whole = False
        if self._pending:
            raise KeyboardInterrupt

    def _handle(self, *_: object) -> None:
        if self._pending or not self._in_whole:
            raise KeyboardInterrupt
        self._pending = True


def _watch(reading: int, ended: threading.Event) -> None:
    """Read the numbers of signals until the pipe is closed."""
    while number := os.read(reading, 1):
        if number[0] == signal.SIGINT and not ended.wait(PATIENCE):
            _end()
    os.close(reading)


def _raise_again(dropped: sys.UnraisableHookArgs) -> None:
    """Called inside the finalizer: an interrupt that is raised here and now would be dropped, too."""
    if dropped.exc_type is KeyboardInterrupt:
        threading.Timer(0.01, signal.raise_signal, [signal.SIGINT]).start()
    else:
        sys.__unraisablehook__(dropped)


def _end() -> None:
    """End this process here and now. A progress bar may have hidden the cursor."""
    for worker in multiprocessing.active_children():
        worker.kill()
    shown = "\r\x1b[?25h" if os.isatty(2) else ""
    os.write(2, f"{shown}{MESSAGE}\n".encode())
    os._exit(STATUS)
