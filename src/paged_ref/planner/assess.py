"""What paging brings on a GPU, where its time goes, and which settings follow.

The rates are those of steady.py, which `paged-ref compare` prints as well. The rest is arithmetic on shapes and
datasheets.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from .comparison import STANDARD
from .hardware import GPU, price_of_million
from .metrics import Limits
from .model_config import ModelSpec
from .roofline import Roofline
from .setup import Setup
from .steady import Bound, Steady, Work, admissible, held_slots, mean_length, steady_state, work_of
from .sweep import Served, goodput
from .traces import RequestTrace, TraceRequest

# The sizes for which servers have fast kernels. Below 16 the paper's kernel loses time (Kwon et al. 2023, §7.2).
BLOCK_SIZES = (16, 32, 64, 128, 256)
WASTE_LIMIT = 0.01  # share of the slots that may be empty in last blocks
TABLE_ENTRY = 4  # bytes of a block id
BEND = 0.9  # of the highest rate: where the curve of the rate over the number of sequences counts as bent
PAGED = len(STANDARD)  # place among the plans
TRIES = 8  # of numbers of sequences, until one keeps the limit


@dataclass(frozen=True, slots=True)
class Plan:
    """One way to manage the memory, always full."""

    name: str
    served: Served | None  # None: it holds not one sequence

    @property
    def steady(self) -> Steady | None:
        return self.served.steady if self.served else None

    @property
    def rate(self) -> float:
        """The headline: goodput where limits are given, else the sustained rate."""
        return self.served.rate if self.served else 0.0

    def to_json(self) -> dict[str, Any]:
        nothing = {"sustained_rate": 0.0, "goodput": None, "price_of_million_tokens": None}
        return {"name": self.name, **(self.served.to_json() if self.served else nothing)}


@dataclass(frozen=True, slots=True)
class BlockSize:
    """What one block size costs and saves, for a sequence of the mean length."""

    block_size: int
    waste: float  # share of the held slots that are empty, in last blocks
    table_bytes: int  # of the block table
    run_bytes: int  # of K in one piece, which a kernel or a copy reads without another look at the table
    swap_seconds: float  # out and in again


@dataclass(frozen=True, slots=True)
class Batch:
    """Paged memory with at most so many sequences, by the roofline."""

    sequences: int
    step_seconds: float  # in which each sequence gets a token
    rate: float  # requests per second
    price: float | None  # of 10**6 output tokens


@dataclass(frozen=True, slots=True)
class Assessment:
    """All numbers of `paged-ref assess`."""

    setup: Setup  # paged, with the advised block size
    max_model_len: int  # tokens of the longest sequence that is accepted
    mean_prompt: float
    mean_output: float
    mean_length: float  # tokens of a running sequence, mean over its time
    longest: int  # tokens of the longest request
    kv_bytes: int  # left for K and V
    num_tokens: int  # whose K and V fit into kv_bytes
    # standard max, pow2, exact; paged with the advised block size; where prompts share beginnings, with a prefix cache
    plans: tuple[Plan, ...]
    fit: int  # sequences for which paged memory has room
    batches: tuple[Batch, ...]  # by sequences, up to `fit`; `advised` is one of them
    advised: int  # sequences
    advised_tpot: float  # seconds for each token that the share of the limits does not exceed, with so many sequences
    sequences_at_worst: int  # paged, every sequence as long as the longest
    block_sizes: tuple[BlockSize, ...]
    recompute_seconds: float  # of a sequence at its mean length
    swap_from: int | None  # tokens from which on swapping is faster, with the advised block size; None: never

    @property
    def gpu(self) -> GPU:
        return self.setup.gpu

    @property
    def model(self) -> ModelSpec:
        return self.setup.model

    @property
    def block_size(self) -> int:
        return self.setup.block_size

    @property
    def paged(self) -> Steady:
        steady = self.plans[PAGED].steady
        assert steady
        return steady

    @property
    def with_prefixes(self) -> Plan | None:
        """Paged with a prefix cache; None where no prompts share a beginning."""
        return self.plans[PAGED + 1] if len(self.plans) > PAGED + 1 else None

    @property
    def gain(self) -> dict[str, float]:
        """The rate of paged against each standard reservation; infinite where that has none."""
        paged = self.plans[PAGED].rate
        return {each.name: paged / each.rate if each.rate else float("inf") for each in self.plans[:PAGED]}


def assess(base: Setup, trace: RequestTrace, limits: Limits = Limits()) -> Assessment:  # noqa: B008  (it is frozen)
    """Assess what `base` has in common (GPU, model, limits of the scheduler) for such requests. Its `max_model_len`
    (default: the model's context, or the memory if that is smaller) is what the reservation `max` reserves; outputs are
    cut there. Raises ValueError if no request is accepted, a length is out of bounds, or the weights do not fit.
    """
    model, max_model_len = base.model, base.max_model_len
    if max_model_len is not None and not 2 <= max_model_len <= model.max_context:
        raise ValueError(
            f"max_model_len is {max_model_len}; 2 to the {model.max_context} of {model.name}'s context is allowed"
        )
    for request in trace.requests:
        if request.prompt_len < 1 or request.output_len < 1:
            raise ValueError(
                f"a request has {request.prompt_len} prompt and {request.output_len} output tokens; both need 1"
            )
    served = admissible(base, trace)
    if not served:
        shortest = min((each.num_tokens for each in trace.requests), default=0)
        raise ValueError(
            f"no request fits in {base.longest} tokens; the shortest of {len(trace.requests)} has {shortest}"
        )
    block_sizes = tuple(_block_size(base.roofline, served, size) for size in BLOCK_SIZES)
    block_size = max((b.block_size for b in block_sizes if b.waste <= WASTE_LIMIT), default=BLOCK_SIZES[0])
    paged = replace(base, label=f"paged {block_size}", block_size=block_size)
    fit = max(1, int(paged.num_slots / held_slots(served, block_size)))
    work = work_of(paged, served, 1)
    advised, tpot = _advice(paged, trace, work, fit, limits)
    longest = max(each.num_tokens for each in served)
    settings = [*(replace(base, **each) for each in STANDARD), paged]
    if any(each.hash_ids for each in served):
        settings.append(replace(paged, label=f"{paged.label} + prefix", prefix_cache=True))
    return Assessment(
        setup=paged,
        max_model_len=base.longest,
        mean_prompt=sum(each.prompt_len for each in served) / len(served),
        mean_output=sum(each.output_len for each in served) / len(served),
        mean_length=mean_length(served),
        longest=longest,
        kv_bytes=base.roofline.kv_cache_bytes(),
        num_tokens=base.num_slots,
        plans=tuple(_plan(setup, trace, limits) for setup in settings),
        fit=fit,
        batches=tuple(_batch(paged, work, count) for count in sorted(_doubling(fit) | {advised})),
        advised=advised,
        advised_tpot=tpot,
        sequences_at_worst=base.num_slots // block_size // -(-longest // block_size),
        block_sizes=block_sizes,
        recompute_seconds=base.roofline.recompute_seconds(round(mean_length(served))),
        swap_from=base.roofline.swap_from(block_size),
    )


def _plan(setup: Setup, trace: RequestTrace, limits: Limits) -> Plan:
    reserved = setup.longest if (setup.manager, setup.reserve) == ("standard", "max") else 0
    if reserved > setup.num_slots or not admissible(setup, trace):  # one sequence takes more than the pool
        return Plan(setup.label, None)
    steady = steady_state(setup, trace)
    return Plan(setup.label, Served(steady, goodput(steady, trace, limits) if limits else None))


def _doubling(most: int) -> set[int]:
    """1, 2, 4 ... and `most`."""
    return {1 << bit for bit in range(most.bit_length())} | {most}


def _batch(paged: Setup, work: Work, sequences: int) -> Batch:
    bound = Bound(replace(paged, max_batch_seqs=sequences), work)
    outputs = float(work.outputs.mean())
    price = price_of_million(paged.gpu, bound.rate * outputs)
    return Batch(sequences, sequences / (bound.rate * outputs), bound.rate, price)


def _advice(paged: Setup, trace: RequestTrace, work: Work, fit: int, limits: Limits) -> tuple[int, float]:
    """How many sequences to run, and the time for each token that follows for the share of the limits, simulated.

    Without a limit: as few as give BEND of the rate that all of them give. With one: as many as keep it; 1 if none do.
    """

    def simulated(count: int) -> float:
        return limits.tpot_met(steady_state(replace(paged, max_batch_seqs=count), trace).latencies)

    tpot = limits.tpot
    if tpot is None:
        most = _batch(paged, work, fit).rate
        count = 1 + bisect_left(range(1, fit), BEND * most, key=lambda count: _batch(paged, work, count).rate)
        return count, simulated(count)
    count = max(1, bisect_right(range(1, fit + 1), tpot, key=lambda count: _batch(paged, work, count).step_seconds))
    for _ in range(TRIES):
        found = simulated(count)
        if found <= tpot or count == 1:
            break
        count = max(1, min(count - 1, int(count * tpot / found)))
    return count, found


def _block_size(roofline: Roofline, requests: Sequence[TraceRequest], block_size: int) -> BlockSize:
    model, length = roofline.model, mean_length(requests)
    return BlockSize(
        block_size=block_size,
        waste=1 - length / held_slots(requests, block_size),
        table_bytes=-(-round(length) // block_size) * TABLE_ENTRY,
        run_bytes=block_size * model.full_kv_bytes // model.num_arrays,
        swap_seconds=roofline.swap_seconds(round(length), block_size),
    )
