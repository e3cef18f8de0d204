"""A group that comes back from a preemption computes at least a block's worth of tokens before the next one."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from paged_ref import LLM, SamplingParams
from paged_ref.core.engine.engine import Observer
from paged_ref.core.engine.scheduler import Preemption, StepPlan
from paged_ref.core.engine.sequence import Group
from paged_ref.core.memory.kv import KV
from paged_ref.core.model.llama import StepInputs
from paged_ref.extras.step_records import StepRecord


class RandomModel:
    """Logits that nothing determines: which tokens come does not matter here."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def forward(self, inputs: StepInputs, kv: KV) -> np.ndarray:
        return self.rng.standard_normal((len(inputs.logits_rows), 40))


class NoKV:
    """Memory for nothing."""

    def begin_step(self, plan: StepPlan, inputs: StepInputs) -> None:
        pass


class NoText:
    """A tokenizer without texts."""

    def decode(self, ids: object) -> str:
        return ""


class Progress(Observer):
    """Between two preemptions of a group, the tokens that it computes for the first time."""

    def __init__(self, llm: LLM) -> None:
        self.scheduler = llm.engine.scheduler
        self.computed: dict[int, int] = {}  # by seq_id: the tokens that were ever computed
        self.since: dict[Group, int] = {}  # of each group that was preempted
        self.found: list[int] = []  # for each second preemption of a group that was not alone

    def before_step(self, plan: StepPlan, inputs: StepInputs) -> None:
        for group in plan.preempted:
            if group in self.since and self.scheduler.running:
                self.found.append(self.since[group])
            self.since[group] = 0
        group_of = {seq.seq_id: group for group in self.scheduler.running for seq in group.seqs}
        for seq, count in plan.chunks:
            known = self.computed.get(seq.seq_id, seq.num_computed)
            fresh = max(0, seq.num_computed + count - known)
            self.computed[seq.seq_id] = max(known, seq.num_computed + count)
            group = group_of[seq.seq_id]
            if group in self.since:
                self.since[group] += fresh


def traffic(seed: int, preemption: Preemption) -> tuple[Progress, int]:
    """Random requests, arriving at random steps, to a pool that holds a few of them."""
    rng = random.Random(seed)
    block_size, num_blocks = rng.choice([(1, 40), (2, 40), (4, 24), (4, 60), (16, 14), (16, 40)])
    slots = num_blocks * block_size
    llm = LLM(
        "tiny", block_size=block_size, kv_cache_tokens=slots, preemption=preemption, backend="reference",
        prefix_cache=rng.random() < 0.5, watermark=rng.choice([0, 0.01, 0.1]),
        max_batch_tokens=rng.choice([8, 32, 512]),
        host_kv_tokens=rng.choice([0, slots // 2, 2 * slots]) if preemption == "swap" else 0,
    )  # fmt: skip
    engine: Any = llm.engine
    engine.model, engine.kv, llm.tokenizer = RandomModel(seed), NoKV(), NoText()  # type: ignore[assignment]
    progress = Progress(llm)
    engine.observers.append(progress)
    left = rng.randint(6, 20)
    while left or llm.has_unfinished:
        while left and (rng.random() < 0.2 or not llm.has_unfinished):
            left -= 1
            kind: dict[str, Any] = rng.choice([{}, {}, {}, {"n": 3, "temperature": 1.0}, {"beam_width": 3}])
            params = SamplingParams(max_tokens=rng.randint(1, slots // 4), ignore_eos=True, seed=None, **kind)
            prompt = [rng.randrange(3)] * rng.randint(1, slots // 4)
            try:
                llm.add_request(prompt, params)
            except ValueError:
                continue  # it could never fit
        llm.step()
    return progress, block_size


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
@pytest.mark.parametrize("seed", [*range(20), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(20, 300))])
def test_coming_back_pays(seed: int, preemption: Preemption) -> None:
    progress, block_size = traffic(seed, preemption)
    assert all(tokens >= block_size for tokens in progress.found)


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_samples_that_were_preempted_come_back_with_room_for_all(preemption: Preemption) -> None:
    """generate --prompt "Once upon a time" --prompt Lily --prompt "Tom had" --n 2 --temperature 0.8 --seed 1
    --max-tokens 250 --kv-tokens 700 --ignore-eos: a pair that came back on one block was preempted in the next step."""
    records: list[StepRecord] = []
    llm = LLM("tiny", kv_cache_tokens=700, preemption=preemption, on_step=records.append, backend="reference")
    prompts = [llm.tokenizer.encode(text) for text in ("Once upon a time", "Lily", "Tom had")]
    engine: Any = llm.engine
    engine.model, engine.kv, llm.tokenizer = RandomModel(0), NoKV(), NoText()  # type: ignore[assignment]
    outputs = llm.generate(prompts, SamplingParams(n=2, temperature=0.8, seed=1, max_tokens=250, ignore_eos=True))
    assert sum(output.num_preemptions for output in outputs) == sum(record.num_preempted for record in records) <= 3
    assert len(records) <= 500  # 450, if no group had to wait for room


def test_what_is_swapped_in_has_room_for_the_next_token() -> None:
    """Two requests of 34 prompt and 35 new tokens, 7 blocks of 16: one preemption is needed."""
    records: list[StepRecord] = []
    llm = LLM("tiny", kv_cache_tokens=7 * 16, preemption="swap", on_step=records.append, backend="reference")
    llm.generate([[5] * 34, [6] * 34], SamplingParams(max_tokens=35, ignore_eos=True))
    assert sum(record.num_preempted for record in records) == 1
    moved = [transfer for record in records for transfer in record.transfers if "swap" in transfer.kind]
    assert len(moved) == 2 * 3  # out and in


@pytest.mark.parametrize(("num_blocks", "watermark", "kept"), [(7, 0.01, 1), (99, 0.01, 1), (300, 0.01, 3), (7, 0, 0)])
def test_a_pool_of_few_blocks_keeps_one_for_those_that_run(num_blocks: int, watermark: float, kept: int) -> None:
    llm = LLM("tiny", block_size=4, kv_cache_tokens=4 * num_blocks, watermark=watermark)
    assert llm.engine.manager.watermark == kept  # type: ignore[attr-defined]
