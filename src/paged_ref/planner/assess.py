"""What paging brings: how many sequences fit, where the GPU's time then goes, and which settings follow.

This is arithmetic on shapes and datasheets, without a run: memory is full, no request waits, and there are no holes
between regions. `paged-ref compare` prints this prediction beside what the real managers do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ..core.memory.standard import Reserve, StandardManager
from .hardware import GPU
from .models import ModelSpec
from .roofline import CONSTANTS, Constants, Roofline, StepTime, chunk_pairs
from .setup import Setup
from .traces import RequestTrace, TraceRequest

RESERVES: tuple[Reserve, ...] = ("max", "pow2", "exact")
# The sizes for which servers have fast kernels. Below 16 the paper's kernel loses time (Kwon et al. 2023, §7.2).
BLOCK_SIZES = (16, 32, 64, 128, 256)
WASTE_LIMIT = 0.01  # share of the slots that may be empty in last blocks
TABLE_ENTRY = 4  # bytes of a block id
ALIGNMENT = 16  # slots to which the swapping manager rounds a region up
Bottleneck = Literal["capacity", "bandwidth", "compute"]


@dataclass(frozen=True, slots=True)
class SteadyState:
    """One way to manage the memory, full of sequences: in each step all decode, and as many begin as end."""

    name: str
    slots: float  # held by a running sequence, mean over its time
    sequences: float  # that fit
    used: float  # share of the held slots that hold a token
    prompt_tokens: float  # computed in a step beside the decodes
    step: StepTime
    requests_per_second: float

    @property
    def tokens_per_second(self) -> float:
        """New tokens: each sequence gets one in each step."""
        return self.sequences / self.step.seconds


@dataclass(frozen=True, slots=True)
class BlockSize:
    """What one block size costs and saves, for a sequence of the mean length."""

    block_size: int
    waste: float  # share of the held slots that are empty, in last blocks
    table_bytes: int  # of the block table
    run_bytes: int  # of K in one piece, which a kernel or a copy reads without another look at the table
    swap_seconds: float  # out and in again


@dataclass(frozen=True, slots=True)
class Assessment:
    """All numbers of `paged-ref assess`."""

    gpu: GPU
    model: ModelSpec
    constants: Constants
    max_model_len: int  # tokens of the longest sequence that is accepted
    mean_prompt: float
    mean_output: float
    mean_length: float  # tokens of a running sequence, mean over its time
    longest: int  # tokens of the longest request
    num_refused: int  # requests longer than max_model_len, left out
    kv_bytes: int  # left for K and V
    num_tokens: int  # whose K and V fit into kv_bytes
    plans: tuple[SteadyState, ...]  # standard max, pow2, exact; paged with the advised block size
    sequences_at_worst: int  # paged, every sequence as long as the longest
    bottleneck: Bottleneck
    block_sizes: tuple[BlockSize, ...]
    block_size: int  # advised
    recompute_seconds: float  # of a sequence at its mean length
    swap_from: int | None  # tokens from which on swapping is faster, with the advised block size; None: never

    @property
    def paged(self) -> SteadyState:
        return self.plans[-1]

    @property
    def gain(self) -> dict[str, float]:
        """Requests per second of paged against each standard reservation; infinite where that holds none."""
        paged, rates = self.paged.requests_per_second, {each.name: each.requests_per_second for each in self.plans[:-1]}
        return {name: paged / rate if rate else float("inf") for name, rate in rates.items()}


def assess(
    gpu: GPU,
    model: ModelSpec,
    requests: Sequence[TraceRequest],
    *,
    max_model_len: int | None = None,
    constants: Constants = CONSTANTS,
) -> Assessment:
    """Assess `model` on `gpu` for such requests, of which only the lengths matter. `max_model_len` (default: the
    model's context) is what the reservation `max` reserves; longer requests are left out and counted. Raises
    ValueError if no request is left, a length is out of bounds, or the weights do not fit.
    """
    longest_allowed = model.max_context if max_model_len is None else max_model_len
    if not 2 <= longest_allowed <= model.max_context:
        raise ValueError(
            f"max_model_len is {longest_allowed}; 2 to the {model.max_context} of {model.name}'s context is allowed"
        )
    for request in requests:
        if request.prompt_len < 1 or request.output_len < 1:
            raise ValueError(
                f"a request has {request.prompt_len} prompt and {request.output_len} output tokens; both need 1"
            )
    served = [each for each in requests if each.num_tokens <= longest_allowed]
    if not served:
        shortest = min((each.num_tokens for each in requests), default=0)
        raise ValueError(f"no request fits in {longest_allowed} tokens; the shortest of {len(requests)} has {shortest}")
    roofline = Roofline(gpu, model, constants)
    num_tokens = roofline.num_kv_tokens()
    longest = max(each.num_tokens for each in served)
    length = _mean_length(served)
    block_sizes = tuple(_block_size(roofline, served, size) for size in BLOCK_SIZES)
    block_size = max((b.block_size for b in block_sizes if b.waste <= WASTE_LIMIT), default=BLOCK_SIZES[0])

    def full(name: str, slots: float) -> SteadyState:
        return _steady_state(name, slots, int(num_tokens / slots), roofline, served)

    def reserved(reserve: Reserve) -> float:
        manager = StandardManager(longest_allowed, longest_allowed, reserve)
        return _mean_while_running(served, lambda each: manager.region_size(each.prompt_len, each.num_tokens))

    plans = [full(f"standard {reserve}", reserved(reserve)) for reserve in RESERVES]
    paged = full(f"paged {block_size}", _held_in_blocks(served, block_size))
    return Assessment(
        gpu=gpu,
        model=model,
        constants=constants,
        max_model_len=longest_allowed,
        mean_prompt=sum(each.prompt_len for each in served) / len(served),
        mean_output=sum(each.output_len for each in served) / len(served),
        mean_length=length,
        longest=longest,
        num_refused=len(requests) - len(served),
        kv_bytes=roofline.kv_cache_bytes(),
        num_tokens=num_tokens,
        plans=(*plans, paged),
        sequences_at_worst=num_tokens // block_size // -(-longest // block_size),
        bottleneck=_bottleneck(paged.step),
        block_sizes=block_sizes,
        block_size=block_size,
        recompute_seconds=roofline.recompute_seconds(round(length)),
        swap_from=roofline.swap_from(block_size),
    )


def predict(setup: Setup, trace: RequestTrace) -> SteadyState:
    """The steady state of a setup that is kept full: without holes, preemptions and prefix hits. Outputs are cut at
    the setup's context. Raises ValueError where no request fits.
    """
    longest = setup.longest
    served = [
        replace(each, output_len=min(each.output_len, longest - each.prompt_len))
        for each in trace.requests
        if each.prompt_len < longest
    ]
    if not served:
        raise ValueError(f"none of the requests fits in a context of {longest}")
    if setup.manager == "standard":
        manager = setup.make_manager()
        slots = _mean_while_running(served, lambda each: manager.max_slots_needed(each.prompt_len, each.num_tokens - 1))
    else:
        slots = _held_in_blocks(served, setup.block_size if setup.manager == "paged" else ALIGNMENT)
    sequences = max(1.0, min(setup.max_batch_seqs, setup.num_slots / slots))
    if setup.manager == "standard" and setup.reserve == "max":
        sequences = float(int(sequences))  # all regions are equal
    return _steady_state(setup.label, slots, sequences, setup.roofline, served)


def _mean_while_running(requests: Sequence[TraceRequest], value: Callable[[TraceRequest], float]) -> float:
    """Mean over the sequences that run at a moment. A sequence runs for as many steps as it has output tokens, and
    counts as many times."""
    return sum(each.output_len * value(each) for each in requests) / sum(each.output_len for each in requests)


def _mean_length(requests: Sequence[TraceRequest]) -> float:
    """Tokens of a running sequence, which grows evenly from its prompt to its end."""
    return _mean_while_running(requests, lambda each: each.prompt_len + (each.output_len + 1) / 2)


def _held_in_blocks(requests: Sequence[TraceRequest], block_size: int) -> float:
    """Slots of the blocks that a running sequence holds, over its life from the prompt to the last token."""

    def blocks_up_to(length: int) -> int:
        """Blocks of a sequence of 1 token, of 2, ... of `length`, added up."""
        full, rest = divmod(length, block_size)
        return block_size * full * (full + 1) // 2 + rest * (full + 1)

    def slots(each: TraceRequest) -> float:
        return block_size * (blocks_up_to(each.num_tokens) - blocks_up_to(each.prompt_len)) / each.output_len

    return _mean_while_running(requests, slots)


def _steady_state(
    name: str, slots: float, sequences: float, roofline: Roofline, requests: Sequence[TraceRequest]
) -> SteadyState:
    """`sequences` that hold `slots` each."""
    length, outputs = _mean_length(requests), sum(each.output_len for each in requests)
    prompt_tokens = sequences * sum(each.prompt_len for each in requests) / outputs
    prompt_pairs = sequences * sum(chunk_pairs(each.prompt_len, each.prompt_len) for each in requests) / outputs
    step = roofline.step(
        round(sequences + prompt_tokens),
        round(sequences * length + prompt_tokens),
        pairs=round(sequences * length + prompt_pairs),
        num_logits=round(sequences),
    )
    requests_per_second = sequences / (outputs / len(requests)) / step.seconds
    return SteadyState(name, slots, sequences, length / slots, prompt_tokens, step, requests_per_second)


def _bottleneck(step: StepTime) -> Bottleneck:
    """What a step waits for. The weights are read, and a step begins, once for all sequences of the batch: where that
    takes most of the time, more sequences would make each one cheaper, and memory for them is missing."""
    if step.compute > max(step.weights + step.kv, step.overhead):
        return "compute"
    return "bandwidth" if step.kv > max(step.weights, step.overhead) else "capacity"


def _block_size(roofline: Roofline, requests: Sequence[TraceRequest], block_size: int) -> BlockSize:
    model, length = roofline.model, _mean_length(requests)
    return BlockSize(
        block_size=block_size,
        waste=1 - length / _held_in_blocks(requests, block_size),
        table_bytes=-(-round(length) // block_size) * TABLE_ENTRY,
        run_bytes=block_size * model.num_kv_heads * model.head_size * model.kv_bits // 8,
        swap_seconds=roofline.swap_seconds(round(length), block_size),
    )
