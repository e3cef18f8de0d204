"""What paging would buy: how many sequences fit, what the GPU's time then goes to, and which settings follow.

Arithmetic on shapes and datasheets, with no run: mean lengths, full memory, no waiting and no holes between
regions. `paged-ref compare` steps the real managers over real arrivals; this says in a second what to expect.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from ..core.memory.standard import Reserve, StandardManager
from .hardware import GPU
from .models import ModelSpec
from .roofline import (
    CONSTANTS,
    Constants,
    StepTime,
    chunk_pairs,
    kv_cache_bytes,
    num_kv_tokens,
    recompute_seconds,
    step_time,
    swap_from,
    swap_seconds,
)

RESERVES: tuple[Reserve, ...] = ("max", "pow2", "exact")
# What the fast kernels of today's servers take. Below 16 the paper's kernel loses time (Kwon et al. 2023, §7.2).
BLOCK_SIZES = (16, 32, 64, 128, 256)
WASTE_LIMIT = 0.01  # of the slots, empty in last blocks: what a larger block may cost
TABLE_ENTRY = 4  # bytes of a block id
Bottleneck = Literal["capacity", "bandwidth", "compute"]


class Request(NamedTuple):
    """Lengths in tokens. A sequence runs for as many steps as it has output tokens."""

    prompt: int
    output: int


@dataclass(frozen=True, slots=True)
class Plan:
    """One way to manage the memory, filled with sequences, and a step in that steady state."""

    name: str
    slots: float  # that a running sequence holds, mean over its time
    sequences: int  # that fit at once
    used: float  # share of the held slots that hold a token
    prompt_tokens: float  # that a step computes beside the decodes: as many sequences begin as end
    step: StepTime
    requests_per_second: float

    @property
    def tokens_per_second(self) -> float:
        """New tokens: one of each sequence in each step."""
        return self.sequences / self.step.seconds


@dataclass(frozen=True, slots=True)
class BlockSize:
    """What one block size costs and saves."""

    block_size: int
    waste: float  # share of the held slots, empty in last blocks
    table_bytes: int  # of the block table of a sequence at its mean length
    run_bytes: int  # of K in one piece: what a kernel or a copy reads without looking at the table again
    swap_seconds: float  # out and in again, of a sequence at its mean length


@dataclass(frozen=True, slots=True)
class Assessment:
    """All that `paged-ref assess` says, in numbers."""

    gpu: GPU
    model: ModelSpec
    constants: Constants
    max_model_len: int  # tokens of the longest sequence that is let in
    mean_prompt: float
    mean_output: float
    mean_length: float  # tokens of a sequence that runs, mean over its time
    longest: int  # tokens of the longest request
    num_refused: int  # requests longer than max_model_len, left out
    kv_bytes: int  # left for K and V
    num_tokens: int  # whose K and V fit there
    plans: tuple[Plan, ...]  # standard max, pow2, exact; paged with the advised block size
    sequences_at_worst: int  # paged, every sequence as long as the longest
    bottleneck: Bottleneck
    block_sizes: tuple[BlockSize, ...]
    block_size: int  # advised
    recompute_seconds: float  # of a sequence at its mean length
    swap_from: int | None  # tokens from which on swapping is the faster, with the advised block size; None: never

    @property
    def paged(self) -> Plan:
        return self.plans[-1]

    @property
    def gain(self) -> dict[str, float]:
        """Requests per second of paged against each standard reservation; infinite where that holds none."""
        return {
            plan.name: self.paged.requests_per_second / plan.requests_per_second
            if plan.requests_per_second
            else float("inf")
            for plan in self.plans[:-1]
        }


def assess(
    gpu: GPU,
    model: ModelSpec,
    requests: Sequence[Request],
    *,
    max_model_len: int | None = None,
    constants: Constants = CONSTANTS,
) -> Assessment:
    """Weigh `model` on `gpu` for such requests. `max_model_len` (default: the model's context) is what the
    reservation `max` reserves. Longer requests are left out and counted. Raises ValueError: no request is left,
    a length is out of bounds, or the weights do not fit.
    """
    longest_allowed = model.max_context if max_model_len is None else max_model_len
    if not 2 <= longest_allowed <= model.max_context:
        raise ValueError(
            f"max_model_len is {longest_allowed}; 2 to the {model.max_context} of {model.name}'s context can be had"
        )
    for request in requests:
        if request.prompt < 1 or request.output < 1:
            raise ValueError(f"a request has {request.prompt} prompt and {request.output} output tokens; both need 1")
    served = [each for each in requests if each.prompt + each.output <= longest_allowed]
    if not served:
        shortest = min((each.prompt + each.output for each in requests), default=0)
        raise ValueError(f"no request fits in {longest_allowed} tokens; the shortest of {len(requests)} has {shortest}")
    num_tokens = num_kv_tokens(gpu, model, constants)
    longest = max(each.prompt + each.output for each in served)
    length = _mean_length(served)
    block_sizes = tuple(_block_size(gpu, model, served, size, length, constants) for size in BLOCK_SIZES)
    block_size = max((b.block_size for b in block_sizes if b.waste <= WASTE_LIMIT), default=BLOCK_SIZES[0])
    plans = [
        _plan(f"standard {reserve}", _reserved(served, reserve, longest_allowed), gpu, model, served, constants)
        for reserve in RESERVES
    ]
    paged = _plan(f"paged {block_size}", _held_in_blocks(served, block_size), gpu, model, served, constants)
    return Assessment(
        gpu=gpu,
        model=model,
        constants=constants,
        max_model_len=longest_allowed,
        mean_prompt=sum(each.prompt for each in served) / len(served),
        mean_output=sum(each.output for each in served) / len(served),
        mean_length=length,
        longest=longest,
        num_refused=len(requests) - len(served),
        kv_bytes=kv_cache_bytes(gpu, model, constants),
        num_tokens=num_tokens,
        plans=(*plans, paged),
        sequences_at_worst=num_tokens // block_size // -(-longest // block_size),
        bottleneck=_bottleneck(paged.step),
        block_sizes=block_sizes,
        block_size=block_size,
        recompute_seconds=recompute_seconds(gpu, model, round(length), constants),
        swap_from=swap_from(gpu, model, block_size, constants),
    )


# --- slots -------------------------------------------------------------------------------------------------


def _mean_while_running(requests: Sequence[Request], value: Callable[[Request], float]) -> float:
    """Mean over the sequences that run at a moment: one that runs twice as long is met twice as often."""
    return sum(each.output * value(each) for each in requests) / sum(each.output for each in requests)


def _mean_length(requests: Sequence[Request]) -> float:
    """Tokens of a running sequence: it grows evenly from its prompt to its end."""
    return _mean_while_running(requests, lambda each: each.prompt + (each.output + 1) / 2)


def _reserved(requests: Sequence[Request], reserve: Reserve, max_model_len: int) -> float:
    """Slots that the standard manager reserves for a running sequence."""
    manager = StandardManager(max_model_len, max_model_len, reserve)
    return _mean_while_running(requests, lambda each: manager.region_size(each.prompt, each.prompt + each.output))


def _held_in_blocks(requests: Sequence[Request], block_size: int) -> float:
    """Slots of the blocks that a running sequence holds, over its life from the prompt to the last token."""

    def blocks_up_to(length: int) -> int:
        """Blocks of a sequence of 1 token, of 2, ... of `length`, added up."""
        full, rest = divmod(length, block_size)
        return block_size * full * (full + 1) // 2 + rest * (full + 1)

    def slots(each: Request) -> float:
        held = blocks_up_to(each.prompt + each.output) - blocks_up_to(each.prompt)
        return block_size * held / each.output

    return _mean_while_running(requests, slots)


# --- time --------------------------------------------------------------------------------------------------


def _plan(
    name: str, slots: float, gpu: GPU, model: ModelSpec, requests: Sequence[Request], constants: Constants
) -> Plan:
    """Memory filled with sequences that hold `slots` each: in each step all decode, and as many begin as end."""
    sequences = int(num_kv_tokens(gpu, model, constants) / slots)
    length, outputs = _mean_length(requests), sum(each.output for each in requests)
    prompt_tokens = sequences * sum(each.prompt for each in requests) / outputs
    prompt_pairs = sequences * sum(chunk_pairs(each.prompt, each.prompt) for each in requests) / outputs
    step = step_time(
        gpu,
        model,
        round(sequences + prompt_tokens),
        round(sequences * length + prompt_tokens),
        query_key_pairs=round(sequences * length + prompt_pairs),
        num_logits=sequences,
        constants=constants,
    )
    steps_each = outputs / len(requests)
    return Plan(
        name=name,
        slots=slots,
        sequences=sequences,
        used=length / slots,
        prompt_tokens=prompt_tokens,
        step=step,
        requests_per_second=sequences / steps_each / step.seconds,
    )


def _bottleneck(step: StepTime) -> Bottleneck:
    """What a step waits for. Weights are read, and a step begins, once for all sequences of the batch: where that
    is most of it, more sequences at once would make each cheaper, and memory to hold them is what lacks."""
    if step.compute > max(step.weights + step.kv, step.overhead):
        return "compute"
    return "bandwidth" if step.kv > max(step.weights, step.overhead) else "capacity"


# --- blocks, swapping --------------------------------------------------------------------------------------


def _block_size(
    gpu: GPU, model: ModelSpec, requests: Sequence[Request], block_size: int, length: float, constants: Constants
) -> BlockSize:
    return BlockSize(
        block_size=block_size,
        waste=1 - length / _held_in_blocks(requests, block_size),
        table_bytes=-(-round(length) // block_size) * TABLE_ENTRY,
        run_bytes=block_size * model.num_kv_heads * model.head_size * model.kv_bits // 8,
        swap_seconds=swap_seconds(gpu, model, round(length), block_size, constants),
    )
