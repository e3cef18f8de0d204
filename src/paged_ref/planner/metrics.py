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
        return self.tokens / self.used if self.used else 0.0


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
        return Shares(**{part: total / self.seconds if self.seconds else 0.0 for part, total in self.sums.items()})


@dataclass(frozen=True, slots=True)
class Outcome:
    """One run in numbers. Times are in seconds of the simulated clock, lengths in tokens."""

    label: str
    finished: int
    refused: int  # could never fit: longer than the context, or than the pool
    refusal: str  # why the first of them was
    cut: int  # outputs that the context ended early
    seconds: float  # from the first arrival to the last end
    steps: int
    output_tokens: int
    first_token: float  # time to first token, mean
    first_token_p99: float
    each_token: float  # time per output token after the first, mean over requests
    normalised: float  # latency / output tokens, mean over requests: the paper's measure (§6.1)
    normalised_p99: float
    running_mean: float  # running sequences, mean over the time in which any ran
    running_short: float  # mean over the time in which a request waited, so that memory was short; else running_mean
    running_peak: int
    waiting_share: float  # of the time in which sequences ran: the share in which a request waited
    shares: Shares  # mean over the time of running_short
    shares_always: Shares
    preemptions: int
    computed_tokens: int
    recomputed_tokens: int  # of these, computed before and lost by a preemption
    known_tokens: int  # of the prompts' tokens: found in the prefix cache
    prompt_tokens: int
    bytes_moved: int  # K and V copied on the device
    bytes_swapped: int  # K and V over the host link, both ways

    @property
    def tokens_per_second(self) -> float:
        return self.output_tokens / self.seconds if self.seconds else 0.0

    @property
    def requests_per_second(self) -> float:
        return self.finished / self.seconds if self.seconds else 0.0

    @property
    def hit_rate(self) -> float:
        return self.known_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

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
        self.refused, self.refusal, self.cut = 0, "", 0
        self.steps = 0
        self.busy = self.waited = 0.0  # seconds
        self.running_seconds = self.running_waited = 0.0  # sequences x seconds: all, and while a request waited
        self.running_peak = 0
        self.short, self.always = UsageAverage(), UsageAverage()
        self.preemptions = self.computed = self.recomputed = self.known = self.prompts = 0
        self.bytes_moved = self.bytes_swapped = 0
        self.output_tokens = 0
        self.first_tokens: list[float] = []
        self.each_tokens: list[float] = []
        self.normalised: list[float] = []

    @property
    def num_done(self) -> int:
        return self.refused + len(self.normalised)

    def refuse(self, why: str) -> None:
        self.refused += 1
        self.refusal = self.refusal or why

    def step(self, num_tokens: int, seconds: float, running: int, waiting: bool) -> None:
        self.steps += 1
        self.computed += num_tokens
        self.busy += seconds
        self.running_seconds += running * seconds
        if running > self.running_peak:
            self.running_peak = running
        if waiting:
            self.waited += seconds
            self.running_waited += running * seconds

    def sample(self, usage: MemoryUsage, seconds: float, waiting: bool) -> None:
        self.always.add(usage, seconds)
        if waiting:
            self.short.add(usage, seconds)

    def finish(self, arrival: float, first_token: float, now: float, num_tokens: int) -> None:
        self.output_tokens += num_tokens
        self.first_tokens.append(first_token - arrival)
        self.normalised.append((now - arrival) / num_tokens)
        if num_tokens > 1:
            self.each_tokens.append((now - first_token) / (num_tokens - 1))

    def outcome(self, label: str, seconds: float) -> Outcome:
        mean_running = self.running_seconds / self.busy if self.busy else 0.0
        return Outcome(
            label=label,
            finished=len(self.normalised),
            refused=self.refused,
            refusal=self.refusal,
            cut=self.cut,
            seconds=seconds,
            steps=self.steps,
            output_tokens=self.output_tokens,
            first_token=_mean(self.first_tokens),
            first_token_p99=_p99(self.first_tokens),
            each_token=_mean(self.each_tokens),
            normalised=_mean(self.normalised),
            normalised_p99=_p99(self.normalised),
            running_mean=mean_running,
            running_short=self.running_waited / self.waited if self.waited else mean_running,
            running_peak=self.running_peak,
            waiting_share=self.waited / self.busy if self.busy else 0.0,
            shares=(self.short if self.short.seconds else self.always).shares(),
            shares_always=self.always.shares(),
            preemptions=self.preemptions,
            computed_tokens=self.computed,
            recomputed_tokens=self.recomputed,
            known_tokens=self.known,
            prompt_tokens=self.prompts,
            bytes_moved=self.bytes_moved,
            bytes_swapped=self.bytes_swapped,
        )


def _mean(values: list[float]) -> float:
    return fmean(values) if values else 0.0


def _p99(values: list[float]) -> float:
    """The value that 99 of 100 do not exceed."""
    return sorted(values)[-(len(values) // 100) - 1] if values else 0.0
