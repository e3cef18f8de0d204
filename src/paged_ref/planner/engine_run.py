"""The same requests through a simulation and through a real engine, step by step.

The engine runs a real model on real tokens, on the CPU or the GPU, for as long as that takes. Each request is added
before the same step as in the simulation, whose clock decides that; then every step must be the same.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from ..core.engine.scheduler import StepPlan
from ..core.memory.manager import Transfer
from ..core.memory.usage import MemoryUsage
from ..extras.sampling_params import SamplingParams
from ..extras.step_records import StepRecord
from ..llm import LLM
from ..timeline.events import Log
from .metrics import Shares, UsageAverage
from .setup import Setup
from .simulate import Simulation
from .traces import RequestTrace


@dataclass(frozen=True, slots=True)
class StepDecisions:
    """What was decided in one step, and where the memory was while it was computed."""

    chunks: list[tuple[int, int]]  # (sequence, tokens computed)
    num_preempted: int
    transfers: list[Transfer]
    num_running: int
    num_waiting: int
    usage: MemoryUsage


def simulated_steps(setup: Setup, trace: RequestTrace) -> tuple[list[StepDecisions], list[int]]:
    """Every step of a simulation, and how many requests had arrived before each."""
    steps: list[StepDecisions] = []
    arrived: list[int] = []
    samples: list[MemoryUsage] = []

    def watch(plan: StepPlan) -> None:
        arrived.append(simulation.num_arrived)
        chunks = [(seq.seq_id, count) for seq, count in plan.chunks]
        num_running, num_waiting = len(simulation.scheduler.running), len(simulation.scheduler.waiting)
        steps.append(StepDecisions(chunks, len(plan.preempted), plan.transfers, num_running, num_waiting, samples[-1]))

    simulation = Simulation(setup, trace, sample_every=1, on_sample=samples.append, on_step=watch)
    simulation.run()
    return steps, arrived


def engine_steps(
    setup: Setup, trace: RequestTrace, arrived: list[int], *, backend: str = "auto", log: Log | None = None
) -> list[StepDecisions]:
    """Every step of an engine with the embedded model, given that `arrived[i]` requests have arrived before step i.

    A request that the engine refuses keeps its place in the count. `log` gets the engine's events.
    """
    records: list[StepRecord] = []
    llm = LLM(
        "tiny",
        manager=setup.manager,
        block_size=setup.block_size,
        kv_cache_tokens=setup.num_slots,
        host_kv_tokens=setup.host_kv_tokens,
        max_model_len=setup.longest,
        max_batch_tokens=setup.max_batch_tokens,
        max_batch_seqs=setup.max_batch_seqs,
        reserve=setup.reserve,
        allocator=setup.allocator,
        preemption=setup.preemption,
        prefix_cache=setup.prefix_cache,
        watermark=setup.watermark,
        backend=backend,
        log=log,
        on_step=records.append,
    )
    place_of: list[int] = []  # by the engine's seq_id: the request's place in the trace
    final_slots: dict[int, int] = {}
    num_added = 0
    for count in arrived:
        while num_added < count:
            request = trace.requests[num_added]
            prompt = token_ids(request.prompt_len, request.hash_ids, trace.hash_block, num_added, llm.config.vocab_size)
            try:
                llm.add_request(prompt, SamplingParams(max_tokens=request.output_len, ignore_eos=True))
            except ValueError:
                pass  # the simulation refuses the same requests: otherwise the steps differ
            else:
                final_slots[len(place_of)] = min(request.num_tokens, setup.longest) - 1
                place_of.append(num_added)
            num_added += 1
        llm.step()
    return [
        StepDecisions(
            [(place_of[seq_id], count) for seq_id, count in record.chunks],
            record.num_preempted,
            record.transfers,
            record.num_running,
            record.num_waiting,
            record.snapshot.usage(final_slots),
        )
        for record in records
    ]


def token_ids(length: int, hash_ids: tuple[int, ...], hash_block: int, place: int, vocab_size: int) -> list[int]:
    """Tokens of a prompt of which only the length and the identity of its blocks are known."""
    ids: list[int] = []
    for hash_id in hash_ids:
        ids += random.Random(f"block {hash_id}").choices(range(vocab_size), k=hash_block)
    ids += random.Random(f"request {place}").choices(range(vocab_size), k=max(0, length - len(ids)))
    return ids[:length]


def shares_of(steps: list[StepDecisions]) -> Shares:
    """Mean over the steps in which a request waited; over all steps if none ever waited."""
    average = UsageAverage()
    for step in [step for step in steps if step.num_waiting] or steps:
        average.add(step.usage, 1.0)
    return average.shares()
