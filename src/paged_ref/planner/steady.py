"""The steady state: the rate of requests that a setup sustains when there is always more to do, and what limits it.

This is the one model behind `assess`, `compare`, `paper` and the lessons. The rate is measured, by the real scheduler
and manager on the simulated clock (`Saturation` in simulate.py says when), so it has the holes, the waste of the
reservations and the preemptions in it. Beside it stands the roofline of the same requests, which is arithmetic, and
which no way to manage memory can pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from .metrics import Admission, Latency, Outcome
from .roofline import StepTime
from .setup import Setup
from .simulate import GENERATIONS, MEASURED_GENERATIONS, SAMPLE_EVERY, Saturation, Simulation, simulated
from .traces import RequestTrace, TraceRequest, repeated

Limit = Literal["sequences", "tokens", "memory", "bandwidth", "arithmetic", "link"]
LIMITS: dict[Limit, str] = {
    "sequences": "the number of sequences that may run",
    "tokens": "the tokens that a step may compute",
    "memory": "the memory for K and V",
    "bandwidth": "the reading of weights, K and V",
    "arithmetic": "the arithmetic",
    "link": "the traffic between the GPUs",
}
NUM_BATCHES = 20  # of requests, for the interval
LEAST_SAMPLES = 20  # of the memory, in about the shortest time that is measured
# Student's t for 95 % by degrees of freedom from 1 on: how far the mean of few batches may be off.
STUDENT = (
    12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13, 2.12, 2.11, 2.10, 2.09,
)  # fmt: skip
ALIGNMENT = 16  # slots to which the swapping manager rounds a region up

Array = npt.NDArray[np.float64]


def admissible(setup: Setup, trace: RequestTrace) -> list[TraceRequest]:
    """The requests that are not refused, with their outputs cut at the context."""
    return [each for each in _served(setup, trace) if each is not None]


def _served(setup: Setup, trace: RequestTrace) -> Iterator[TraceRequest | None]:
    """Each request, its output cut at the context; None where it is refused."""
    manager, context = setup.make_manager(), setup.longest
    for each in trace.requests:
        cut = each if each.num_tokens <= context else replace(each, output_len=max(0, context - each.prompt_len))
        fits = cut.output_len and manager.max_slots_needed(cut.prompt_len, cut.num_tokens - 1) <= manager.num_slots
        yield cut if fits else None


def mean_length(requests: Sequence[TraceRequest]) -> float:
    """Tokens of a running sequence, mean over its time: it grows evenly from its prompt to its last token but one."""
    lengths = sum(each.output_len * (each.prompt_len + (each.output_len - 1) / 2) for each in requests)
    return lengths / sum(each.output_len for each in requests)


def held_slots(requests: Sequence[TraceRequest], block_size: int) -> float:
    """Slots of the blocks that a running sequence holds, mean over its time."""
    prompt, output = (
        np.array(lengths, float) for lengths in zip(*((r.prompt_len, r.output_len) for r in requests), strict=True)
    )
    held = _in_blocks(prompt + output - 1, block_size) - _in_blocks(prompt - 1, block_size)
    return float(held.sum() / output.sum())


# --- the roofline --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Work:
    """What each request needs at least, however it is served; an array has a value for each request.

    A request is in at least as many steps as it has output tokens: the last step of its prompt gives the first. It
    holds its prompt in that step, and one token more in each step that follows.
    """

    outputs: Array
    tokens: Array  # to compute
    slots: Array  # held, summed over the steps
    least_slots: Array  # held in the first of these steps
    read: Array  # tokens whose K and V are read, summed over the steps
    pairs: Array  # keys that all queries see together


def work_of(setup: Setup, requests: list[TraceRequest], hash_block: int) -> Work:
    """With a prefix cache, as if everything that ever was in it were found, and shared."""
    prompt = np.array([each.prompt_len for each in requests], dtype=np.float64)  # [requests]
    output = np.array([each.output_len for each in requests], dtype=np.float64)
    known = np.array(_known_tokens(requests, hash_block) if setup.prefix_cache else [0.0] * len(requests))
    later = output - 1  # steps after the first, and tokens of the output that are computed
    grown = later * prompt + later * (later + 1) / 2  # lengths in the later steps, summed
    if setup.manager == "standard":
        manager = setup.make_manager()
        least = np.array([manager.max_slots_needed(each.prompt_len, each.num_tokens - 1) for each in requests], float)
        slots = least * output
    else:
        block = setup.block_size if setup.manager == "paged" else ALIGNMENT
        least = block * np.ceil(prompt / block)
        slots = _in_blocks(prompt + later, block) - _in_blocks(prompt - 1, block) - known * output
        least = np.maximum(1.0, least - known)
    uncomputed = prompt - known
    return Work(
        outputs=output,
        tokens=uncomputed + later,
        slots=slots,
        least_slots=least,
        read=prompt + grown,
        pairs=uncomputed * prompt - uncomputed * (uncomputed - 1) / 2 + grown,
    )


def _in_blocks(length: Array, block_size: int) -> Array:
    """Slots of the blocks of a sequence of 1 token, of 2, ... of `length`, added up."""
    full, rest = np.divmod(length, block_size)
    slots: Array = block_size * (block_size * full * (full + 1) / 2 + rest * (full + 1))
    return slots


def _known_tokens(requests: list[TraceRequest], hash_block: int) -> list[float]:
    """Leading tokens of each prompt that an earlier request has, but for the last token of the prompt."""
    seen: dict[tuple[int, int], int] = {}  # (number of the blocks before, hash id) -> number of these blocks
    known = []
    for each in requests:
        blocks, found = 0, 0
        for hash_id in each.hash_ids:
            key = blocks, hash_id
            found += key in seen
            blocks = seen.setdefault(key, len(seen) + 1)
        known.append(float(max(0, min(found * hash_block, each.prompt_len - 1))))
    return known


@dataclass(frozen=True)
class Bound:
    """The roofline of requests that are always there: the least seconds that each takes, on average."""

    setup: Setup
    work: Work

    @cached_property
    def steps(self) -> dict[Admission, Array]:
        """The share of a step that each request takes from what a step may hold, summed over its steps."""
        setup, work = self.setup, self.work
        num_slots = setup.usable_slots
        fit = max(1.0, num_slots // float(work.least_slots.min()))
        return {
            "sequences": work.outputs / setup.max_batch_seqs,
            "tokens": work.tokens / setup.max_batch_tokens,
            "memory": np.maximum(work.slots / num_slots, work.outputs / fit),
        }

    @cached_property
    def admission(self) -> Admission:
        """What keeps a further sequence out, if memory is managed without any waste."""
        return max(self.steps, key=lambda limit: float(self.steps[limit].mean()))

    @cached_property
    def cost(self) -> Array:
        """Seconds of each request, by the side that limits all of them together."""
        work, steps, roofline = self.work, self.steps[self.admission], self.setup.roofline
        # The fewest steps are full ones, and these read the fewest experts in all.
        in_step = float(work.outputs.sum() / steps.sum()) if self.admission != "tokens" else self.setup.max_batch_tokens
        reading = steps * roofline.weight_seconds(in_step) + work.read * roofline.kv_seconds
        compute = (
            work.tokens * roofline.token_seconds
            + work.pairs * roofline.pair_seconds
            + work.outputs * roofline.logits_seconds
        )
        traffic = steps * roofline.reduce_seconds + work.tokens * roofline.reduce_token_seconds
        side = reading if reading.mean() > compute.mean() else compute
        return side + traffic + steps * roofline.constants.step_overhead

    @property
    def rate(self) -> float:
        """Requests per second, at most."""
        return float(1 / self.cost.mean())

    @property
    def uncertainty(self) -> float:
        """By which share the mean cost of such requests may be off, as far as these requests tell (95 %): from the
        means of batches of requests that follow each other."""
        cost = self.cost
        batches = [float(part.mean()) for part in np.array_split(cost, min(NUM_BATCHES, len(cost)))]
        if len(batches) == 1:
            return 0.0
        error = float(np.std(batches, ddof=1)) / math.sqrt(len(batches))
        return STUDENT[len(batches) - 2] * error / float(cost.mean())

    def doubled(self) -> dict[Limit, float]:
        """By which factor the rate grows with twice of each."""
        setup = replace(self.setup, max_model_len=self.setup.longest)
        gpu, num_slots = setup.gpu, setup.num_slots
        with_twice: dict[Limit, Setup] = {
            "sequences": replace(setup, max_batch_seqs=2 * setup.max_batch_seqs),
            "tokens": replace(setup, max_batch_tokens=2 * setup.max_batch_tokens),
            "memory": replace(setup, kv_tokens=2 * num_slots),
            "bandwidth": replace(setup, kv_tokens=num_slots, gpu=replace(gpu, bandwidth=2 * gpu.bandwidth)),
            "arithmetic": replace(setup, kv_tokens=num_slots, gpu=replace(gpu, flops=2 * gpu.flops)),
        }
        if gpu.count > 1:
            with_twice["link"] = replace(setup, kv_tokens=num_slots, gpu=replace(gpu, peer=2 * gpu.peer))
        return {limit: replace(self, setup=twice).rate / self.rate for limit, twice in with_twice.items()}


# --- measured ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Steady:
    """A setup that always has more to do, measured over whole passes of the trace."""

    setup: Setup
    outcome: Outcome  # of the measured time: its latencies are those of a queue without an end
    num_requests: int  # of the trace, those that are accepted
    num_refused: int  # could never fit
    refusal: str  # why the first of them was refused
    num_cut: int  # outputs that the context ends early
    sustained_rate: float  # accepted requests per second
    half_width: float  # of the interval in which the rate of more such requests lies (95 %)
    roofline: float  # requests per second at most, however the memory is managed beyond what this reservation takes
    slots: float  # that a running sequence holds, mean over its time
    doubled: dict[Limit, float]  # by which factor the roofline grows with twice of each
    latencies: list[Latency]  # of the measured time

    @property
    def step(self) -> StepTime:
        """A step, mean over the measured time."""
        counts, steps = self.outcome, self.outcome.steps
        return self.setup.roofline.step(
            counts.computed_tokens / steps,
            counts.read_tokens / steps,
            counts.pairs / steps,
            counts.sampled_tokens / steps,
        )

    @property
    def step_seconds(self) -> float:
        return self.outcome.seconds / self.outcome.steps

    @property
    def admission(self) -> Admission:
        """What kept the next request out of the batch, most of the time."""
        return max(self.outcome.waits_for, key=self.outcome.waits_for.__getitem__)

    @property
    def tokens_per_second(self) -> float:
        return self.sustained_rate * self.outcome.output_tokens / self.outcome.finished

    def to_json(self) -> dict[str, Any]:
        return {
            "sustained_rate": self.sustained_rate,
            "half_width": self.half_width,
            "roofline": self.roofline,
            "num_requests": self.num_requests,
            "num_refused": self.num_refused,
            "num_cut": self.num_cut,
            "running": self.outcome.running_mean,
            "slots_each": self.slots,
            "admission_limit": self.admission,
            "step_limit": self.step.bound,
            "doubled": self.doubled,
            "step_seconds": self.step_seconds,
            "measured": self.outcome.to_json(),
        }


def steady_state(setup: Setup, trace: RequestTrace) -> Steady:
    """Keep `setup` full of the trace's requests, in their order, until the rate is known. Raises ValueError where none
    of the requests can be served."""
    served = admissible(setup, trace)
    refusal = _refusal(setup, trace) if len(served) < len(trace.requests) else ""
    if not served:
        raise ValueError(none_served(setup, trace))
    accepted = replace(trace, requests=tuple(served))
    bound = Bound(setup, work_of(setup, served, trace.hash_block))
    most = int(min(setup.max_batch_seqs, setup.num_slots // bound.work.least_slots.min()))  # that can run together
    begun = (GENERATIONS + MEASURED_GENERATIONS + 3) * most + len(served)
    passes = repeated(accepted, -(-begun // len(served)) + 1)
    least_steps = MEASURED_GENERATIONS * float(bound.work.outputs.mean())
    sample_every = max(1, min(SAMPLE_EVERY, int(least_steps / LEAST_SAMPLES)))
    simulation, outcome = simulated(
        setup,
        accepted,
        lambda each: Simulation(each, passes, saturation=Saturation(len(served)), sample_every=sample_every),
    )
    saturation = simulation.saturation
    assert saturation
    # Whole passes begin in the measured time, and nearly whole ones end: what is over at its beginning and at its end
    # differs a little, and no rate can be above the roofline.
    rate = min(saturation.measured / saturation.seconds, bound.rate)
    return Steady(
        setup=setup,
        outcome=outcome,
        num_requests=len(served),
        num_refused=len(trace.requests) - len(served),
        refusal=refusal,
        num_cut=sum(each.num_tokens > setup.longest > each.prompt_len for each in trace.requests),
        sustained_rate=rate,
        half_width=rate * bound.uncertainty,
        roofline=bound.rate,
        slots=float(bound.work.slots.sum() / bound.work.outputs.sum()),
        doubled=bound.doubled(),
        latencies=simulation.tally.latencies,
    )


def none_served(setup: Setup, trace: RequestTrace) -> str:
    return f"{setup.label}: none of the requests can be served. {_refusal(setup, trace)}"


def _refusal(setup: Setup, trace: RequestTrace) -> str:
    """Why the first refused request is refused."""
    pairs = zip(trace.requests, _served(setup, trace), strict=True)
    first = next(request for request, served in pairs if served is None)
    return Simulation(setup, replace(trace, requests=(first,))).run().refusal
