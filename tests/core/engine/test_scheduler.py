"""Continuous batching without a model: who runs, how many tokens, who has to wait."""

from __future__ import annotations

import random

import pytest

from paged_ref.core.engine.scheduler import Scheduler, StepPlan
from paged_ref.core.engine.sequence import Group, Sequence, Status
from paged_ref.core.memory.manager import KVCacheManager
from paged_ref.core.memory.paged import PagedManager
from paged_ref.core.memory.standard import StandardManager


def sequence(seq_id: int, prompt: int, new: int) -> Group:
    return Group([Sequence(seq_id, [0] * prompt, prompt, prompt + new)])


def run(scheduler: Scheduler, plan: StepPlan) -> None:
    """What the engine does after a step: computed tokens, a new one for each that caught up, the end."""
    for seq, num_tokens in plan.chunks:
        seq.num_computed += num_tokens
        if seq.num_uncomputed == 0:
            seq.tokens.append(0)
            if len(seq.tokens) == seq.max_tokens:
                scheduler.finish(next(group for group in scheduler.running if seq in group.seqs), seq)
    scheduler.manager.check_integrity()


def chunks(plan: StepPlan) -> list[tuple[int, int]]:
    return [(seq.seq_id, num_tokens) for seq, num_tokens in plan.chunks]


def test_prefill_is_cut_into_chunks_and_mixed_with_decodes() -> None:
    scheduler = Scheduler(PagedManager(100, 4), max_batch_tokens=8, max_batch_seqs=10)
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
    scheduler = Scheduler(PagedManager(100, 4), max_batch_tokens=100, max_batch_seqs=2)
    for i in range(3):
        scheduler.add(sequence(i, 3, 2))
    assert len(scheduler.schedule().chunks) == 2


def test_the_latest_arrival_is_preempted_and_its_tokens_are_computed_again() -> None:
    scheduler = Scheduler(PagedManager(4, 4), max_batch_tokens=100, max_batch_seqs=10)
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
    scheduler = Scheduler(PagedManager(4, 4), max_batch_tokens=100, max_batch_seqs=10)
    scheduler.add(sequence(0, 9, 8))  # 16 slots: the last token needs none
    message = "9 prompt tokens and up to 9 new ones can need 20 slots of KV cache; there are 16"
    with pytest.raises(ValueError, match=message):
        scheduler.add(sequence(1, 9, 9))
    assert len(scheduler.waiting) == 1


@pytest.mark.parametrize("limit", ["max_batch_tokens", "max_batch_seqs"])
def test_limits_must_be_positive(limit: str) -> None:
    with pytest.raises(ValueError, match=f"{limit} is 0; at least 1"):
        Scheduler(PagedManager(1, 1), **{"max_batch_tokens": 1, "max_batch_seqs": 1, limit: 0})  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["paged", "standard"])
@pytest.mark.parametrize("seed", range(5))
def test_everyone_gets_to_the_end(kind: str, seed: int) -> None:
    """Random requests on a pool that is far too small for all: no deadlock, and nothing leaks."""
    rng = random.Random(seed)
    manager: KVCacheManager
    manager = PagedManager(10, 4) if kind == "paged" else StandardManager(40, 40, "exact")
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
