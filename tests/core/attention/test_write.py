"""Properties of what stands around the kernels: slots, writes, copies and merges, on random cases."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from paged_ref.kernels import copy_blocks, merge_states, naive_attention, slot_of, write_kv

Array = np.ndarray[Any, np.dtype[Any]]


@given(st.data(), st.integers(1, 20), st.integers(1, 8))
def test_slot_of_numbers_every_slot_of_its_blocks_once(data: st.DataObject, block_size: int, blocks: int) -> None:
    table = data.draw(st.permutations(range(12)))[:blocks]
    slots = [slot_of(table, position, block_size) for position in range(blocks * block_size)]
    assert slots == [block * block_size + offset for block in table for offset in range(block_size)]
    at_once = slot_of(np.array(table), np.arange(blocks * block_size), block_size)
    assert at_once.tolist() == slots


@settings(deadline=None)
@given(st.data(), st.integers(1, 5), st.integers(1, 6), st.sampled_from(["float16", "float32"]))
def test_write_kv_writes_its_slots_and_no_other(
    data: st.DataObject, block_size: int, num_blocks: int, dtype: str
) -> None:
    num_slots = block_size * num_blocks
    slots = data.draw(st.lists(st.integers(0, num_slots - 1), unique=True, max_size=num_slots))
    mapping = [slot if data.draw(st.booleans()) else -1 for slot in slots]
    key = np.arange(len(slots) * 6, dtype=np.float32).reshape(len(slots), 2, 3)
    for shape in ((num_blocks, block_size, 2, 3), (num_slots, 2, 3)):
        key_cache, value_cache = np.full(shape, np.nan, dtype), np.full(shape, np.nan, dtype)
        write_kv(key, -key, key_cache, value_cache, np.array(mapping, np.int64))
        rows, value_rows = key_cache.reshape(num_slots, 2, 3), value_cache.reshape(num_slots, 2, 3)
        for token, slot in enumerate(mapping):
            if slot >= 0:
                np.testing.assert_array_equal(rows[slot], key[token].astype(dtype))
                np.testing.assert_array_equal(value_rows[slot], -key[token].astype(dtype))
        untouched = np.setdiff1d(np.arange(num_slots), mapping)
        assert np.isnan(rows[untouched]).all()
        assert np.isnan(value_rows[untouched]).all()


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), unique_by=lambda pair: pair[1], max_size=8))
def test_copy_blocks_reads_all_sources_first(pairs: list[tuple[int, int]]) -> None:
    before = np.random.default_rng(0).random((8, 2, 1, 3))
    key_cache, value_cache = before.copy(), before.copy() + 1
    copy_blocks(key_cache, value_cache, pairs)
    source_of = {destination: source for source, destination in pairs}
    for block in range(8):
        np.testing.assert_array_equal(key_cache[block], before[source_of.get(block, block)])
        np.testing.assert_array_equal(value_cache[block], before[source_of.get(block, block)] + 1)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=4), st.sampled_from(["reference", "cpu"]), st.integers(0, 9))
def test_merging_the_parts_gives_the_whole(lengths: list[int], backend: str, seed: int) -> None:
    """Split the keys of one query anywhere: attention over each part, merged, is attention over all."""
    rng, length = np.random.default_rng(seed), sum(lengths)
    query = rng.standard_normal((1, 4, 8)).astype(np.float32)
    keys, values = rng.standard_normal((2, length + 1, 2, 8)).astype(np.float32)

    def over(start: int, count: int) -> tuple[Array, Array]:
        result: tuple[Array, Array] = naive_attention(
            query, keys, values, np.array([start]), np.array([count]), return_lse=True, backend=backend
        )
        return result

    bounds = np.cumsum([0, *lengths])
    parts = [over(int(start), count) for start, count in zip(bounds, lengths, strict=False)]
    out, lse = merge_states(np.stack([p[0] for p in parts]), np.stack([p[1] for p in parts]))
    want, want_lse = over(0, length)
    np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(lse, want_lse, rtol=1e-5, atol=1e-6)
