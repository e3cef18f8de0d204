"""The simulation counts what an engine counts, and fast forward changes nothing."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
from support.manager_state import state_of

from paged_ref.core.memory.paged import PagedManager
from paged_ref.extras.managers import make_manager
from paged_ref.planner.decoding import slack_in
from paged_ref.planner.engine_run import StepDecisions, engine_steps, shares_of, simulated_steps
from paged_ref.planner.hardware import gpu_named
from paged_ref.planner.models import model_named
from paged_ref.planner.setup import Setup
from paged_ref.planner.simulate import Simulation
from paged_ref.planner.traces import RequestTrace, TraceRequest, at_rate, generated

TINY = Setup("tiny", gpu_named("T4"), model_named("tiny"), kv_tokens=256, max_model_len=128, max_batch_tokens=64)
OPT = Setup("opt", gpu_named("A100-40GB"), model_named("OPT-13B"))

# Ways to serve that between them refuse, wait, preempt, swap, move, share and cut prompts into chunks.
WAYS: dict[str, dict[str, Any]] = {
    "paged": {},
    "paged, blocks of 4": {"block_size": 4, "watermark": 0.0},
    "paged, swap": {"preemption": "swap"},
    "paged, little host memory": {"preemption": "swap", "host_kv_tokens": 64},
    "paged, prefix cache": {"prefix_cache": True, "block_size": 8},
    "paged, few sequences": {"max_batch_seqs": 3, "max_batch_tokens": 16},
    "standard, max": {"manager": "standard"},
    "standard, pow2": {"manager": "standard", "reserve": "pow2"},
    "standard, exact": {"manager": "standard", "reserve": "exact"},
    "standard, exact, buddy": {"manager": "standard", "reserve": "exact", "allocator": "buddy"},
    "swapping": {"manager": "swapping", "preemption": "swap"},
    "swapping, recompute": {"manager": "swapping", "preemption": "recompute"},
}


def busy(seed: int, count: int = 30, longest: int = 140) -> RequestTrace:
    """More than a pool of 256 tokens can hold, some of it too long for the context; prefixes repeat."""
    rng = random.Random(seed)
    requests, at = [], 0.0
    for _ in range(count):
        at += rng.choice([0.0, rng.expovariate(300)])
        prompt = rng.randint(1, rng.choice([longest // 4, longest]))
        ids = tuple([*range(rng.randint(0, 3)), *(rng.randrange(100, 10**6) for _ in range(9))][: -(-prompt // 16)])
        requests.append(TraceRequest(at, prompt, rng.randint(1, 60), ids))
    return RequestTrace("busy", tuple(requests), timed=True, hash_block=16)


@pytest.mark.parametrize("way", WAYS)
def test_every_step_is_the_engines(way: str) -> None:
    """Which sequences run, for how many tokens, which are preempted, what moves, and each part of the memory."""
    setup = replace(TINY, **WAYS[way])
    trace = busy(1, 20)
    simulated, arrived = simulated_steps(setup, trace)
    ran = engine_steps(setup, trace, arrived, backend="reference")
    assert len(ran) == len(simulated)
    for number, (one, other) in enumerate(zip(simulated, ran, strict=True)):
        assert one == other, f"step {number}"
    assert shares_of(simulated) == shares_of(ran)


def test_these_ways_exercise_the_scheduler() -> None:
    """Or the equality above would say little."""
    steps: dict[str, list[StepDecisions]] = {}
    for way, changes in WAYS.items():
        steps[way], _ = simulated_steps(replace(TINY, **changes), busy(1, 20))
        assert any(step.num_waiting for step in steps[way]), way
    kinds = {transfer.kind for each in steps.values() for step in each for transfer in step.transfers}
    assert kinds == {"move", "swap_out", "swap_in"}  # a copy comes with forks only
    assert any(step.num_preempted for step in steps["paged"])
    outcome = Simulation(replace(TINY, **WAYS["paged, prefix cache"]), busy(1)).run()
    assert outcome.known_tokens > 0
    assert outcome.refused > 0
    assert outcome.cut > 0


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("sample_every", [1, 7])
def test_fast_forward_changes_nothing(way: str, sample_every: int) -> None:
    """The outcome to the last digit, and on the way the manager's whole state, block by block."""
    setup = replace(TINY, **WAYS[way])
    states: dict[bool, list[Any]] = {}
    outcomes = {}
    for skip in (True, False):
        seen: list[Any] = []
        simulation = Simulation(
            setup,
            busy(2),
            skip=skip,
            sample_every=sample_every,
            on_sample=lambda usage: seen.append((usage, simulation.now, state_of(simulation.manager))),  # noqa: B023
        )
        outcomes[skip], states[skip] = simulation.run(), seen
        simulation.manager.check_integrity()
        assert state_of(simulation.manager).sequences == {}
    assert outcomes[True] == outcomes[False]
    assert len(states[True]) == outcomes[True].steps // sample_every
    assert states[True] == states[False]


@pytest.mark.parametrize("rate", [2.0, float("inf")])
@pytest.mark.parametrize("way", ["paged", "paged, swap", "paged, prefix cache", "standard, exact", "swapping"])
def test_skipping_changes_nothing_on_a_day_of_the_papers_requests(way: str, rate: float) -> None:
    setup = replace(OPT, **WAYS[way])
    trace = at_rate(generated("sharegpt", 150), rate)
    assert Simulation(setup, trace).run() == Simulation(setup, trace, skip=False).run()


def test_slack_is_what_append_takes_from_no_pool() -> None:
    manager = make_manager("paged", 32, max_model_len=32, block_size=4, watermark=0)
    assert isinstance(manager, PagedManager)
    slack = slack_in(manager)
    manager.admit(0, [0] * 5, 20)
    manager.append([(0, 5)])
    free = manager.pool.num_free
    assert slack(0) == 3
    manager.append([(0, 3)])
    assert (manager.pool.num_free, slack(0)) == (free, 0)
    manager.append([(0, 1)])
    assert (manager.pool.num_free, slack(0)) == (free - 1, 3)
    manager.fork(0, 1)  # the next token of either sequence copies the shared last block
    assert slack(0) == slack(1) == 0
    regions = make_manager("standard", 32, max_model_len=32, reserve="exact")
    regions.admit(0, [0] * 5, 20)
    regions.append([(0, 7)])
    assert slack_in(regions)(0) == 13
