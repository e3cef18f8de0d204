"""What a step did, as the function that is called after it learns."""

from __future__ import annotations

from paged_ref.core.engine.llm import LLM
from paged_ref.core.engine.sampling import SamplingParams
from paged_ref.core.memory.block_pool import BlockPool
from paged_ref.core.memory.kv import KVCache
from paged_ref.core.memory.usage import MemoryUsage
from paged_ref.extras.host_swap import SwappablePagedManager
from paged_ref.extras.step_records import StepRecord, StepRecords


def recorded(llm: LLM) -> list[StepRecord]:
    records: list[StepRecord] = []
    llm.engine.observers.append(StepRecords(llm.engine.scheduler, records.append))
    return records


def test_a_record_says_what_ran_and_where_the_slots_were() -> None:
    llm = LLM("tiny", block_size=4, kv_cache_tokens=40, max_batch_seqs=1)
    records = recorded(llm)
    for length in (6, 3):
        llm.add_request([5] * length, SamplingParams(max_tokens=2, ignore_eos=True))
    while llm.engine.requests:
        llm.step()
    assert [record.chunks for record in records] == [[(0, 6)], [(0, 1)], [(1, 3)], [(1, 1)]]
    assert [(record.num_running, record.num_waiting) for record in records] == [(1, 1), (1, 1), (1, 0), (1, 0)]
    assert [record.num_preempted for record in records] == [0] * 4
    assert all(record.seconds > 0 for record in records)
    usages = [record.snapshot.usage({0: 7, 1: 4}) for record in records]
    assert usages[0] == MemoryUsage(tokens=6, reserved=1, internal=1, external=0, cached=0, free=32)
    assert usages[1] == MemoryUsage(tokens=7, reserved=0, internal=1, external=0, cached=0, free=32)
    assert {usage.total for usage in usages} == {40}


def test_a_record_holds_the_transfers_and_counts_the_preempted() -> None:
    llm = LLM("tiny", manager=SwappablePagedManager(BlockPool(6), 4, 6))
    llm.engine.scheduler.preemption = "swap"
    config = llm.config
    llm.engine.kv = KVCache(config.num_layers, 6, 4, config.num_kv_heads, config.head_size, "float32", 6)
    records = recorded(llm)
    llm.generate([[5] * 8, [6] * 7], SamplingParams(max_tokens=12, ignore_eos=True))
    kinds = {transfer.kind for record in records for transfer in record.transfers}
    assert kinds == {"swap_out", "swap_in"}
    assert sum(record.num_preempted for record in records) == 1


def test_records_change_no_token() -> None:
    params = SamplingParams(max_tokens=20)
    alone = LLM("tiny").generate("Once upon a time", params)
    llm = LLM("tiny")
    recorded(llm)
    assert llm.generate("Once upon a time", params)[0].outputs[0].token_ids == alone[0].outputs[0].token_ids
