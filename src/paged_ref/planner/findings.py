"""Measured numbers beside published ones: a finding, a figure of findings, and a cache of their runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from .sweep import Call, T


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
    """Makes the runs that the figures need, on all cores, and each run only once."""

    def __init__(self, call: Call, threads: ThreadPoolExecutor, on_run: Callable[[], None] | None = None) -> None:
        self._call, self._threads, self._on_run = call, threads, on_run
        self._known: dict[tuple[Any, ...], Future[Any]] = {}

    def all(self, function: Callable[..., T], jobs: Iterable[tuple[Any, ...]]) -> list[T]:
        """What `function` returns for the arguments of each job, in order."""
        waiting = []
        for job in jobs:
            key = (function, *job)
            if key not in self._known:
                self._known[key] = self._threads.submit(self._one, function, job)
            waiting.append(self._known[key])
        return [future.result() for future in waiting]

    def _one(self, function: Callable[..., T], job: tuple[Any, ...]) -> T:
        result = self._call(function, *job)
        if self._on_run:
            self._on_run()
        return result
