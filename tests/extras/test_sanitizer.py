"""The sanitizer's sentences: the block, its reader, its writer, and what happened there last."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from paged_ref.core.attention.attention import Addresses
from paged_ref.core.device import xp
from paged_ref.core.engine.engine import Engine
from paged_ref.core.engine.llm import LLM
from paged_ref.core.engine.sampling import SamplingParams
from paged_ref.core.memory.block_pool import BlockPool
from paged_ref.core.memory.kv import KVCache
from paged_ref.core.memory.manager import KVCacheManager, Transfer
from paged_ref.core.memory.paged import PagedManager
from paged_ref.core.memory.standard import StandardManager
from paged_ref.extras.host_swap import SwappablePagedManager
from paged_ref.extras.prefix_cache import CachingBlockPool
from paged_ref.extras.sanitizer import SanitizedKV, SanitizerError, check_numbers

TOKENS = [11, 12, 13, 14, 15, 16, 17, 18]


class Watched:
    """A manager, a small KV cache and the sanitizer; `step` stands for the model and writes what it should."""

    def __init__(self, manager: KVCacheManager, num_host_blocks: int = 0, dtype: str = "float32") -> None:
        self.manager = manager
        unit = 4 if manager.paged else 1
        self.kv = KVCache(2, manager.num_slots // unit, unit, 1, 2, dtype, num_host_blocks)
        self.sanitizer = SanitizedKV(manager, self.kv)
        self.unit = unit
        self.written = 0.0

    def step(self, *chunks: tuple[int, int, int], transfers: Sequence[Transfer] = (), tokens: Any = TOKENS) -> None:
        """`chunks` are (sequence, computed, count)."""
        self.kv.apply(transfers)
        self.sanitizer.before_step(transfers, [(seq_id, tokens, *rest) for seq_id, *rest in chunks])
        for seq_id, computed, count in chunks:
            for slot in self.manager.slots(seq_id, computed, count):
                self.written += 1
                self.kv.device[:, :, slot // self.unit, slot % self.unit] = self.written
        self.sanitizer.after_step()

    def begin(self, seq_id: int, length: int, tokens: Any = TOKENS) -> None:
        self.manager.admit(seq_id, tokens[:length], 8)
        self.manager.append([(seq_id, length)])
        self.step((seq_id, 0, length), tokens=tokens)

    def complaint(self, *chunks: tuple[int, int, int], transfers: Sequence[Transfer] = ()) -> str:
        with pytest.raises(SanitizerError) as caught:
            self.step(*chunks, transfers=transfers)
        return str(caught.value)


def paged(num_host_blocks: int = 0, pool: BlockPool | None = None) -> tuple[SwappablePagedManager, Watched]:
    manager = SwappablePagedManager(pool or BlockPool(4), 4, num_host_blocks)
    return manager, Watched(manager, num_host_blocks)


def test_reading_what_was_never_written() -> None:
    manager, watched = paged()
    manager.admit(7, TOKENS[:3], 8)
    manager.append([(7, 3)])
    assert watched.complaint((7, 1, 2)) == (
        "sequence 7 reads position 0 from block 0, offset 0, but nothing was written there since "
        "the slot was handed out. "
        "Last there: sequence 7 wrote positions 1 to 2."
    )


def test_reading_what_was_freed() -> None:
    manager, watched = paged()
    watched.begin(1, 3)
    watched.begin(2, 1)
    manager.free(1)
    manager.append([(2, 1)])
    watched.step((2, 1, 1))
    manager.admit(3, TOKENS[:3], 8)
    manager.append([(3, 3)])
    assert watched.complaint((3, 2, 1)) == (
        "sequence 3 reads position 0 from block 0, offset 0, but nothing was written there since "
        "the slot was handed out. "
        "Last there: sequence 1 wrote positions 0 to 2; slots freed, and filled with NaN; "
        "sequence 3 wrote positions 2 to 2."
    )


def test_reading_what_another_sequence_wrote() -> None:
    manager, watched = paged()
    watched.begin(1, 4)
    watched.begin(2, 4, tokens=[21, 22, 23, 24])
    manager.tables[1].blocks[0] = 1
    manager.append([(1, 1)])
    assert watched.complaint((1, 4, 1)) == (
        "sequence 1 reads position 0 from block 1, offset 0, but sequence 2 wrote there, after other tokens. "
        "Last there: sequence 2 wrote positions 0 to 3."
    )


def test_reading_another_position() -> None:
    manager, watched = paged()
    watched.begin(1, 7)
    manager.tables[1].blocks.reverse()
    manager.append([(1, 1)])
    assert watched.complaint((1, 7, 1)).startswith(
        "sequence 1 reads position 0 from block 1, offset 0, but sequence 1 wrote its position 4 there. "
    )


def test_the_same_tokens_may_be_read_from_another_ones_block() -> None:
    manager, watched = paged(pool=CachingBlockPool(4))
    watched.begin(1, 5)
    manager.commit(1, TOKENS, 5)
    assert manager.admit(2, TOKENS[:6], 8) == 4
    manager.append([(2, 2)])
    watched.step((2, 4, 2))


def test_reading_what_was_written_over() -> None:
    manager, watched = paged()
    watched.begin(1, 5)
    watched.kv.device[1, 0, 0, 2, 0, 0] = 99  # layer 1, K, block 0, offset 2
    manager.append([(1, 1)])
    assert watched.complaint((1, 5, 1)) == (
        "sequence 1 reads position 2 from block 0, offset 2, but what lies there is not the K and V that sequence 1 "
        "wrote: a copy was not made in time, or another write went over it. Last there: sequence 1 "
        "wrote positions 0 to 4."
    )


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_single_bit_is_seen(dtype: str) -> None:
    manager = PagedManager(BlockPool(4), 4)
    watched = Watched(manager, dtype=dtype)
    watched.begin(1, 5)
    watched.kv.device[0, 1, 0, 3, 0, 1] = xp.nextafter(watched.kv.device[0, 1, 0, 3, 0, 1], xp.asarray(0, dtype=dtype))
    manager.append([(1, 1)])
    assert "reads position 3 from block 0, offset 3, but what lies there" in watched.complaint((1, 5, 1))


def test_copies_are_followed_and_named() -> None:
    manager, watched = paged()
    watched.begin(1, 6)
    manager.fork(1, 2)
    transfers = manager.append([(1, 1), (2, 1)])
    assert transfers == [Transfer("copy", 1, 2)]
    watched.step((1, 6, 1), (2, 6, 1), transfers=transfers)
    manager.append([(1, 1)])
    manager.tables[1].blocks.reverse()
    assert watched.complaint((1, 7, 1)) == (
        "sequence 1 reads position 0 from block 2, offset 0, but sequence 1 wrote its position 4 there. "
        "Last there: copy of 1 to 2; sequence 1 wrote positions 6 to 6."
    )


def test_trips_to_the_host_are_followed_and_named() -> None:
    manager, watched = paged(num_host_blocks=2)
    watched.begin(1, 4)
    out = manager.swap_out([1])
    watched.begin(2, 4, tokens=[21, 22, 23, 24])  # where sequence 1 was, before its K and V were saved
    back = manager.swap_in([1])
    manager.append([(1, 1)])
    assert watched.complaint((1, 4, 1), transfers=[*out, *back]) == (
        "sequence 1 reads position 0 from block 1, offset 0, but sequence 2 wrote there, after other tokens. "
        "Last there: swap_in of 0 to 1."
    )


def test_a_table_that_is_too_short() -> None:
    manager, watched = paged()
    watched.begin(1, 4)
    with pytest.raises(SanitizerError, match=r"sequence 1 reads 5 tokens; its table has blocks \[0\]"):
        watched.sanitizer.before_step([], [(1, TOKENS, 0, 4), (1, TOKENS, 4, 0), (1, TOKENS, 5, 0)])
    assert manager.tables[1].length == 4


def test_nan_in_attention() -> None:
    numbers, mixed = np.zeros((2, 3, 4), np.float32), np.zeros((2, 3, 4), np.float32)
    check_numbers(1, 0, numbers, numbers, numbers, mixed)
    mixed[1, 2, 3] = np.nan
    with pytest.raises(SanitizerError) as caught:
        check_numbers(1, 5, numbers, numbers, numbers, mixed)
    assert str(caught.value) == (
        "sequence 1 has NaN in its attention in layer 5: a kernel read a slot outside its tokens"
    )
    wrong = numbers.copy()
    wrong[0, 0, 0] = np.inf
    for i, what in enumerate(("queries", "keys", "values")):
        query, key, value = (wrong if i == place else numbers for place in range(3))
        with pytest.raises(SanitizerError, match=f"1 has NaN or inf among its {what} in layer 5, before attention: t"):
            check_numbers(1, 5, query, key, value, mixed)


def addresses(**wrong: Any) -> Addresses:
    """Of sequences 1 and 2, each with a step of one token: positions 5 and 3."""
    right = {
        "seq_lens": np.array([6, 4]),
        "query_start_loc": np.array([0, 1, 2]),
        "block_tables": np.array([[0, 1], [2, -1]]),
        "slot_mapping": np.array([5, 11]),
    }
    return Addresses(**{**right, **wrong})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"block_tables": np.array([[0, 3], [2, -1]])},
            r"sequence 1 has 6 tokens in \[0, 1\]; the kernels are given 6 in \[0, 3\]",
        ),
        ({"seq_lens": np.array([6, 3])}, r"sequence 2 has 4 tokens in \[2\]; the kernels are given 3 in \[2\]"),
        ({"slot_mapping": np.array([5, 12])}, "the slot_mapping of the step is not what the manager says"),
    ],
)
def test_addresses_that_are_not_the_managers(wrong: dict[str, Any], message: str) -> None:
    manager, watched = paged()
    watched.begin(1, 5)
    watched.begin(2, 3)
    manager.append([(1, 1), (2, 1)])
    chunks = [(1, TOKENS, 5, 1), (2, TOKENS, 3, 1)]
    watched.sanitizer.before_step([], chunks, addresses())
    with pytest.raises(SanitizerError, match=message):
        watched.sanitizer.before_step([], chunks, addresses(**wrong))


def sanitized(llm: LLM) -> LLM:
    """The same LLM with checks around its KV cache."""
    old = llm.engine
    assert isinstance(old.kv, KVCache)
    kv = SanitizedKV(old.manager, old.kv)
    llm.engine = Engine(old.model, kv, old.scheduler, old.eos_token_ids)
    return llm


@pytest.mark.parametrize(
    "manager", [None, StandardManager(512, 256), SwappablePagedManager(CachingBlockPool(24), 4, 0)]
)
def test_a_sanitized_engine_gives_the_same_tokens(manager: KVCacheManager | None) -> None:
    params = SamplingParams(max_tokens=30)
    prompts = ["Once upon a time", "The cat", "Once upon a time, there was a dog"]
    want = LLM("tiny").generate(prompts, params)
    got = sanitized(LLM("tiny", manager=manager, max_batch_tokens=7)).generate(prompts, params)
    assert [output.outputs[0].token_ids for output in got] == [output.outputs[0].token_ids for output in want]


def test_a_kernel_that_strays_is_found_in_the_engine() -> None:
    """One more key than the sequence has: the slot behind its tokens is NaN."""
    llm = sanitized(LLM("tiny", block_size=4, backend="reference"))
    kv: Any = llm.engine.kv
    attend = kv.inner.attend

    def stray(layer: int, query: Any, key: Any, value: Any, where: Addresses, window: int | None) -> Any:
        longer = Addresses(where.seq_lens + 1, where.query_start_loc, where.block_tables, None, where.slot_mapping)
        return attend(layer, query, key, value, longer, window)

    kv.inner.attend = stray
    llm.add_request([5, 6, 7], SamplingParams(max_tokens=4))
    with pytest.raises(SanitizerError, match="sequence 0 has NaN in its attention in layer 0"):
        llm.step()


def test_without_blocks_slots_are_named() -> None:
    manager = StandardManager(24, 8)
    watched = Watched(manager)
    watched.begin(1, 2)
    watched.begin(2, 2)
    manager.append([(2, 2)])
    assert watched.complaint((2, 3, 1)) == (
        "sequence 2 reads position 2 from slot 10, but nothing was written there since "
        "the slot was handed out. "
        "Last there: nothing."
    )


def test_freed_slots_are_nan_and_held_ones_are_not() -> None:
    manager, watched = paged()
    watched.begin(1, 6)
    watched.begin(2, 3)
    manager.free(1)
    manager.append([(2, 1)])
    watched.step((2, 3, 1))
    empty = np.isnan(np.asarray(watched.kv.device.tolist())).all(axis=(0, 1, 4, 5))  # [blocks, block_size]
    assert empty.tolist() == [[True] * 4, [True] * 4, [False] * 4, [True] * 4]


def test_a_request_that_ended_or_was_aborted_leaves_nothing() -> None:
    llm = sanitized(LLM("tiny", block_size=4, kv_cache_tokens=64, backend="reference"))
    sanitizer: Any = llm.engine.kv

    def kept() -> tuple[int, int]:
        rows = sanitizer._history.values()
        return len(sanitizer._fingerprints._known), sum(len(what) for what in rows)

    params = SamplingParams(max_tokens=9, ignore_eos=True)
    for _ in range(8):
        llm.generate([[5] * 9, [6] * 20, [7] * 12], params)  # one is preempted
        llm.add_request([8] * 5, params)
        llm.step()
        llm.engine.abort(next(iter(llm.engine.requests)))
        assert kept() <= (1, 4 * 16)  # the last step's, and four lines for each block
