"""Prefix caching on a real day's prompts, through the real manager."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile

import pytest
from conftest import SHARED

from paged_ref.core.memory.paged import PagedManager
from paged_ref.extras.prefix_cache import CachingBlockPool, block_digests
from paged_ref.planner.hardware import gpu_named
from paged_ref.planner.models import model_named
from paged_ref.planner.setup import Setup
from paged_ref.planner.simulate import Simulation
from paged_ref.planner.trace_files import read_trace
from paged_ref.planner.traces import RequestTrace, at_rate, drawn, first, scaled, with_prefix

NUM_REQUESTS = 1200
BLOCK = 4  # tokens that stand for one of Mooncake's blocks of 512


@pytest.fixture(scope="module")
def mooncake() -> RequestTrace:
    path = SHARED / "traces" / "mooncake_conversation.jsonl.gz"
    if not path.is_file():
        pytest.skip("no ../shared/traces/mooncake_conversation.jsonl.gz beside the project")
    return read_trace(path)


def keys_of(trace: RequestTrace) -> list[Sequence[int]]:
    return [each.hash_ids for each in trace.requests]


def hits_in_the_cache(prompts: Sequence[Sequence[int]]) -> int:
    """Leading blocks found by a cache that never evicts: the published definition, as over the whole trace in
    tests/extras/test_prefix_cache.py."""
    hits, seen = 0, set[bytes]()
    for keys in prompts:
        digests = list(block_digests(keys, 1))
        hits += sum(1 for _ in takewhile(seen.__contains__, digests))
        seen.update(digests)
    return hits


def test_the_manager_finds_every_block_that_the_trace_says_is_known(mooncake: RequestTrace) -> None:
    """One request after another. The trace counts a last block that is not full as a block, so here every block is
    full, and one token more is computed, as an engine must."""
    prompts = keys_of(first(mooncake, NUM_REQUESTS))
    manager = PagedManager(CachingBlockPool(sum(map(len, prompts)) + 1), BLOCK)
    hits = 0
    for seq_id, keys in enumerate(prompts):
        tokens = [key for key in keys for _ in range(BLOCK)] + [-1 - seq_id]
        known = manager.admit(seq_id, tokens, len(tokens))
        manager.append([(seq_id, len(tokens) - known)])
        manager.commit(seq_id, tokens, len(tokens))
        manager.free(seq_id)
        hits += known // BLOCK
    assert hits == hits_in_the_cache(prompts)
    assert hits > 0.05 * sum(map(len, prompts))


def test_a_simulation_knows_whole_blocks_but_the_last(mooncake: RequestTrace) -> None:
    """Requests that do not overlap in time, lengths a 32nd: what is known is whole leading blocks, less the last
    token's, which an engine must compute."""
    trace = at_rate(replace(scaled(first(mooncake, 150), 1 / 32), timed=False), 0.01)
    assert trace.hash_block == 16
    setup = Setup("p", gpu_named("H100-SXM"), model_named("Llama-3.1-8B"), prefix_cache=True)
    outcome = Simulation(setup, trace).run()
    expected, seen = 0, set[tuple[int, ...]]()
    for each in trace.requests:
        blocks = (each.prompt_len - 1) // 16  # whole, and not the last token's
        known = 0
        while known < blocks and each.hash_ids[: known + 1] in seen:
            known += 1
        expected += 16 * known
        seen |= {each.hash_ids[: i + 1] for i in range(each.prompt_len // 16)}
    assert outcome.known_tokens == expected > 0
    assert outcome.prompt_tokens == sum(each.prompt_len for each in trace.requests)
    assert outcome.computed_tokens == sum(e.prompt_len + e.output_len - 1 for e in trace.requests) - expected


def test_a_shared_prefix_is_computed_once() -> None:
    trace = at_rate(with_prefix(drawn("t", 30, 10, 50), 80), 0.1)
    setup = Setup("p", gpu_named("A100-40GB"), model_named("OPT-13B"), prefix_cache=True)
    outcome = Simulation(setup, trace).run()
    assert outcome.known_tokens == 49 * 80
    assert Simulation(replace(setup, prefix_cache=False), trace).run().known_tokens == 0
