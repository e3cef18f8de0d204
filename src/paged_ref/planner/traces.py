"""Requests: those of a real day (trace_files.py reads them), or drawn to match published means.

A trace has lengths and times, and no text. Every change of a trace (other arrival times, shorter lengths, a part of
it) is written into its notes, and every command prints the notes.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from math import inf, log, log1p
from statistics import mean

from ..core.checks import plural
from ..extras.memory_limit import require_memory

REQUEST_BYTES = 256  # that a request of a trace takes, with its numbers


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request: lengths in tokens, time in seconds since the trace began."""

    arrival: float
    prompt_len: int
    output_len: int
    hash_ids: tuple[int, ...] = ()  # identify the blocks of the prompt; equal leading ids mean the same beginning

    @property
    def num_tokens(self) -> int:
        return self.prompt_len + self.output_len


@dataclass(frozen=True, slots=True)
class RequestTrace:
    """Requests in order of arrival. `timed`: the arrival times mean something."""

    name: str
    requests: tuple[TraceRequest, ...]
    timed: bool
    notes: tuple[str, ...] = ()  # what was changed, a phrase each
    hash_block: int = 512  # tokens that one of the hash_ids stands for

    @property
    def rate(self) -> float:
        """Requests per second; infinite where all arrive at the same time."""
        seconds = self.requests[-1].arrival - self.requests[0].arrival
        return (len(self.requests) - 1) / seconds if seconds > 0 else inf

    def describe(self) -> str:
        """One line: how many requests, their lengths, and their rate."""
        prompts = mean(request.prompt_len for request in self.requests)
        outputs = mean(request.output_len for request in self.requests)
        times = "all at the same time" if self.rate == inf else f"{self.rate:.3g} per second"
        times = times if self.timed else "no times"
        number = plural(len(self.requests), "request")
        return f"{self.name}: {number}, mean {prompts:.1f} tokens in, {outputs:.1f} out, {times}"


# --- changes of a trace --------------------------------------------------------------------------------


def with_prefixes(trace: RequestTrace, tokens: int, groups: int = 1) -> RequestTrace:
    """Each prompt begins with the same `tokens` tokens as those of its group, to which the requests belong in turn; a
    shorter prompt is a part of this beginning. Raises ValueError where the trace itself says what is shared."""
    if any(request.hash_ids for request in trace.requests):
        raise ValueError(f"prefix_tokens is {tokens}; the trace says itself which prompts begin with the same tokens")
    requests = tuple(replace(each, hash_ids=(place % groups,)) for place, each in enumerate(trace.requests))
    note = f"each prompt begins with {tokens} tokens of {groups} that are shared"
    return replace(trace, requests=requests, hash_block=tokens, notes=(*trace.notes, note))


def first(trace: RequestTrace, count: int) -> RequestTrace:
    """The first `count` requests."""
    if count < 1:
        raise ValueError(f"requests is {count}; at least 1 is needed")
    if count >= len(trace.requests):
        return trace
    note = f"the first {count} of {len(trace.requests)} requests"
    return replace(trace, requests=trace.requests[:count], notes=(*trace.notes, note))


PARTS = 20  # of a long trace, from which a sample is taken


def spread(trace: RequestTrace, count: int) -> RequestTrace:
    """`count` of the requests, in PARTS runs of requests that follow each other, which begin evenly over the trace. The
    first requests of a day are not like the others; and single requests would have no common beginnings and no bursts.
    A run begins one mean gap after the end of the run before."""
    if count < 1:
        raise ValueError(f"requests is {count}; at least 1 is needed")
    total = len(trace.requests)
    if count >= total:
        return trace
    parts = min(PARTS, count)
    gap = 1 / trace.rate if trace.rate else 0.0
    requests: list[TraceRequest] = []
    for part in range(parts):
        begin, size = part * total // parts, (part + 1) * count // parts - part * count // parts
        run = trace.requests[begin : begin + size]
        shift = (requests[-1].arrival + gap if requests else 0.0) - run[0].arrival
        requests += [replace(each, arrival=each.arrival + shift) for each in run]
    note = f"{count:,} of {total:,} requests: {plural(parts, 'run')} of {count / parts:.4g}, spread evenly"
    return replace(trace, requests=tuple(requests), notes=(*trace.notes, note))


def at_rate(trace: RequestTrace, rate: float, seed: int = 0) -> RequestTrace:
    """The same requests, `rate` of them per second: a timed trace faster or slower, else Poisson arrivals.

    With an infinite rate all arrive at the same time.
    """
    if not rate > 0:
        raise ValueError(f"rate is {rate}; a number of requests per second above 0 is needed")
    if rate == inf:
        times, note = [0.0] * len(trace.requests), "all requests at the same time"
    elif trace.timed and 0 < trace.rate < inf:
        factor = trace.rate / rate
        times = [factor * request.arrival for request in trace.requests]
        note = f"arrival times x {factor:.3g}, for {rate:.3g} requests per second"
    else:
        rng = random.Random(seed)
        times = [0.0]
        while len(times) < len(trace.requests):
            times.append(times[-1] + rng.expovariate(rate))
        note = f"Poisson arrivals, {rate:.3g} per second, seed {seed}"
    requests = tuple(replace(request, arrival=at) for request, at in zip(trace.requests, times, strict=True))
    return replace(trace, requests=requests, timed=True, notes=(*trace.notes, note))


def repeated(trace: RequestTrace, passes: int) -> RequestTrace:
    """The trace `passes` times, one after another. What two passes have in common is no common beginning: the hash ids
    of each pass are new. A pass without times begins when the one before it does."""
    if passes < 1:
        raise ValueError(f"passes is {passes}; at least 1 is needed")
    if passes == 1:
        return trace
    number: dict[int, int] = {}  # hash id -> a small one
    for each in trace.requests:
        for hash_id in each.hash_ids:
            number.setdefault(hash_id, len(number))
    span = trace.requests[-1].arrival + (1 / trace.rate if trace.rate else 0.0)
    requests = tuple(
        replace(
            each,
            arrival=each.arrival + number_of_pass * span,
            hash_ids=tuple(number[hash_id] + number_of_pass * len(number) for hash_id in each.hash_ids),
        )
        for number_of_pass in range(passes)
        for each in trace.requests
    )
    return replace(trace, requests=requests, notes=(*trace.notes, f"{passes} times, one after another"))


def scaled(trace: RequestTrace, factor: float) -> RequestTrace:
    """All lengths times `factor`, rounded, at least 1. Common beginnings are kept if their blocks stay whole."""
    if not 0 < factor < inf:
        raise ValueError(f"scale is {factor}; a number above 0 is needed")
    block = factor * trace.hash_block
    keeps_ids = block >= 1 and block == int(block)
    requests = []
    for each in trace.requests:
        prompt, output = (max(1, round(factor * length)) for length in (each.prompt_len, each.output_len))
        ids = each.hash_ids[: -(-prompt // int(block))] if keeps_ids else ()
        requests.append(TraceRequest(each.arrival, prompt, output, ids))
    note = f"lengths x {factor:.3g}"
    hash_block = int(block) if keeps_ids else trace.hash_block
    return replace(trace, requests=tuple(requests), notes=(*trace.notes, note), hash_block=hash_block)


def clipped(trace: RequestTrace, longest: int) -> RequestTrace:
    """Prompt and output together at most `longest` tokens: a long output is cut, then a long prompt."""
    if longest < 2:
        raise ValueError(f"the longest request has {plural(longest, 'token')}; at least 2 are needed")
    requests = []
    for each in trace.requests:
        prompt = min(each.prompt_len, longest - 1)
        ids = each.hash_ids[: -(-prompt // trace.hash_block)]
        requests.append(TraceRequest(each.arrival, prompt, min(each.output_len, longest - prompt), ids))
    cut = sum(each.num_tokens > longest for each in trace.requests)
    note = f"{plural(cut, 'request')} cut to {longest} tokens"
    return replace(trace, requests=tuple(requests), notes=(*trace.notes, note)) if cut else trace


def with_prefix(trace: RequestTrace, length: int) -> RequestTrace:
    """`length` more tokens before each prompt, the same for all. The hash ids of the prompts are dropped."""
    if length < 1:
        raise ValueError(f"the shared prefix has {length} tokens; at least 1 is needed")
    longer = tuple(replace(each, prompt_len=length + each.prompt_len, hash_ids=()) for each in trace.requests)
    return with_prefixes(replace(trace, requests=longer), length)


# --- drawn traces --------------------------------------------------------------------------------------

DRAWN = 1000  # requests of a drawn trace, where no other number is asked for: one number for all commands and lessons

# Mean tokens in and out of the data sets that the paper serves (Kwon et al. 2023, §6.1, Fig. 11).
MEANS = {"sharegpt": (161.31, 337.99), "alpaca": (19.31, 58.45)}


def generated(name: str, count: int = DRAWN, seed: int = 0, longest: int = 2048) -> RequestTrace:
    """`count` requests with the published means of "sharegpt" or "alpaca", no times.

    Only the means are published as numbers. Lengths are geometric, which assumes least beyond a mean (of all
    distributions over 1, 2, 3 ... with that mean it has the greatest entropy), and prompt and output are
    independent. `longest` is the paper's model context: tokens beyond it are cut.
    """
    if name not in MEANS:
        raise ValueError(f"trace is {name!r}; a file or one of {', '.join(MEANS)} is needed")
    return drawn(name, *MEANS[name], count, seed, longest)


def drawn(name: str, mean_in: float, mean_out: float, count: int, seed: int = 0, longest: int = 2048) -> RequestTrace:
    """The same with any means of at least 1 token."""
    if count < 1:
        raise ValueError(f"requests is {count}; at least 1 is needed")
    require_memory(f"requests is {count}: a trace of so many", REQUEST_BYTES * count)
    rng = random.Random(seed)
    requests = tuple(TraceRequest(0.0, _geometric(rng, mean_in), _geometric(rng, mean_out)) for _ in range(count))
    note = f"drawn: geometric lengths of mean {mean_in} in, {mean_out} out, seed {seed}"
    return clipped(RequestTrace(name, requests, timed=False, notes=(note,)), longest)


def _geometric(rng: random.Random, mean_length: float) -> int:
    """1, 2, 3 ... with this mean: whole steps of an exponential with the same chance to end in each."""
    return 1 if mean_length <= 1 else 1 + int(log(1.0 - rng.random()) / log1p(-1.0 / mean_length))
