"""How many requests per second each setup serves: the same requests at rising rates, on all cores.

The paper's measure (Kwon et al. 2023, §6.1): the normalised latency of a request is its time from arrival to
end, divided by its output tokens, and what counts is the rate up to which the mean stays low.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from .metrics import Outcome
from .setup import Setup
from .simulate import Simulation
from .traces import RequestTrace, at_rate

AT_ONCE = float("inf")  # rate: all requests arrive at the same time
FIXED = (0.3, 0.6)  # shares of the rate that a setup sustains when all requests arrive together: the flat part
HALVINGS = 6  # of the bracket 0.75 to 1.5 times that rate; what is left of it is 1 %
BRACKET = (0.75, 1.5)


@dataclass(frozen=True, slots=True)
class Point:
    """One run: the requests at one rate."""

    rate: float  # per second
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class Curve:
    """All runs of one setup."""

    setup: Setup
    at_once: Outcome  # all requests arrive at the same time: memory is as full as it gets
    points: list[Point]  # by rate
    bound: float  # on the mean normalised latency, seconds per token
    rate: float  # the highest measured at which the bound held; 0 if it held at none


Run = Callable[[Setup, RequestTrace, float], Outcome]
T = TypeVar("T")


class Call(Protocol):
    """Call a function on a free core, and wait for what it returns."""

    def __call__(self, function: Callable[..., T], *arguments: Any) -> T: ...


def run_once(setup: Setup, trace: RequestTrace, rate: float) -> Outcome:
    """The trace at this rate."""
    return Simulation(setup, at_rate(trace, rate)).run()


def curve_of(setup: Setup, trace: RequestTrace, bound: float, run: Run = run_once) -> Curve:
    """Find the highest rate at which the mean normalised latency stays within `bound`."""
    at_once = run(setup, trace, AT_ONCE)
    most = at_once.requests_per_second
    if not most:
        raise ValueError(f"{setup.label}: none of the requests can be served. {at_once.refusal}")
    points: list[Point] = []

    def holds(rate: float) -> bool:
        outcome = run(setup, trace, rate)
        points.append(Point(rate, outcome))
        return outcome.normalised <= bound

    for share in FIXED:
        holds(share * most)
    low, high = BRACKET[0] * most, BRACKET[1] * most
    if not holds(low):
        low, high = 0.0, low
    elif holds(high):  # a short trace: it ends before a queue is long
        low, high = high, 2 * high
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    points.sort(key=lambda point: point.rate)
    return Curve(setup, at_once, points, bound, low)


RUNS_OF_A_CURVE = 1 + len(FIXED) + 2 + HALVINGS  # at most


def checked_jobs(num_jobs: int | None) -> int:
    """The number of processes; None is one for each core. Raises ValueError."""
    if num_jobs is None:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if num_jobs < 1:
        raise ValueError(f"jobs is {num_jobs}; at least 1 is needed")
    return num_jobs


@contextmanager
def on_cores(num_jobs: int | None = None) -> Iterator[Call]:
    """Functions in other processes, at most `num_jobs` at a time (default: one for each core); 1: in this one.

    Each call waits, so the calls come from threads. On leaving, calls that have not begun are given up. A script that
    uses this needs `if __name__ == "__main__"`, since each process reads the script again.
    """
    jobs = checked_jobs(num_jobs)
    if jobs == 1:
        yield lambda function, *arguments: function(*arguments)
        return
    # Spawned, since it is not safe to fork a process that has threads.
    processes = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), initializer=_leave_interrupts)
    try:
        yield lambda function, *arguments: processes.submit(function, *arguments).result()
    finally:
        processes.shutdown(cancel_futures=True)


def _leave_interrupts() -> None:
    """Ctrl-C is for the process that shows the results."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def curves_of(
    setups: Sequence[Setup],
    trace: RequestTrace,
    bound: float,
    *,
    num_jobs: int | None = None,
    on_run: Callable[[str], None] | None = None,
) -> list[Curve]:
    """A curve for each setup, in order. `on_run` is called with the setup's label after each of its runs."""
    with ThreadPoolExecutor(len(setups) if num_jobs != 1 else 1) as threads, on_cores(num_jobs) as call:

        def counted(setup: Setup, trace: RequestTrace, rate: float) -> Outcome:
            outcome = call(run_once, setup, trace, rate)
            if on_run:
                on_run(setup.label)
            return outcome

        curves = [threads.submit(curve_of, setup, trace, bound, counted) for setup in setups]
        return [curve.result() for curve in curves]
