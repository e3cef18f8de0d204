"""The runs that `paged-ref viz` makes: real requests on a real engine, with a log, under one manager or all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...core.model.loading import Checkpoint
from ...extras.managers import ManagerName
from ...extras.sampling_params import SamplingParams
from ...interop.checkpoints import load
from ...interop.model_memory import require_kv_memory
from ...llm import LLM
from ...timeline.events import Event

Arrival = tuple[int, str, SamplingParams]  # the step before which a request comes, its prompt, what it asks for


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests, and how much memory there is for them."""

    arrivals: Sequence[Arrival]
    model: str = "tiny"
    block_size: int = 4
    num_blocks: int = 12
    num_host_blocks: int = 8
    first_blocks: tuple[int, ...] = ()  # to be handed out before the others


# What the paper draws, with so few blocks that all of memory management is needed: Figure 6 (A begins in blocks
# 7, 1 and 3), Figure 8 (B is two samples of a prompt), Figure 7 (C), and then D and E, until there is no room.
PAPER = Workload(
    arrivals=(
        (0, "Four score and seven years ago our", SamplingParams(max_tokens=12)),
        (2, "Four score and seven years ago the", SamplingParams(max_tokens=10, n=2, temperature=0.8, seed=2)),
        (4, "It was the best of times", SamplingParams(max_tokens=12)),
        (6, "Once upon a time", SamplingParams(max_tokens=14)),
        (13, "Four score and seven years ago our fathers brought forth", SamplingParams(max_tokens=8)),
    ),
    first_blocks=(7, 1, 3),
)


def workload(
    prompts: Sequence[str],
    params: SamplingParams,
    *,
    model: str = "tiny",
    block_size: int = 4,
    num_blocks: int | None = None,
    num_host_blocks: int | None = None,
) -> Workload:
    """Prompts that come two steps apart. Without `num_blocks` there are too few for all prompts together."""
    if block_size < 1:
        raise ValueError(f"block_size is {block_size}; at least 1 is needed")
    if num_blocks is None:
        checkpoint = load(model)
        for asked in (("max_tokens", params.max_tokens or 0), ("n", params.n)):
            require_kv_memory(checkpoint.config, "float32", "float32", asked)
        lengths = [_longest(checkpoint, prompt, params) for prompt in prompts]
        each = [params.n * -(-length // block_size) for length in lengths]
        num_blocks = max(*each, -(-2 * sum(each) // 3), 1)
    if num_host_blocks is None:
        num_host_blocks = num_blocks
    arrivals = tuple((2 * i, prompt, params) for i, prompt in enumerate(prompts))
    return Workload(arrivals, model, block_size, num_blocks, num_host_blocks)


def _longest(model: Checkpoint, prompt: str, params: SamplingParams) -> int:
    """Tokens of a prompt and its output."""
    return len(model.tokenizer.encode(prompt)) + (params.max_tokens or model.config.max_position_embeddings)


def record(work: Workload, manager: ManagerName) -> list[Event]:
    """Run the requests under one manager, and return all that happened."""
    events: list[Event] = []
    model = load(work.model)
    longest = max(_longest(model, prompt, params) for _, prompt, params in work.arrivals)
    sizes = ("blocks", work.num_blocks), ("host_blocks", work.num_host_blocks)
    require_kv_memory(model.config, "float32", "float32", *sizes, unit=work.block_size)
    num_slots = work.num_blocks * work.block_size
    paged, can_swap = manager == "paged", manager != "standard" and work.num_host_blocks > 0
    first = [block for block in work.first_blocks if block < work.num_blocks]
    llm = LLM(
        work.model,
        manager=manager,
        block_size=work.block_size,
        kv_cache_tokens=num_slots,
        host_kv_tokens=work.num_host_blocks * work.block_size if can_swap else 0,
        max_model_len=min(longest, model.config.max_position_embeddings, max(1, num_slots)),
        preemption="swap" if can_swap else "recompute",
        prefix_cache=paged,
        watermark=0.0,
        free_order=[*first, *(b for b in range(work.num_blocks) if b not in first)] if paged else None,
        log=events.append,
    )
    coming = list(work.arrivals)
    step = 0
    while coming or llm.has_unfinished:
        while coming and coming[0][0] <= step:
            _, prompt, params = coming.pop(0)
            llm.add_request(prompt, params)
        llm.step()
        step += 1
    return events
