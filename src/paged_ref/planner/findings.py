"""Measured numbers beside published ones: a finding, a figure of findings, and a cache of their runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from .workers import Workers

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
    """The runs that the figures need, each only once."""

    def __init__(self, workers: Workers, on_run: Callable[[], object] = lambda: None) -> None:
        """`on_run` is called after each run."""
        self._workers, self._on_run = workers, on_run
        self._known: dict[tuple[Any, ...], Any] = {}

    def all(self, function: Callable[..., T], jobs: Iterable[tuple[Any, ...]]) -> list[T]:
        """What `function` returns for the arguments of each job, in order."""
        calls = [(function, *job) for job in jobs]
        missing = [call for call in dict.fromkeys(calls) if call not in self._known]
        self._known |= zip(missing, self._workers.run(missing, self._on_run), strict=True)
        return [self._known[call] for call in calls]
