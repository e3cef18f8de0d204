"""The layouts of other systems: round trips, where each element lies, and attention through each of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from paged_ref.core.device import to_host, xp
from paged_ref.interop import layouts as L  # noqa: N812
from paged_ref.kernels import paged_attention, slot_of

SHAPES = [(5, 4, 2, 16), (3, 1, 1, 8), (2, 3, 3, 8), (0, 4, 1, 8)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
each_dtype = pytest.mark.parametrize("dtype", ["float16", "float32"])


def caches(shape: tuple[int, ...], dtype: str = "float32") -> tuple[Any, Any]:
    """Every element different (as far as the dtype tells them apart)."""
    size = int(np.prod(shape))
    numbers = xp.arange(size, dtype=dtype).reshape(shape)
    return numbers, -1 - numbers


def stacked(axis: int) -> Callable[[Any, Any], Any]:
    return lambda k, v: xp.stack([k, v], axis=axis)


def to_hnd(k: Any, v: Any) -> Any:
    return xp.ascontiguousarray(stacked(1)(k, v).swapaxes(-3, -2))


def from_packed(pair: Any) -> tuple[Any, Any]:
    v = pair[1].transpose(0, 3, 1, 2)
    return pair[0].transpose(0, 3, 1, 2, 4).reshape(v.shape), v


def to_sglang(k: Any, v: Any) -> tuple[Any, Any]:
    return k.reshape(-1, *k.shape[2:]), v.reshape(-1, *v.shape[2:])


# name -> (there, back, does the way back promise views of K, of V); expressions as the docstring has them
ROUND_TRIPS: dict[str, tuple[Callable[..., Any], Callable[..., Any], tuple[bool, bool]]] = {
    "vllm": (stacked(0), lambda kv: (kv[0], kv[1]), (True, True)),
    "vllm by blocks": (stacked(1), lambda kv: (kv[:, 0], kv[:, 1]), (True, True)),
    "vllm packed": (L.to_vllm_packed, from_packed, (False, True)),
    "flashinfer HND": (to_hnd, lambda kv: (kv.swapaxes(-3, -2)[:, 0], kv.swapaxes(-3, -2)[:, 1]), (True, True)),
}
each_trip = pytest.mark.parametrize("trip", ROUND_TRIPS.values(), ids=ROUND_TRIPS.keys())


@each_trip
@each_shape
@each_dtype
def test_there_and_back_is_the_same(trip: Any, shape: tuple[int, ...], dtype: str) -> None:
    there, back, views = trip
    k, v = caches(shape, dtype)
    foreign = there(k, v)
    arrays = foreign if isinstance(foreign, tuple) else (foreign, foreign)
    for ours, expected, foreign_array, view in zip(back(foreign), (k, v), arrays, views, strict=True):
        assert ours.dtype == expected.dtype
        np.testing.assert_array_equal(to_host(ours), to_host(expected))
        if view and ours.size and xp is np:
            assert np.shares_memory(ours, foreign_array)


def test_each_element_lies_where_the_shape_says() -> None:
    """The shapes of the documentation, written out as indices."""
    num_blocks, block_size, num_kv_heads, head_size = shape = (3, 4, 2, 16)
    k, v = (to_host(cache) for cache in caches(shape, "float16"))
    x = 8
    packed_k, packed_v = L.to_vllm_packed(k, v)
    assert packed_k.shape == (num_blocks, num_kv_heads, head_size // x, block_size, x)
    assert packed_v.shape == (num_blocks, num_kv_heads, head_size, block_size)
    nhd, hnd, vllm = np.stack([k, v], axis=1), to_host(to_hnd(xp.asarray(k), xp.asarray(v))), np.stack([k, v])
    assert packed_k.flags.c_contiguous
    slots = to_sglang(k, v)
    for b, o, h, d in np.ndindex(shape):
        element, value = k[b, o, h, d], v[b, o, h, d]
        assert packed_k[b, h, d // x, o, d % x] == element
        assert packed_v[b, h, d, o] == value
        assert (nhd[b, 0, o, h, d], nhd[b, 1, o, h, d]) == (element, value)
        assert (hnd[b, 0, h, o, d], hnd[b, 1, h, o, d]) == (element, value)
        assert (vllm[0, b, o, h, d], vllm[1, b, o, h, d]) == (element, value)
        assert slots[0][b * block_size + o, h, d] == element


@pytest.mark.parametrize("layout", L.LAYOUTS)
@each_dtype
def test_offsets_are_the_real_addresses(layout: str, dtype: str) -> None:
    """Read the bytes at each offset of the converted arrays: they are the element's own."""
    shape = (3, 4, 2, 8)
    k = np.arange(np.prod(shape), dtype=dtype).reshape(shape)
    v = -1 - k
    made = L.LAYOUTS[layout](k, v, k.itemsize)
    for cache, offsets, array in zip(
        (k, v),
        L.element_offsets(layout, shape, k.itemsize),
        made if isinstance(made, tuple) else (made, made),
        strict=True,
    ):
        raw = array.tobytes()
        assert len(np.unique(offsets)) == cache.size
        for place in np.ndindex(shape):
            start = int(offsets[place])
            assert np.frombuffer(raw[start : start + k.itemsize], dtype)[0] == cache[place]


# ---- attention through each layout


def paged_case(block_size: int = 4, head_size: int = 16) -> Any:
    rng = np.random.default_rng(0)
    seq_lens = np.array([6, 1, 9], dtype=np.int32)
    tables = np.array([[5, 1, -1], [3, -1, -1], [7, 2, 4]], dtype=np.int32)
    k, v = rng.standard_normal((2, 8, block_size, 2, head_size)).astype(np.float32)
    query = rng.standard_normal((3, 4, head_size)).astype(np.float32)
    return query, k, v, tables, seq_lens


@each_trip
def test_attention_is_the_same_through_each_layout(trip: Any) -> None:
    there, back, _ = trip
    query, k, v, tables, seq_lens = paged_case()
    expected = paged_attention(query, k, v, tables, seq_lens, backend="reference")
    k2, v2 = back(there(k, v))
    assert (paged_attention(query, k2, v2, tables, seq_lens, backend="reference") == expected).all()


def test_attention_through_the_tables_of_flashinfer_and_sglang() -> None:
    query, k, v, tables, seq_lens = paged_case()
    expected = paged_attention(query, k, v, tables, seq_lens, backend="reference")
    pages = -(-seq_lens // 4)
    used = np.arange(3) < pages[:, None]
    indptr, indices, last = np.append(0, np.cumsum(pages)), tables[used], seq_lens - (pages - 1) * 4
    assert (indptr.tolist(), indices.tolist(), last.tolist()) == ([0, 2, 3, 6], [5, 1, 3, 7, 2, 4], [2, 1, 1])
    tables2 = np.full((3, 3), -1)
    tables2[np.arange(3) < np.diff(indptr)[:, None]] = indices
    assert (tables2 == tables).all()
    assert ((np.diff(indptr) - 1) * 4 + last == seq_lens).all()
    slots = (tables[..., None] * 4 + np.arange(4)).reshape(3, -1)
    assert [slots[s, p] for s in range(3) for p in range(seq_lens[s])] == [
        slot_of(tables[s], p, 4) for s in range(3) for p in range(seq_lens[s])
    ]
    for page_size in (4, 1):  # pages of one token: the row of slots is the block table
        k3, v3 = (buffer.reshape(-1, page_size, *buffer.shape[1:]) for buffer in to_sglang(k, v))
        tables3 = slots[:, ::page_size] // page_size
        assert (paged_attention(query, k3, v3, tables3, seq_lens, backend="reference") == expected).all()


def test_a_batch_of_flash_attn_is_contiguous_regions() -> None:
    from paged_ref.kernels import naive_attention

    rng = np.random.default_rng(1)
    k, v = rng.standard_normal((2, 3, 10, 2, 8)).astype(np.float32)  # [batch, seqlen_cache, nheads_k, headdim]
    query, seq_lens = rng.standard_normal((3, 2, 8)).astype(np.float32), np.array([4, 10, 1], dtype=np.int32)
    keys, values, starts = k.reshape(-1, 2, 8), v.reshape(-1, 2, 8), np.arange(3) * 10
    out = naive_attention(query, keys, values, starts, seq_lens, backend="reference")
    own = np.arange(3, dtype=np.int32)[:, None]  # a row of the batch as one block of 10
    assert (out == paged_attention(query, k, v, own, seq_lens, backend="reference")).all()


# ---- refusals

_K, _V = np.zeros((4, 4, 2, 12), dtype=np.float16), np.zeros((4, 4, 2, 12), dtype=np.float16)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: L.to_vllm_packed(_K, _V[:2]), r"value_cache is float16\[2, 4, 2, 12\]; float16\[4, 4, 2, 12\] is"),
        (lambda: L.to_vllm_packed(_K[0], _V[0]), r"key_cache has shape \[4, 2, 12\]"),
        (lambda: L.to_vllm_packed(_K, _V), "head_size is 12; a multiple of x = 8"),
        (lambda: L.pack_size(3), "itemsize is 3"),
        (lambda: L.element_offsets("mine", (1, 1, 1, 4), 4), "layout is 'mine'; known are ours"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
