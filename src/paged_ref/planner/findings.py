"""Measured numbers beside published ones: a finding, a figure of findings, and a cache of their runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from threading import Lock
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Finding:
    """One number. Without a band it is only shown."""

    what: str
    ours: float
    paper: float | str  # a word where the paper prints no number
    unit: str
    low: float | None = None
    high: float | None = None

    @property
    def met(self) -> bool | None:
        if self.low is None and self.high is None:
            return None
        return (self.low is None or self.ours >= self.low) and (self.high is None or self.ours <= self.high)


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure of the paper."""

    key: str
    title: str
    findings: list[Finding]
    setting: str  # what was run
    why: list[str]  # the reasons of the bands, and of the differences


class RunCache:
    """The runs that the figures need, each only once. Figures may be made at the same time, in several threads."""

    def __init__(self, executor: Executor, on_run: Callable[[], object] = lambda: None) -> None:
        """`on_run` is called after each run."""
        self._executor, self._on_run = executor, on_run
        self._known: dict[tuple[Any, ...], Future[Any]] = {}
        self._lock = Lock()

    def all(self, function: Callable[..., T], jobs: Iterable[tuple[Any, ...]]) -> list[T]:
        """What `function` returns for the arguments of each job, in order."""
        return [future.result() for future in [self._run(function, *job) for job in jobs]]

    def _run(self, *call: Any) -> Future[Any]:
        with self._lock:
            if call not in self._known:
                self._known[call] = self._executor.submit(*call)
                self._known[call].add_done_callback(lambda _: self._on_run())
            return self._known[call]
