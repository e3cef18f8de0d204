"""One step of the engine: what it hands to the model, what observers see, and that they change nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from paged_ref.core.device import to_host
from paged_ref.core.engine.engine import Observer
from paged_ref.core.engine.llm import LLM
from paged_ref.core.engine.outputs import TokenOutput
from paged_ref.core.engine.sampling import SamplingParams
from paged_ref.core.engine.sequence import Sequence
from paged_ref.core.memory.block_pool import BlockPool
from paged_ref.core.memory.paged import PagedManager
from paged_ref.core.memory.standard import StandardManager
from paged_ref.extras.swapping import SwappingManager

PAPER = "Four score and seven years ago our"
PROMPTS = [PAPER, "Once upon a time", "The cat", "One day, Ben found a red box under the tree. " * 4]
PARAMS = [SamplingParams(max_tokens=n, ignore_eos=True) for n in (40, 30, 20, 10)]


class Diary(Observer):
    """Writes down what happens, in order, and the inputs of every step."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.inputs: list[Any] = []
        self.plans: list[list[tuple[int, int]]] = []
        self.tokens: dict[int, list[int]] = {}

    def request_added(self, request: Any) -> None:
        self.lines.append(f"request {request.output.request_id}")

    def before_step(self, plan: Any, inputs: Any) -> None:
        self.lines.append("before")
        self.inputs.append(inputs)
        self.plans.append([(seq.seq_id, count) for seq, count in plan.chunks])

    def token_sampled(self, seq: Sequence, token_id: int) -> None:
        assert seq.tokens[-1] == token_id
        self.lines.append(f"token of {seq.seq_id}")
        self.tokens.setdefault(seq.seq_id, []).append(token_id)

    def sequence_finished(self, seq: Sequence, reason: str) -> None:
        assert not seq.admitted
        self.lines.append(f"{seq.seq_id} finished: {reason}")

    def after_step(self, plan: Any, tokens: list[TokenOutput]) -> None:
        self.lines.append(f"after, {len(tokens)} tokens")


def llm_with(observers: list[Observer], **options: Any) -> LLM:
    llm = LLM("tiny", backend="reference", **options)
    llm.engine.observers += observers
    return llm


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"block_size": 4, "kv_cache_tokens": 96},  # too little for all: preemptions
        {"block_size": 5, "max_batch_tokens": 7},
        {"manager": StandardManager(2048, 512)},
        {"manager": SwappingManager(400)},
    ],
    ids=["ample", "preemptions", "chunks", "standard", "swapping"],
)
def test_without_observers_no_token_is_another_one(options: dict[str, Any]) -> None:
    diary = Diary()
    watched = llm_with([diary, Observer()], **options)
    alone = LLM("tiny", backend="reference", **options)
    for a, b in zip(watched.generate(PROMPTS, PARAMS), alone.generate(PROMPTS, PARAMS), strict=True):
        assert a.outputs[0].token_ids == b.outputs[0].token_ids
        assert (a.outputs[0].text, a.num_preemptions) == (b.outputs[0].text, b.num_preemptions)
        assert diary.tokens[a.request_id] == a.outputs[0].token_ids
    for llm in (watched, alone):
        llm.engine.manager.check_integrity()
        assert llm.engine.manager.snapshot().free == llm.engine.manager.num_slots


def test_observers_see_a_step_in_its_order() -> None:
    diary = Diary()
    llm = llm_with([diary])
    llm.generate(PAPER, SamplingParams(max_tokens=2))
    assert diary.lines == [
        "request 0", "before", "token of 0", "after, 1 tokens",
        "before", "token of 0", "0 finished: length", "after, 1 tokens",
    ]  # fmt: skip
    assert diary.plans == [[(0, 7)], [(0, 1)]]
    request_id = llm.add_request("The cat", SamplingParams(max_tokens=5))
    llm.engine.abort(request_id)
    assert diary.lines[-1] == "1 finished: abort"


def test_the_inputs_of_a_step_say_what_the_manager_says() -> None:
    diary = Diary()
    manager = PagedManager(BlockPool(9, [7, 1, 3, 0, 2, 4, 5, 6, 8]), 4)
    llm = llm_with([diary], manager=manager)
    llm.add_request(PAPER, SamplingParams(max_tokens=8))
    llm.add_request([5, 6], SamplingParams(max_tokens=8))
    ids = llm.tokenizer.encode(PAPER)
    llm.step()
    llm.step()
    first, second = diary.inputs
    assert first.token_ids.tolist() == [*ids, 5, 6]
    assert first.positions.tolist() == [*range(7), 0, 1]
    assert first.logits_rows.tolist() == [6, 8]
    assert first.addresses.query_start_loc.tolist() == [0, 7, 9]
    assert first.addresses.seq_lens.tolist() == [7, 2]
    assert first.addresses.block_tables.tolist() == [[7, 1], [3, -1]]
    assert first.addresses.slot_mapping.tolist() == [28, 29, 30, 31, 4, 5, 6, 12, 13]
    assert first.addresses.starts is None
    assert second.addresses.slot_mapping.tolist() == [7, 14]
    assert second.addresses.seq_lens.tolist() == [8, 3]
    arrays = [second.token_ids, second.positions, second.logits_rows, *(
        getattr(second.addresses, name) for name in ("seq_lens", "query_start_loc", "block_tables", "slot_mapping")
    )]  # fmt: skip
    assert {array.dtype for array in arrays} == {np.dtype("int32")}


def test_a_region_is_addressed_by_its_first_slot() -> None:
    diary = Diary()
    llm = llm_with([diary], manager=StandardManager(64, 32))
    for prompt in ([5, 6], [7]):
        llm.add_request(prompt, SamplingParams(max_tokens=4))
    llm.step()
    addresses = diary.inputs[0].addresses
    assert addresses.starts.tolist() == [0, 32]
    assert addresses.block_tables is None
    assert addresses.slot_mapping.tolist() == [0, 1, 32]


def test_a_chunk_of_a_prompt_brings_no_token() -> None:
    llm = LLM("tiny", max_batch_tokens=3)
    llm.add_request(PAPER, SamplingParams(max_tokens=2))
    assert [len(llm.step()) for _ in range(5)] == [0, 0, 1, 1, 0]
    assert not llm.engine.requests


def test_a_hook_that_raises_ends_its_request_alone() -> None:
    def explode(tokens: Any, logits: np.ndarray) -> np.ndarray:
        raise RuntimeError("from the hook")

    llm = LLM("tiny", block_size=4)
    bad = llm.add_request("The cat", SamplingParams(n=2, temperature=1.0, logits_hook=explode))
    good = llm.add_request(PAPER, SamplingParams(max_tokens=3))
    outputs = [llm.engine.requests[i].output for i in (bad, good)]
    while llm.engine.requests:
        llm.step()
    assert str(outputs[0].error) == "from the hook"
    assert [sample.finish_reason for sample in outputs[0].outputs] == ["error", "error"]
    assert outputs[1].outputs[0].text == " fathers brought forth"
    assert llm.engine.manager.snapshot().free == llm.engine.manager.num_slots


def test_a_refused_request_is_kept_nowhere() -> None:
    diary = Diary()
    llm = llm_with([diary], kv_cache_tokens=64)
    engine = llm.engine
    with pytest.raises(ValueError, match="can need 112 slots of KV cache; the cache has 64"):
        llm.add_request([5] * 30, SamplingParams(max_tokens=10, n=3, temperature=1.0))
    assert (engine.requests, engine.request_of, engine.next_seq_id, diary.lines) == ({}, {}, 0, [])
    assert not engine.scheduler.waiting


def test_nothing_is_kept_of_what_has_ended() -> None:
    llm = LLM("tiny", block_size=4)
    llm.generate(PROMPTS, SamplingParams(max_tokens=5, n=2, temperature=1.0, seed=0))
    engine = llm.engine
    assert (engine.requests, engine.request_of, list(engine.scheduler.waiting), engine.scheduler.running) == (
        {},
        {},
        [],
        [],
    )
    assert engine.step() == []


def test_a_step_computes_what_the_whole_sequence_would(tmp_path: Any) -> None:
    """Logits of a decode step are those of a prefill of the same tokens."""
    seen: list[np.ndarray] = []

    def keep(tokens: Any, logits: np.ndarray) -> np.ndarray:
        seen.append(to_host(logits))
        return logits

    llm = LLM("tiny", block_size=4, backend="reference")
    (output,) = llm.generate(PAPER, SamplingParams(max_tokens=6, logits_hook=keep))
    tokens = output.prompt_token_ids + output.outputs[0].token_ids
    step_by_step = seen.copy()
    seen.clear()
    for i in range(6):
        llm.generate(tokens[: len(output.prompt_token_ids) + i], SamplingParams(max_tokens=1, logits_hook=keep))
    for a, b in zip(step_by_step, seen, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4)
