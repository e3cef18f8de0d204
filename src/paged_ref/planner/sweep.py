"""How many requests per second each setup serves: the same requests at rising rates, on all cores.

The paper's measure (Kwon et al. 2023, §6.1): the normalised latency of a request is its time from arrival to
end, divided by its output tokens, and what counts is the rate up to which the mean stays low.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

from ..tuned.threads import cores
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


@contextmanager
def on_cores(num_jobs: int | None = None) -> Iterator[Executor]:
    """Runs functions in other processes, `num_jobs` at a time (default: one for each core); 1: in a thread of this one.

    On leaving, calls that have not begun are given up. A script that uses this needs `if __name__ == "__main__"`, since
    each process reads the script again.
    """
    jobs = num_jobs or cores()
    spawn = multiprocessing.get_context("spawn")  # it is not safe to fork a process that has threads
    executor: Executor = (
        ProcessPoolExecutor(jobs, spawn, initializer=_leave_interrupts) if jobs > 1 else ThreadPoolExecutor(1)
    )
    try:
        yield executor
    finally:
        executor.shutdown(cancel_futures=True)


def _leave_interrupts() -> None:
    """Ctrl-C is for the process that shows the results."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def curves_of(
    setups: Sequence[Setup],
    trace: RequestTrace,
    bound: float,
    *,
    num_jobs: int | None = None,
    on_run: Callable[[], object] = lambda: None,
) -> list[Curve]:
    """A curve for each setup, in order. `on_run` is called after each run."""
    with ThreadPoolExecutor(len(setups)) as threads, on_cores(num_jobs) as cores:

        def run(setup: Setup, trace: RequestTrace, rate: float) -> Outcome:
            outcome = cores.submit(run_once, setup, trace, rate).result()
            on_run()
            return outcome

        return list(threads.map(lambda setup: curve_of(setup, trace, bound, run), setups))
