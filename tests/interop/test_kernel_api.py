"""The checked functions behind paged_ref.kernels: what they write, copy and merge, and what they refuse.

Each message names the argument, the value and the bound.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paged_ref.interop import kernel_api
from paged_ref.kernels import backends, copy_blocks, merge_states, naive_attention, paged_attention, write_kv

F32, I32 = np.float32, np.int32
Array = np.ndarray[Any, np.dtype[Any]]

# --- writes, copies and merges ---------------------------------------------------------------------------


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


# --- refused ---------------------------------------------------------------------------------------------


def good() -> dict[str, Any]:
    """A paged call that is right: 2 sequences, 4 heads on 2 KV heads, head size 8, 3 blocks of 4 each."""
    return {
        "query": np.ones((2, 4, 8), F32),
        "key_cache": np.ones((6, 4, 2, 8), F32),
        "value_cache": np.ones((6, 4, 2, 8), F32),
        "block_tables": np.arange(6, dtype=I32).reshape(2, 3),
        "seq_lens": np.array([5, 12], I32),
    }


def int8_caches(**scales: Any) -> dict[str, Any]:
    cache = np.ones((6, 4, 2, 8), np.int8)
    return {"key_cache": cache, "value_cache": cache, **scales}


def good_contiguous() -> dict[str, Any]:
    return {
        "query": np.ones((2, 4, 8), F32),
        "keys": np.ones((24, 2, 8), F32),
        "values": np.ones((24, 2, 8), F32),
        "starts": np.array([0, 12], I32),
        "seq_lens": np.array([5, 12], I32),
    }


def test_the_right_calls_are_right() -> None:
    assert paged_attention(**good()).shape == (2, 4, 8)
    assert naive_attention(**good_contiguous()).shape == (2, 4, 8)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"query": [[[1.0]]]}, "query is a list; an array is expected"),
    ({"query": np.ones((2, 8), F32)}, "query has shape [2, 8]; [num_tokens, num_heads, head_size] is needed"),
    ({"query": np.ones((2, 4, 8), np.int32)}, "query is int32; known are float16, float32, float64"),
    ({"query": np.ones((2, 4, 257), F32)}, "query has head_size 257; 1 to 256 is supported"),
    ({"query": np.ones((2, 4, 0), F32)}, "query has head_size 0; 1 to 256 is supported"),
    ({"query": np.ones((2, 3, 8), F32)}, "query has 3 heads; a multiple of the 2 KV heads is needed"),
    ({"query": np.ones((3, 4, 8), F32)}, "query has length 3, and seq_lens 2; query_start_loc is needed"),
    ({"key_cache": np.ones((24, 2, 8), F32)}, "key_cache has shape [24, 2, 8]; [num_blocks, block_size, "),
    ({"key_cache": np.ones((6, 4, 2, 7), F32)}, "key_cache has head_size 7; query has 8"),
    ({"value_cache": np.ones((6, 4, 2, 9), F32)}, "value_cache has head_size 9; query has 8"),
    ({"value_cache": np.ones((5, 4, 2, 8), F32)}, "value_cache is float32[5, 4, 2, 8]; key_cache is float32[6, 4"),
    ({"value_cache": np.ones((6, 4, 2, 8), np.float16)}, "value_cache is float16[6, 4, 2, 8]; key_cache is float32"),
    ({"key_cache": np.ones((6, 4, 2, 8), np.int8)}, "value_cache is float32[6, 4, 2, 8]; key_cache is int8[6, 4"),
    ({"key_cache": np.ones((6, 4, 2, 8), np.int32)}, "key_cache is int32; known are float16, float32, float64, uint16"),
    (int8_caches(), "key_cache is int8; key_scales [2] is needed, one for each KV head"),
    (int8_caches(key_scales=np.ones(2, F32)), "key_cache is int8; value_scales [2] is needed"),
    (int8_caches(key_scales=np.ones(4, F32), value_scales=np.ones(2, F32)), "key_scales has shape [4]; [2], one for e"),
    (int8_caches(key_scales=np.ones(2, F32), value_scales=np.array([1, 0], F32)), "value_scales[1] is 0.0; a positi"),
    (int8_caches(key_scales=np.array([np.nan, 1]), value_scales=np.ones(2, F32)), "key_scales[0] is nan; a positive"),
    ({"value_scales": np.ones(2, F32)}, "value_scales is given; key_cache is float32, and only int8 and float8 have"),
    (
        {"key_cache": np.ones((6, 0, 2, 8), F32), "value_cache": np.ones((6, 0, 2, 8), F32)},
        "key_cache has block_size 0; at least 1 is needed",
    ),
    ({"seq_lens": np.array([[5, 12]], I32)}, "seq_lens has shape [1, 2]; [num_seqs] is needed"),
    ({"seq_lens": np.array([5.0, 12.0])}, "seq_lens is float64; known are int32, int64"),
    ({"seq_lens": np.array([5, -1], I32)}, "seq_lens[1] is -1; at least 0 is needed"),
    ({"seq_lens": np.array([5, 13], I32)}, "seq_lens[1] is 13; its block table holds 3 blocks of 4 = 12 tokens"),
    ({"seq_lens": np.array([5, 2**63 - 1])}, f"seq_lens[1] is {2**63 - 1}; its block table holds 3 blocks of 4 = 12"),
    ({"block_tables": np.arange(6, dtype=I32)}, "block_tables has shape [6]; [2, max_blocks] is needed"),
    ({"block_tables": np.zeros((3, 3), I32)}, "block_tables has shape [3, 3]; [2, max_blocks] is needed"),
    ({"block_tables": np.zeros((2, 3), F32)}, "block_tables is float32; known are int32, int64"),
    ({"block_tables": np.array([[0, 6, 0], [1, 2, 3]], I32)}, "block_tables[0, 1] is 6; the cache has blocks 0 to 5"),
    ({"block_tables": np.array([[0, 1, 0], [1, -7, 3]], I32)}, "block_tables[1, 1] is -7; the cache has blocks 0 to 5"),
    ({"query_start_loc": np.array([0, 1], I32)}, "query_start_loc has shape [2]; [3] is needed"),
    ({"query_start_loc": np.array([0.0, 1.0, 2.0])}, "query_start_loc is float64; known are int32, int64"),
    ({"query_start_loc": np.array([0, 1, 3], I32)}, "must rise from 0 to 2, the length of query; it is [0, 1, 3]"),
    ({"query_start_loc": np.array([1, 1, 2], I32)}, "query_start_loc must rise from 0 to 2, the length of query"),
    ({"query_start_loc": np.array([0, 3, 2], I32)}, "query_start_loc must rise from 0 to 2, the length of query"),
    ({"sliding_window": 0}, "sliding_window is 0; at least 1 is needed"),
    ({"softcap": 0.0}, "softcap is 0.0; a positive number is needed"),
    ({"softcap": float("nan")}, "softcap is nan; a positive number is needed"),
    ({"alibi_slopes": np.ones(2, F32)}, "alibi_slopes has shape [2]; [4], one for each head is needed"),
    ({"sinks": np.ones((4, 1), F32)}, "sinks has shape [4, 1]; [4], one for each head is needed"),
    ({"out": np.ones((2, 4, 7), F32)}, "out is float32[2, 4, 7]; float32[2, 4, 8] is needed, as query is"),
    ({"out": np.ones((2, 4, 8), np.float16)}, "out is float16[2, 4, 8]; float32[2, 4, 8] is needed"),
    ({"out": np.broadcast_to(F32(0), (2, 4, 8))}, "out is read-only"),
    ({"backend": "gpu"}, "backend is 'gpu'; known are auto, "),
    ({"block_tables": None}, "block_tables is a NoneType; an array is expected"),
]  # fmt: skip

WRONG_CONTIGUOUS: list[tuple[dict[str, Any], str]] = [
    ({"starts": None}, "starts is a NoneType; an array is expected"),
    ({"keys": np.ones((6, 4, 2, 8), F32)}, "keys has shape [6, 4, 2, 8]; [num_slots, num_kv_heads, "),
    ({"values": np.ones((23, 2, 8), F32)}, "values is float32[23, 2, 8]; keys is float32[24, 2, 8]"),
    ({"starts": np.array([0], I32)}, "starts has shape [1]; [2] is needed"),
    ({"starts": np.array([0.0, 1.0])}, "starts is float64; known are int32, int64"),
    ({"starts": np.array([0, -1], I32)}, "starts[1] is -1; with seq_lens 12 the region leaves the slots 0 to 23"),
    ({"starts": np.array([0, 2**63 - 1])}, f"starts[1] is {2**63 - 1}; with seq_lens 12 the region leaves the slots"),
    ({"starts": np.array([20, 0], I32)}, "starts[0] is 20; with seq_lens 5 the region leaves the slots 0 to 23"),
    ({"seq_lens": np.array([5, 13], I32)}, "starts[1] is 12; with seq_lens 13 the region leaves the slots"),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "message"), WRONG, ids=lambda value: value[:40] if isinstance(value, str) else "")
def test_paged_attention_refuses(wrong: dict[str, Any], message: str) -> None:
    for _ in range(2):
        paged_attention(**good())  # says nothing of the next call
        with pytest.raises(ValueError, match=re.escape(message)):
            paged_attention(**{**good(), **wrong})


@pytest.mark.parametrize(
    ("wrong", "message"), WRONG_CONTIGUOUS, ids=lambda value: value[:40] if isinstance(value, str) else ""
)
def test_naive_attention_refuses(wrong: dict[str, Any], message: str) -> None:
    for _ in range(2):
        naive_attention(**good_contiguous())  # says nothing of the next call
        with pytest.raises(ValueError, match=re.escape(message)):
            naive_attention(**{**good_contiguous(), **wrong})


SCALES = {"key_scales": np.ones(2, F32), "value_scales": np.ones(2, F32)}
LIKE_AN_EARLIER_ONE: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({}, {"query": np.ones((2, 4, 8), ">f4")}, "query is >f4; known are float16, float32, float64"),
    ({}, {"seq_lens": np.array([5, 12], np.uint32)}, "seq_lens is uint32; known are int32, int64"),
    ({}, {"key_cache": np.ones((6, 4, 2, 8), np.float16)}, "value_cache is float32[6, 4, 2, 8]; key_cache is float16"),
    ({"query": np.ones((1, 4, 8), F32), "query_start_loc": np.array([0, 1, 1], I32)},
     {"query": np.ones((1, 4, 8), F32)}, "query_start_loc"),
    ({}, {"key_scales": np.ones(2, F32)}, "key_scales is given; key_cache is float32, and only int8 and float8 have"),
    ({"query": np.ones((2, 2, 8), F32), "sinks": np.ones(2, F32)},
     {"query": np.ones((2, 2, 8), F32), "value_scales": np.ones(2, F32)}, "value_scales is given; key_cache is"),
    (int8_caches(**SCALES), int8_caches(key_scales=np.ones(2, F32)), "key_cache is int8; value_scales [2] is needed"),
    (int8_caches(**SCALES), SCALES, "key_scales is given; key_cache is float32, and only int8 and float8 have scales"),
    (int8_caches(**SCALES), int8_caches(**SCALES | {"key_scales": -np.ones(2, F32)}), "key_scales[0] is -1.0; a posi"),
    ({"sinks": np.ones(4, F32)}, {"sinks": [1.0] * 4}, "sinks is a list; an array is expected"),
    ({"softcap": 2.0}, {"softcap": -2.0}, "softcap is -2.0; a positive number is needed"),
    ({"sliding_window": 1}, {"sliding_window": 0}, "sliding_window is 0; at least 1 is needed"),
    ({"out": np.ones((2, 4, 8), F32)}, {"out": np.broadcast_to(F32(0), (2, 4, 8))}, "out is read-only"),
    ({"out": np.ones((2, 4, 8), F32)}, {"out": np.ones((2, 4, 8))}, "out is float64[2, 4, 8]; float32[2, 4, 8] is nee"),
    ({"block_tables": np.zeros((2, 3), I32)}, {"block_tables": np.full((2, 3), 6, I32)}, "block_tables[0, 0] is 6; "),
]  # fmt: skip


@pytest.mark.parametrize(("right", "wrong", "message"), LIKE_AN_EARLIER_ONE)
def test_a_call_like_an_earlier_one_is_refused(right: dict[str, Any], wrong: dict[str, Any], message: str) -> None:
    """What was found right of the earlier call hides no error of this one, and the earlier one stays right."""
    for _ in range(2):
        paged_attention(**{**good(), **right})
        with pytest.raises(ValueError, match=re.escape(message)):
            paged_attention(**{**good(), **wrong})


def test_an_array_of_another_library_is_refused_after_one_that_is_like_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnDevice:
        dtype, shape = np.dtype(F32), (6, 4, 2, 8)

    cupy: Any = ModuleType("cupy")
    cupy.ndarray = OnDevice
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    paged_attention(**good())
    with pytest.raises(ValueError, match="value_cache is a cupy array; query is a numpy array"):
        paged_attention(**{**good(), "value_cache": OnDevice()})


def test_kinds_are_checked_once() -> None:
    """Other arrays of the same kinds, whatever their values and strides, find the checks done."""
    paged_attention(**good())
    before = kernel_api._check_kinds.cache_info()
    other = good() | {"query": np.zeros((8, 4, 2), F32).T, "seq_lens": np.array([1, 0], I32), "softcap": 1.0}
    for call in (good(), other):
        paged_attention(**call)
    after = kernel_api._check_kinds.cache_info()
    assert (after.hits - before.hits, after.misses - before.misses) == (2, 0)


def test_padding_of_a_table_may_hold_anything() -> None:
    tables = np.array([[0, 1, -1], [3, 4, 5]], I32)
    paged_attention(**{**good(), "block_tables": tables})
    tables = np.array([[0, 1, 2**31 - 1], [3, 4, 5]], I32)
    paged_attention(**{**good(), "block_tables": tables})


def test_a_region_without_keys_may_start_anywhere() -> None:
    wrong = {"starts": np.array([-5, 12], I32), "seq_lens": np.array([0, 12], I32)}
    out = naive_attention(**{**good_contiguous(), **wrong})
    assert not out[0].any()


def rows(count: int) -> np.ndarray[Any, np.dtype[Any]]:
    return np.ones((count, 2, 8), F32)


@pytest.mark.parametrize(
    ("key", "value", "slots", "message"),
    [
        (rows(2), rows(3), [0, 1], "key is [2, 2, 8] and value [3, 2, 8]; [num_tokens, 2, 8] is needed"),
        (np.ones((2, 2, 7)), np.ones((2, 2, 7)), [0, 1], "key is [2, 2, 7] and value [2, 2, 7]; [num_tokens, 2, 8]"),
        (rows(2), rows(2), [0], "slot_mapping is int64[1]; [2] integers are needed"),
        (rows(2), rows(2), [0.0, 1.0], "slot_mapping is float64[2]; [2] integers are needed"),
        (rows(2), rows(2), [0, 24], "slot_mapping holds 24; the cache has slots 0 to 23"),
    ],
)
def test_write_kv_refuses(key: Any, value: Any, slots: list[float], message: str) -> None:
    caches = (np.zeros((6, 4, 2, 8), F32), np.zeros((6, 4, 2, 8), F32))
    with pytest.raises(ValueError, match=re.escape(message)):
        write_kv(key, value, *caches, np.array(slots))
    assert not caches[0].any()


def test_write_kv_refuses_formats_that_do_not_fit() -> None:
    caches, slots = (np.zeros((6, 4, 2, 8), np.int8), np.zeros((6, 4, 2, 8), np.int8)), np.array([0, 1])
    with pytest.raises(ValueError, match=re.escape("key_cache is int8; key_scales [2] is needed")):
        write_kv(rows(2), rows(2), *caches, slots)
    with pytest.raises(ValueError, match=re.escape("value_scales[0] is -1.0; a positive number is needed")):
        write_kv(rows(2), rows(2), *caches, slots, key_scales=np.ones(2), value_scales=np.array([-1, 1]))
    with pytest.raises(ValueError, match=re.escape("key is int8; known are float16")):
        write_kv(
            rows(2).astype(np.int8),
            rows(2).astype(np.int8),
            *caches,
            slots,
            key_scales=np.ones(2),
            value_scales=np.ones(2),
        )
    with pytest.raises(ValueError, match=r"key_cache is int8.* and value_cache float32.*both must be alike"):
        write_kv(rows(2), rows(2), caches[0], caches[1].astype(F32), slots)
    assert not caches[0].any()


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ([(0, 6)], "block_mapping holds block 6; the cache has blocks 0 to 5"),
        ([(-1, 2)], "block_mapping holds block -1; the cache has blocks 0 to 5"),
        ([(0, 1), (2, 1)], "block_mapping names a destination twice: [1, 1]"),
        ([(0, 1, 2)], "block_mapping has shape [1, 3]; [num_pairs, 2] is needed"),
    ],
)
def test_copy_blocks_refuses(mapping: list[tuple[int, ...]], message: str) -> None:
    caches = (np.zeros((6, 4, 2, 8), F32), np.zeros((6, 4, 2, 8), F32))
    with pytest.raises(ValueError, match=re.escape(message)):
        copy_blocks(*caches, mapping)


def test_merge_states_refuses() -> None:
    with pytest.raises(ValueError, match=re.escape("outputs is [2, 3, 4, 8] and lses [2, 3]")):
        merge_states(np.ones((2, 3, 4, 8)), np.ones((2, 3)))
    with pytest.raises(ValueError, match="outputs has 0 parts; at least 1 is needed"):
        merge_states(np.ones((0, 3, 4, 8)), np.ones((0, 3, 4)))


@pytest.mark.parametrize("mark", [-np.inf, np.inf])
@pytest.mark.parametrize("rest", [np.nan, np.inf, 7.0])
def test_a_part_that_saw_no_key_adds_nothing_whatever_its_output(mark: float, rest: float) -> None:
    """flash-attn 2 marks such a part with lse +inf, others with -inf; its output is what lay there."""
    rng = np.random.default_rng(0)
    outputs = rng.standard_normal((3, 4, 2, 8)).astype(F32)
    lses = rng.standard_normal((3, 4, 2)).astype(F32)
    outputs[1, 2], lses[1, 2] = rest, mark
    outputs[:, 3], lses[:, 3] = rest, mark  # no part saw a key
    merged, lse = merge_states(outputs, lses)
    want, want_lse = merge_states(outputs[[0, 2], 2:3], lses[[0, 2], 2:3])
    np.testing.assert_array_equal(merged[2], want[0])
    np.testing.assert_array_equal(lse[2], want_lse[0])
    assert (merged[3] == 0).all()
    assert (lse[3] == -np.inf).all()


def test_nan_in_a_part_that_saw_keys_shows() -> None:
    outputs, lses = np.zeros((2, 1, 1, 4), F32), np.zeros((2, 1, 1), F32)
    lses[1] = np.nan
    merged, lse = merge_states(outputs, lses)
    assert np.isnan(merged).all()
    assert np.isnan(lse).all()


@pytest.mark.parametrize("backend", [name for name in ("reference", "cpu", "cpu-simd") if name in backends()])
def test_slots_beyond_int32(tmp_path: Path, backend: str) -> None:
    """Block 2**27 of 16 slots begins at slot 2**31. The file has holes, so it takes no room."""
    num_blocks, last = 2**27 + 1, 2**27
    cache = np.memmap(tmp_path / "cache", np.float32, "w+", shape=(num_blocks, 16, 1, 1))
    rng = np.random.default_rng(0)
    cache[last, :5, 0, 0] = cache[0, :5, 0, 0] = rng.standard_normal(5)
    query = np.ones((1, 1, 1), F32)
    tables, seq_lens = np.array([[last]], I32), np.array([5], I32)
    out = paged_attention(query, cache, cache, tables, seq_lens, backend=backend)
    want = paged_attention(query, cache, cache, np.zeros((1, 1), I32), seq_lens, backend=backend)
    np.testing.assert_array_equal(out, want)
    assert out.any()
