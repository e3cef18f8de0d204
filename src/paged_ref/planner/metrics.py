"""What a simulation counts, and the rates, latencies and memory shares that follow."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from statistics import fmean
from typing import Any, Literal, NamedTuple

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


# What keeps the next request out of the batch: no memory for it, the number of sequences that may run, or the number
# of tokens that a step may compute.
Admission = Literal["memory", "sequences", "tokens"]


@dataclass(frozen=True, slots=True)
class Spread:
    """Seconds of many requests: the mean, and what 50, 90 and 99 of 100 requests do not exceed."""

    mean: float
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        ordered = sorted(values)
        if not ordered:
            return cls(0.0, 0.0, 0.0, 0.0)
        return cls(fmean(ordered), *(_not_exceeded(ordered, share) for share in (0.5, 0.9, 0.99)))


def _not_exceeded(ordered: Sequence[float], share: float) -> float:
    """The least of these values that this share of them does not exceed."""
    above = int(len(ordered) * (1 - share) + 1e-9)  # what floats take from a whole number is less
    return ordered[max(0, len(ordered) - 1 - above)]


class Latency(NamedTuple):
    """One finished request."""

    place: int  # in the trace
    first_token: float  # seconds from arrival to the first new token (TTFT)
    each_token: float | None  # seconds for each token after the first (TPOT); None: there is only one
    normalised: float  # seconds from arrival to end, divided by the output tokens: the paper's measure (§6.1)


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds on the latency of a request, in seconds, and the share of the requests that must meet all of them."""

    ttft: float | None = None
    tpot: float | None = None
    latency: float | None = None  # normalised
    share: float = 0.99

    def __bool__(self) -> bool:
        return (self.ttft, self.tpot, self.latency) != (None, None, None)

    def met_by(self, request: Latency) -> bool:
        pairs = (request.first_token, self.ttft), (request.each_token, self.tpot), (request.normalised, self.latency)
        return all(bound is None or value is None or value <= bound for value, bound in pairs)

    def tpot_met(self, requests: Iterable[Latency]) -> float:
        """The limit on TPOT that the share of the requests meets; 0 where each has one token."""
        ordered = sorted(each.each_token for each in requests if each.each_token is not None)
        return _not_exceeded(ordered, self.share) if ordered else 0.0

    def share_met(self, requests: Sequence[Latency]) -> float:
        return sum(map(self.met_by, requests)) / len(requests) if requests else 0.0

    def describe(self) -> str:
        """The bounds in words."""
        bounds = ("first token within", self.ttft), ("each further token", self.tpot), ("mean of a token", self.latency)
        words = ", ".join(f"{words} {bound:g} s" for words, bound in bounds if bound is not None)
        return f"{words}, for {100 * self.share:.6g} % of the requests"


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
    read_tokens: int = 0  # whose K and V were read, over all steps
    pairs: int = 0  # keys that all queries saw together
    sampled_tokens: int = 0  # for which logits were computed
    preemptions: int = 0
    bytes_moved: int = 0  # K and V copied on the device
    bytes_swapped: int = 0  # K and V over the host link, both ways


@dataclass(kw_only=True, slots=True)
class Outcome(Counts):
    """One run in numbers. Times are in seconds of the simulated clock, lengths in tokens."""

    label: str
    finished: int
    seconds: float  # from the first arrival to the last end
    first_token: Spread
    each_token: Spread
    normalised: Spread
    running_mean: float  # running sequences, mean over the time in which any ran
    running_short: float  # mean over the time in which a request waited, so that memory was short; else running_mean
    waiting_share: float  # of the time in which sequences ran: the share in which a request waited
    waits_for: dict[Admission, float]  # what the first waiting request waited for, as shares of waiting_share
    shares: Shares  # mean over the time of running_short
    shares_always: Shares

    @property
    def tokens_per_second(self) -> float:
        return _ratio(self.output_tokens, self.seconds)

    @property
    def requests_per_second(self) -> float:
        return _ratio(self.finished, self.seconds)

    @property
    def moved_per_token(self) -> float:
        """Bytes of K and V moved on the device or over the link, for each generated token."""
        return _ratio(self.bytes_moved + self.bytes_swapped, self.output_tokens)

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

    def __init__(self, num_warm_up: int = 0) -> None:
        """The latency of the first `num_warm_up` requests of the trace is left out."""
        self.num_warm_up = num_warm_up
        self.counts = Counts()
        self.busy = 0.0  # seconds
        self.running_seconds = self.running_waited = 0.0  # sequences x seconds: all, and while a request waited
        self.waited = 0.0  # of the busy seconds: those in which a request waited
        self.waits_for: dict[Admission, float] = {"memory": 0.0, "sequences": 0.0, "tokens": 0.0}  # the same, by limit
        self.short, self.always = UsageAverage(), UsageAverage()
        self.latencies: list[Latency] = []
        self.finished = 0

    def refuse(self, why: str) -> None:
        self.counts.refused += 1
        self.counts.refusal = self.counts.refusal or why

    def computed(self, num_tokens: int, read_tokens: int, pairs: int, sampled_tokens: int) -> None:
        """What a step computed and read."""
        counts = self.counts
        counts.computed_tokens += num_tokens
        counts.read_tokens += read_tokens
        counts.pairs += pairs
        counts.sampled_tokens += sampled_tokens

    def step(self, seconds: float, running: int, waits_for: Admission | None) -> None:
        self.busy += seconds
        self.running_seconds += running * seconds
        if running > self.counts.running_peak:
            self.counts.running_peak = running
        if waits_for:
            self.waited += seconds
            self.waits_for[waits_for] += seconds
            self.running_waited += running * seconds

    def sample(self, usage: MemoryUsage, seconds: float, waiting: bool) -> None:
        self.always.add(usage, seconds)
        if waiting:
            self.short.add(usage, seconds)

    def finish(self, place: int, arrival: float, first_token: float, now: float, num_tokens: int) -> None:
        self.counts.output_tokens += num_tokens
        self.finished += 1
        if place >= self.num_warm_up:
            each = (now - first_token) / (num_tokens - 1) if num_tokens > 1 else None
            self.latencies.append(Latency(place, first_token - arrival, each, (now - arrival) / num_tokens))

    def outcome(self, label: str, seconds: float) -> Outcome:
        running_mean = _ratio(self.running_seconds, self.busy)
        return Outcome(
            **asdict(self.counts),
            label=label,
            finished=self.finished,
            seconds=seconds,
            first_token=Spread.of(each.first_token for each in self.latencies),
            each_token=Spread.of(each.each_token for each in self.latencies if each.each_token is not None),
            normalised=Spread.of(each.normalised for each in self.latencies),
            running_mean=running_mean,
            running_short=self.running_waited / self.waited if self.waited else running_mean,
            waiting_share=_ratio(self.waited, self.busy),
            waits_for={limit: _ratio(part, self.waited) for limit, part in self.waits_for.items()},
            shares=(self.short if self.short.seconds else self.always).shares(),
            shares_always=self.always.shares(),
        )


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
