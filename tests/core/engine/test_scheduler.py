"""Continuous batching without a model: which sequences run, for how many tokens, and which have to wait."""

from __future__ import annotations

import random
from typing import Any

import pytest

from paged_ref.core.engine.scheduler import Scheduler, StepPlan
from paged_ref.core.engine.sequence import Group, Sequence, Status
from paged_ref.core.memory.block_pool import BlockPool
from paged_ref.core.memory.manager import KVCacheManager
from paged_ref.core.memory.paged import PagedManager
from paged_ref.core.memory.standard import StandardManager
from paged_ref.extras.host_swap import SwappablePagedManager


def paged(num_blocks: int, block_size: int) -> PagedManager:
    return PagedManager(BlockPool(num_blocks), block_size)


def sequence(seq_id: int, prompt: int, new: int) -> Group:
    return Group([Sequence(seq_id, [0] * prompt, prompt, prompt + new)])


def run(scheduler: Scheduler, plan: StepPlan) -> None:
    """What the engine does after a step: computed tokens, a new one for each that caught up, the end."""
    for seq, num_tokens in plan.chunks:
        seq.num_computed += num_tokens
        if seq.num_uncomputed == 0:
            seq.tokens.append(0)
            if len(seq.tokens) == seq.max_len:
                scheduler.finish(next(group for group in scheduler.running if seq in group.seqs), seq)
    scheduler.manager.check_integrity()


def chunks(plan: StepPlan) -> list[tuple[int, int]]:
    return [(seq.seq_id, num_tokens) for seq, num_tokens in plan.chunks]


def test_prefill_is_cut_into_chunks_and_mixed_with_decodes() -> None:
    scheduler = Scheduler(paged(100, 4), max_batch_tokens=8, max_batch_seqs=10)
    scheduler.add(sequence(0, 5, 10))
    scheduler.add(sequence(1, 10, 10))
    scheduler.add(sequence(2, 2, 10))
    seen = []
    for _ in range(3):
        plan = scheduler.schedule()
        seen.append(chunks(plan))
        run(scheduler, plan)
    assert seen == [[(0, 5), (1, 3)], [(0, 1), (1, 7)], [(0, 1), (1, 1), (2, 2)]]


def test_the_batch_has_a_largest_size() -> None:
    scheduler = Scheduler(paged(100, 4), max_batch_tokens=100, max_batch_seqs=2)
    for i in range(3):
        scheduler.add(sequence(i, 3, 2))
    assert len(scheduler.schedule().chunks) == 2


def test_the_latest_arrival_is_preempted_and_its_tokens_are_computed_again() -> None:
    scheduler = Scheduler(paged(4, 4), max_batch_tokens=100, max_batch_seqs=10)
    first, second = sequence(0, 8, 8), sequence(1, 7, 8)
    scheduler.add(first)
    scheduler.add(second)
    run(scheduler, scheduler.schedule())  # both prompts: all 4 blocks
    plan = scheduler.schedule()  # the first needs a third block
    assert plan.preempted == [second]
    assert chunks(plan) == [(0, 1)]
    assert (second.status, second.leader.num_computed, len(second.leader.tokens)) == (Status.WAITING, 0, 8)
    run(scheduler, plan)
    while first.status is not Status.FINISHED:
        plan = scheduler.schedule()
        run(scheduler, plan)
    plan = scheduler.schedule()
    assert chunks(plan) == [(1, 8)]  # the prompt and the token that it had generated, as one prefill


def test_what_can_never_fit_is_refused_with_the_numbers() -> None:
    scheduler = Scheduler(paged(4, 4), max_batch_tokens=100, max_batch_seqs=10)
    scheduler.add(sequence(0, 9, 8))  # 16 slots: the last token needs none
    message = "length 9 and an output of length 9 can need 20 slots of KV cache; the cache has 16"
    with pytest.raises(ValueError, match=message):
        scheduler.add(sequence(1, 9, 9))
    assert len(scheduler.waiting) == 1


@pytest.mark.parametrize("limit", ["max_batch_tokens", "max_batch_seqs"])
def test_limits_must_be_positive(limit: str) -> None:
    with pytest.raises(ValueError, match=f"{limit} is 0; at least 1"):
        Scheduler(paged(1, 1), **{"max_batch_tokens": 1, "max_batch_seqs": 1, limit: 0})  # type: ignore[arg-type]


def test_a_group_that_is_too_wide_is_refused() -> None:
    scheduler = Scheduler(paged(100, 4), max_batch_seqs=3)
    with pytest.raises(ValueError, match="a request of 4 sequences; at most max_batch_seqs = 3 can run"):
        scheduler.add(Group([Sequence(0, [0] * 4, 4, 8)], width=4))
    assert not scheduler.waiting


@pytest.mark.parametrize(
    ("preemption", "message"),
    [("swap", "this manager cannot swap, only recompute"), ("drop", "preemption is 'drop'; known are recompute, swap")],
)
def test_a_preemption_that_the_manager_cannot_do_is_refused(preemption: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Scheduler(paged(4, 4), preemption=preemption)


def test_a_group_travels_to_the_host_and_back_and_goes_on_where_it_was() -> None:
    scheduler = Scheduler(SwappablePagedManager(BlockPool(4), 4, 4), preemption="swap")
    first, second = sequence(0, 8, 8), sequence(1, 7, 8)
    for group in (first, second):
        scheduler.add(group)
    run(scheduler, scheduler.schedule())
    plan = scheduler.schedule()
    assert plan.preempted == [second]
    assert [transfer.kind for transfer in plan.transfers] == ["swap_out", "swap_out"]
    assert (second.status, second.leader.num_computed) == (Status.SWAPPED, 7)
    run(scheduler, plan)
    while first.status is not Status.FINISHED:
        run(scheduler, scheduler.schedule())
    plan = scheduler.schedule()
    assert [transfer.kind for transfer in plan.transfers] == ["swap_in", "swap_in"]
    assert chunks(plan) == [(1, 1)]  # nothing is computed again


def test_a_full_host_means_recompute() -> None:
    scheduler = Scheduler(SwappablePagedManager(BlockPool(4), 4, 1), preemption="swap")
    first, second = sequence(0, 8, 8), sequence(1, 7, 8)
    for group in (first, second):
        scheduler.add(group)
    run(scheduler, scheduler.schedule())
    assert scheduler.schedule().preempted == [second]
    assert (second.status, second.leader.num_computed) == (Status.WAITING, 0)


def test_samples_share_the_prompt_and_a_preempted_group_forks_again() -> None:
    """The leader computes what the samples have in common, once; then each computes its own tokens."""
    scheduler = Scheduler(paged(6, 4))
    first, samples = sequence(0, 12, 12), sequence(1, 5, 6)
    samples.width = 2
    scheduler.add(first)
    scheduler.add(samples)
    run(scheduler, scheduler.schedule())
    leader = samples.leader
    child = Sequence(2, [*leader.tokens[:-1], 9], 5, 11)
    leader.num_computed = 5
    scheduler.fork(samples, leader, child)
    assert scheduler.manager.placement(1) == scheduler.manager.placement(2)
    plan = scheduler.schedule()  # the first needs a block, and the samples a copy: the pool has one
    assert plan.preempted == [samples]
    assert not any(seq.admitted for seq in samples.seqs)
    scheduler.finish(first, first.leader)
    plan = scheduler.schedule()
    assert chunks(plan) == [(1, 5)]  # the leader alone, up to where the two differ
    leader.num_computed = 5
    plan = scheduler.schedule()
    assert chunks(plan) == [(1, 1), (2, 1)]
    assert [transfer.kind for transfer in plan.transfers] == ["copy"]
    scheduler.manager.check_integrity()


@pytest.mark.parametrize("kind", ["paged", "standard"])
@pytest.mark.parametrize("seed", range(5))
def test_every_request_gets_to_its_end(kind: str, seed: int) -> None:
    """Random requests on a pool that is far too small for all: no deadlock, and nothing leaks."""
    rng = random.Random(seed)
    manager: KVCacheManager
    manager = paged(10, 4) if kind == "paged" else StandardManager(40, 40, "exact")
    scheduler = Scheduler(manager, max_batch_tokens=rng.choice([1, 3, 16, 100]), max_batch_seqs=8)
    todo = []
    for i in range(40):
        prompt = rng.randrange(1, 30)
        seq = sequence(i, prompt, rng.randrange(1, 41 - prompt))
        todo.append(seq)
        scheduler.add(seq)
    preemptions = 0
    for _ in range(20_000):
        if all(seq.status is Status.FINISHED for seq in todo):
            break
        if rng.random() < 0.01:
            unfinished = [seq for seq in todo if seq.status is not Status.FINISHED]
            group = rng.choice(unfinished)  # an abort, wherever it is
            scheduler.finish(group, group.leader)
            continue
        plan = scheduler.schedule()
        assert plan.chunks
        assert sum(num_tokens for _, num_tokens in plan.chunks) <= scheduler.max_batch_tokens
        assert sorted(chunks(plan)) == chunks(plan)  # by arrival
        preemptions += len(plan.preempted)
        run(scheduler, plan)
    assert all(seq.status is Status.FINISHED for seq in todo)
    assert manager.snapshot().free == manager.num_slots
    assert preemptions == 0 or kind == "paged"  # a region is never taken back
