"""What a simulation counts, and the rates, latencies and memory shares that follow."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from statistics import fmean
from typing import Any

from ..core.memory.usage import MemoryUsage


@dataclass(frozen=True, slots=True)
class Shares:
    """Shares of the pool, which sum to 1. MemoryUsage says what each part is."""

    tokens: float
    reserved: float
    internal: float
    external: float
    cached: float
    free: float

    @property
    def used(self) -> float:
        """The share that a new request cannot get."""
        return self.tokens + self.reserved + self.internal + self.external

    @property
    def occupancy(self) -> float:
        """Of the used memory, the share that holds tokens: the paper's "token states"."""
        return _ratio(self.tokens, self.used)


@dataclass(slots=True)
class UsageAverage:
    """Mean memory usage. A sample counts for the seconds for which the memory was so."""

    seconds: float = 0.0
    sums: dict[str, float] = field(default_factory=lambda: {part.name: 0.0 for part in fields(Shares)})

    def add(self, usage: MemoryUsage, seconds: float) -> None:
        self.seconds += seconds
        for part in self.sums:
            self.sums[part] += getattr(usage, part) / usage.total * seconds

    def shares(self) -> Shares:
        return Shares(**{part: _ratio(total, self.seconds) for part, total in self.sums.items()})


@dataclass(kw_only=True, slots=True)
class Counts:
    """What a simulation counts, step by step."""

    refused: int = 0  # requests that could never fit: longer than the context, or than the pool
    refusal: str = ""  # why the first of them was
    cut: int = 0  # outputs that the context ended early
    steps: int = 0
    running_peak: int = 0
    output_tokens: int = 0
    prompt_tokens: int = 0
    known_tokens: int = 0  # of the prompts' tokens: found in the prefix cache
    computed_tokens: int = 0
    recomputed_tokens: int = 0  # of these, computed before and lost by a preemption
    preemptions: int = 0
    bytes_moved: int = 0  # K and V copied on the device
    bytes_swapped: int = 0  # K and V over the host link, both ways


@dataclass(kw_only=True, slots=True)
class Outcome(Counts):
    """One run in numbers. Times are in seconds of the simulated clock, lengths in tokens."""

    label: str
    finished: int
    seconds: float  # from the first arrival to the last end
    first_token: float  # time to first token, mean
    first_token_p99: float
    each_token: float  # time per output token after the first, mean over requests
    normalised: float  # latency / output tokens, mean over requests: the paper's measure (§6.1)
    normalised_p99: float
    running_mean: float  # running sequences, mean over the time in which any ran
    running_short: float  # mean over the time in which a request waited, so that memory was short; else running_mean
    waiting_share: float  # of the time in which sequences ran: the share in which a request waited
    shares: Shares  # mean over the time of running_short
    shares_always: Shares

    @property
    def tokens_per_second(self) -> float:
        return _ratio(self.output_tokens, self.seconds)

    @property
    def requests_per_second(self) -> float:
        return _ratio(self.finished, self.seconds)

    @property
    def hit_rate(self) -> float:
        return _ratio(self.known_tokens, self.prompt_tokens)

    def to_json(self) -> dict[str, Any]:
        """The fields and the properties as plain values."""
        return {
            **asdict(self),
            "tokens_per_second": self.tokens_per_second,
            "requests_per_second": self.requests_per_second,
            "hit_rate": self.hit_rate,
            "tokens_of_used": self.shares.occupancy,
        }


class Tally:
    """Adds a run up while it goes on."""

    def __init__(self) -> None:
        self.counts = Counts()
        self.busy = self.waited = 0.0  # seconds
        self.running_seconds = self.running_waited = 0.0  # sequences x seconds: all, and while a request waited
        self.short, self.always = UsageAverage(), UsageAverage()
        self.first_tokens: list[float] = []
        self.each_tokens: list[float] = []
        self.normalised: list[float] = []

    def refuse(self, why: str) -> None:
        self.counts.refused += 1
        self.counts.refusal = self.counts.refusal or why

    def step(self, num_tokens: int, seconds: float, running: int, waiting: bool) -> None:
        counts = self.counts
        counts.steps += 1
        counts.computed_tokens += num_tokens
        self.busy += seconds
        self.running_seconds += running * seconds
        if running > counts.running_peak:
            counts.running_peak = running
        if waiting:
            self.waited += seconds
            self.running_waited += running * seconds

    def sample(self, usage: MemoryUsage, seconds: float, waiting: bool) -> None:
        self.always.add(usage, seconds)
        if waiting:
            self.short.add(usage, seconds)

    def finish(self, arrival: float, first_token: float, now: float, num_tokens: int) -> None:
        self.counts.output_tokens += num_tokens
        self.first_tokens.append(first_token - arrival)
        self.normalised.append((now - arrival) / num_tokens)
        if num_tokens > 1:
            self.each_tokens.append((now - first_token) / (num_tokens - 1))

    def outcome(self, label: str, seconds: float) -> Outcome:
        running_mean = _ratio(self.running_seconds, self.busy)
        return Outcome(
            **asdict(self.counts),
            label=label,
            finished=len(self.normalised),
            seconds=seconds,
            first_token=_mean(self.first_tokens),
            first_token_p99=_p99(self.first_tokens),
            each_token=_mean(self.each_tokens),
            normalised=_mean(self.normalised),
            normalised_p99=_p99(self.normalised),
            running_mean=running_mean,
            running_short=self.running_waited / self.waited if self.waited else running_mean,
            waiting_share=_ratio(self.waited, self.busy),
            shares=(self.short if self.short.seconds else self.always).shares(),
            shares_always=self.always.shares(),
        )


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _mean(values: list[float]) -> float:
    return fmean(values) if values else 0.0


def _p99(values: list[float]) -> float:
    """The value that 99 of 100 do not exceed."""
    return sorted(values)[-(len(values) // 100) - 1] if values else 0.0
