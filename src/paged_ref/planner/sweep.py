"""Latency over the rate of requests, at shares of the rate that a setup sustains, and its goodput under limits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from .hardware import price_of_million
from .metrics import Limits, Outcome
from .setup import Setup
from .simulate import GENERATIONS, MEASURED_GENERATIONS, Simulation, simulated
from .steady import Steady, steady_state
from .traces import RequestTrace, at_rate, first, repeated
from .workers import Workers

LOADS = (0.3, 0.5, 0.7, 0.8, 0.9)  # shares of the sustained rate; at 1 the queue, and latency with it, has no end
SHOWN = 0.8  # of these: the one whose latency is printed where no limit is given
LEAST_REQUESTS = 1000  # of a run: a shorter trace is repeated
SHOWN_REQUESTS, SAMPLE_EVERY, MOST_POINTS = 400, 8, 300  # of a picture of the memory: requests, steps, points
WARM_UP = 0.1  # of the requests of a run, whose latency is left out; more where many run together
MOST_LOAD = (
    0.95  # where goodput is sought: nearer to 1 a queue still grows when a run ends, and its end says too little
)
HALVINGS = 7  # of the rates from 0 to that load: what is left is 0.8 % of it


@dataclass(frozen=True, slots=True)
class Point:
    """One run: the requests at one rate."""

    rate: float  # requests per second that arrive, refused ones included
    outcome: Outcome
    share_met: float | None = None  # of the accepted requests: the share that meets all limits


@dataclass(frozen=True, slots=True)
class Goodput:
    """The highest rate at which enough requests meet the limits, up to MOST_LOAD of the sustained rate."""

    limits: Limits
    rate: float  # of accepted requests; 0 if no rate is low enough
    above: float  # the lowest rate at which too few did; the sustained rate where no rate was too high
    at: Point | None  # the run at `rate`

    def to_json(self) -> dict[str, Any]:
        latency = self.at and {"share_met": self.at.share_met, **self.at.outcome.to_json()}
        return {"goodput": self.rate, "goodput_above": self.above, "limits": self.limits.describe(), "at": latency}


@dataclass(frozen=True, slots=True)
class Served:
    """What one setup serves."""

    steady: Steady
    goodput: Goodput | None  # None: no limits were given

    @property
    def setup(self) -> Setup:
        return self.steady.setup

    @property
    def rate(self) -> float:
        """The headline: goodput where limits are given, else the sustained rate."""
        return self.goodput.rate if self.goodput else self.steady.sustained_rate

    @property
    def price(self) -> float | None:
        """Of 10**6 output tokens at this rate."""
        outcome = self.steady.outcome
        return price_of_million(self.setup.gpu, self.rate * outcome.output_tokens / outcome.finished)

    def to_json(self) -> dict[str, Any]:
        found = self.goodput.to_json() if self.goodput else {"goodput": None}
        return {**self.steady.to_json(), **found, "price_of_million_tokens": self.price}


@dataclass(frozen=True, slots=True)
class Curve(Served):
    """The same, and runs at several rates."""

    points: list[Point]  # by rate

    @property
    def shown(self) -> Point | None:
        """The run whose latency is shown; None where no rate meets the limits."""
        return self.goodput.at if self.goodput else self.points[LOADS.index(SHOWN)]

    def to_json(self) -> dict[str, Any]:
        return {
            "label": self.setup.label,
            **Served.to_json(self),
            "longest_request": self.setup.longest_request(),
            "moved_bytes_per_token": self.steady.outcome.moved_per_token,
            "points": [{"rate": point.rate, **point.outcome.to_json()} for point in self.points],
        }


def run_at(setup: Setup, trace: RequestTrace, rate: float, limits: Limits | None = None) -> Point:
    """The trace at this rate, without its warm-up, repeated until the run is long for the requests that run together.
    It begins in an empty system, where every request is fast."""
    num_requests, running = LEAST_REQUESTS, 0
    while True:
        whole = repeated(trace, -(-num_requests // len(trace.requests)))
        timed = at_rate(whole, rate)
        num_warm_up = max(int(WARM_UP * len(whole.requests)), GENERATIONS * running)
        make = partial(Simulation, trace=timed, num_warm_up=num_warm_up)
        simulation, outcome = simulated(setup, whole, make)
        running = outcome.running_peak
        num_requests = (GENERATIONS + MEASURED_GENERATIONS) * running
        if num_requests <= len(whole.requests):
            return Point(rate, outcome, limits.share_met(simulation.tally.latencies) if limits else None)


def memory_over_time(setup: Setup, trace: RequestTrace, rate: float) -> list[tuple[float, float]]:
    """(seconds, share of the pool that holds tokens) while `SHOWN_REQUESTS` of the trace arrive at this rate."""
    part = first(repeated(trace, -(-SHOWN_REQUESTS // len(trace.requests))), SHOWN_REQUESTS)
    points: list[tuple[float, float]] = []
    simulation = Simulation(
        setup,
        at_rate(part, rate),
        sample_every=SAMPLE_EVERY,
        on_sample=lambda usage: points.append((simulation.now, usage.tokens / usage.total)),
    )
    simulation.run()
    return points[:: -(-len(points) // MOST_POINTS) or 1]


def goodput(steady: Steady, trace: RequestTrace, limits: Limits) -> Goodput:
    """Search the rate by halving. Requests that are refused arrive too, and count neither way."""
    accepted = steady.num_requests / (steady.num_requests + steady.num_refused)

    def tried(rate: float) -> Point:
        return run_at(steady.setup, trace, rate / accepted, limits)

    low, high, at = 0.0, MOST_LOAD * steady.sustained_rate, tried(MOST_LOAD * steady.sustained_rate)
    if at.share_met is not None and at.share_met >= limits.share:
        return Goodput(limits, high, steady.sustained_rate, at)
    best = None
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        at = tried(middle)
        if at.share_met is not None and at.share_met >= limits.share:
            low, best = middle, at
        else:
            high = middle
    return Goodput(limits, low, high, best)


def curves_of(
    setups: Sequence[Setup],
    trace: RequestTrace,
    limits: Limits | None = None,
    *,
    workers: Workers = Workers(),  # noqa: B008  (it is frozen)
    on_run: Callable[[], object] = lambda: None,
) -> list[Curve]:
    """A curve for each setup, in order. `on_run` is called after each of `num_runs` runs."""
    steady = workers.run([(steady_state, setup, trace) for setup in setups], on_run)
    points = workers.run(
        [
            (run_at, each.setup, trace, load * each.sustained_rate * len(trace.requests) / each.num_requests)
            for each in steady
            for load in LOADS
        ],
        on_run,
    )
    found: Sequence[Goodput | None] = [None] * len(setups)
    if limits:
        found = workers.run([(goodput, each, trace, limits) for each in steady], on_run)
    by_setup = [points[i : i + len(LOADS)] for i in range(0, len(points), len(LOADS))]
    return [Curve(*each) for each in zip(steady, found, by_setup, strict=True)]


def num_runs(num_setups: int, limits: Limits | None) -> int:
    """What `curves_of` reports."""
    return num_setups * (1 + len(LOADS) + bool(limits))
