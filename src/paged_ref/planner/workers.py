"""Runs simulations on all cores, or on a Dask cluster, with joblib. Ctrl-C ends all of them."""

from __future__ import annotations

import contextlib
import signal
import threading
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from joblib import Parallel, delayed, parallel_config

from ..tuned.threads import cores

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Workers:
    """Where calls run: `num_jobs` processes (None: one for each core; 1: in this process), or with `cluster` on the
    workers of the Dask scheduler at that address, which need this package."""

    num_jobs: int | None = None
    cluster: str | None = None

    def run(
        self, calls: Sequence[tuple[Callable[..., T], *tuple[Any, ...]]], on_done: Callable[[], object] = lambda: None
    ) -> list[T]:
        """What each call (a function of a module, then its arguments) returns, in order. `on_done` is called after
        each. What interrupts or fails ends the calls that run: processes are killed, and the cluster forgets them."""
        results: list[Any] = [None] * len(calls)
        with self._configured():
            with _interrupts_ignored():
                started = _parallel([(int,)] * (self.num_jobs or cores()))
            with _closed(started):
                for _ in started:
                    pass
            with _closed(_parallel(calls)) as found:
                for number, result in found:
                    results[number] = result
                    on_done()
        return results

    @contextlib.contextmanager
    def _configured(self) -> Iterator[None]:
        if self.cluster is None:
            with parallel_config("loky", n_jobs=self.num_jobs or cores()):
                yield
            return
        with _client(self.cluster), parallel_config("dask", n_jobs=-1):
            yield


def _parallel(calls: Sequence[tuple[Callable[..., T], *tuple[Any, ...]]]) -> Generator[tuple[int, T], None, None]:
    """(number, result) of each call as it ends. The processes are started, if there are none, before this returns."""
    jobs = (delayed(_numbered)(*call) for call in enumerate(calls))
    found: Generator[tuple[int, T], None, None] = Parallel(return_as="generator_unordered", batch_size=1)(jobs)
    return found


def _numbered(number: int, call: tuple[Callable[..., T], *tuple[Any, ...]]) -> tuple[int, T]:
    function, *args = call
    return number, function(*args)


@contextlib.contextmanager
def _closed(results: Generator[T, None, None]) -> Iterator[Generator[T, None, None]]:
    """Closes the results: calls that still run are ended, with their processes."""
    try:
        yield results
    finally:
        with warnings.catch_warnings(action="ignore"):  # that not all results were taken
            results.close()


@contextlib.contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """A process that starts meanwhile ignores Ctrl-C from its first moment on, and says nothing: this one ends it. So
    does this process, for the milliseconds that the start takes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


@contextlib.contextmanager
def _client(address: str) -> Iterator[None]:
    """A connection to the Dask scheduler. Raises ValueError without one."""
    try:
        from distributed import Client
    except ImportError:
        raise ValueError(
            f"--cluster {address} needs the package distributed: pip install 'paged_ref[cluster]'"
        ) from None
    try:
        client = Client(address, timeout="5s", set_as_default=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"--cluster {address}: no Dask scheduler answers there ({type(error).__name__})") from None
    with client:
        yield
