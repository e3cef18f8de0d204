"""The layouts of other systems: round trips, where each element lies, and attention through each of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from paged_ref.core.device import to_host, xp
from paged_ref.interop import layout_tables as T  # noqa: N812
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


def to_sglang(k: Any, v: Any) -> tuple[Any, Any]:
    return k.reshape(-1, *k.shape[2:]), v.reshape(-1, *v.shape[2:])


# name -> (there, back, does the way back promise views of K, of V); expressions as the docstring has them
ROUND_TRIPS: dict[str, tuple[Callable[..., Any], Callable[..., Any], tuple[bool, bool]]] = {
    "vllm": (stacked(0), lambda kv: (kv[0], kv[1]), (True, True)),
    "vllm by blocks": (stacked(1), lambda kv: (kv[:, 0], kv[:, 1]), (True, True)),
    "vllm packed": (L.to_vllm_packed, lambda pair: L.from_vllm_packed(*pair), (False, True)),
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
    csr = T.to_flashinfer_tables(tables, seq_lens, 4)
    tables2, lens2 = T.from_flashinfer_tables(*csr, 4)
    assert (paged_attention(query, k, v, tables2, lens2, backend="reference") == expected).all()
    slots = T.to_sglang_tables(tables, seq_lens, 4)
    for page_size in (4, 1):  # pages of one token: the row of slots is the block table
        k3, v3 = (buffer.reshape(-1, page_size, *buffer.shape[1:]) for buffer in to_sglang(k, v))
        tables3 = T.from_sglang_tables(slots, seq_lens, page_size)
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


# ---- tables


def test_the_csr_form() -> None:
    tables, lens = xp.asarray([[5, 1, -1], [3, -1, -1], [-1, -1, -1], [7, 2, 4]]), xp.asarray([6, 4, 0, 9])
    indptr, indices, last = T.to_flashinfer_tables(tables, lens, 4)
    assert [a.dtype.name for a in (indptr, indices, last)] == ["int32"] * 3
    assert (indptr.tolist(), indices.tolist(), last.tolist()) == ([0, 2, 3, 3, 6], [5, 1, 3, 7, 2, 4], [2, 4, 0, 1])
    tables2, lens2 = T.from_flashinfer_tables(indptr, indices, last, 4)
    assert (tables2.tolist(), lens2.tolist()) == (tables.tolist(), lens.tolist())


def test_the_slot_of_every_token() -> None:
    tables, lens = xp.asarray([[5, 1], [3, -1]]), xp.asarray([6, 3])
    rows = T.to_sglang_tables(tables, lens, 4)
    assert rows.tolist() == [[20, 21, 22, 23, 4, 5, 0, 0], [12, 13, 14, 0, 0, 0, 0, 0]]
    assert T.from_sglang_tables(rows, lens, 4).tolist() == tables.tolist()
    assert T.from_sglang_tables(rows, lens).tolist()[1][:4] == [12, 13, 14, -1]


def test_tables_of_no_sequence() -> None:
    none, empty = xp.zeros(0, dtype=np.int32), xp.zeros((0, 3), dtype=np.int32)
    assert [a.tolist() for a in T.to_flashinfer_tables(empty, none, 4)] == [[0], [], []]
    assert T.from_flashinfer_tables(xp.zeros(1, dtype=np.int32), none, none, 4)[0].shape == (0, 0)
    assert T.to_sglang_tables(empty, none, 4).shape == (0, 12)


@pytest.mark.parametrize("seed", range(5))
def test_tables_survive_any_sizes(seed: int) -> None:
    rng = np.random.default_rng(seed)
    block_size, lens = int(rng.integers(1, 6)), rng.integers(0, 20, size=4)
    pages = -(-lens // block_size)
    tables = np.full((4, max(1, int(pages.max()))), -1)
    ids = list(rng.permutation(int(pages.sum())))
    for s, count in enumerate(pages):
        tables[s, :count] = [ids.pop() for _ in range(count)]
    tables2, lens2 = T.from_flashinfer_tables(*T.to_flashinfer_tables(tables, lens, block_size), block_size)
    assert (lens2 == lens).all()
    slots = T.to_sglang_tables(tables, lens, block_size)
    tables3 = T.from_sglang_tables(slots, lens, block_size)
    for s, count in enumerate(pages):
        assert tables2[s, :count].tolist() == tables3[s, :count].tolist() == tables[s, :count].tolist()
        for p in range(lens[s]):
            assert slots[s, p] == slot_of(tables[s], p, block_size)


# ---- refusals

_K, _V = np.zeros((4, 4, 2, 12), dtype=np.float16), np.zeros((4, 4, 2, 12), dtype=np.float16)
_TABLES, _LENS = np.array([[0, 1]]), np.array([6])
_INT = np.array


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: L.to_vllm_packed(_K, _V[:2]), r"value_cache is float16\[2, 4, 2, 12\]; float16\[4, 4, 2, 12\] is"),
        (lambda: L.to_vllm_packed(_K[0], _V[0]), r"key_cache has shape \[4, 2, 12\]"),
        (lambda: L.to_vllm_packed(_K, _V), "head_size is 12; a multiple of x = 8"),
        (lambda: L.from_vllm_packed(np.zeros((2, 1, 3, 4, 4)), np.zeros((2, 1, 4, 12))), r"\[2, 1, 12, 4\] is needed"),
        (lambda: L.pack_size(3), "itemsize is 3"),
        (lambda: T.to_flashinfer_tables(_TABLES, _INT([9]), 4), r"seq_lens\[0\] is 9; its row of block_tables holds 8"),
        (lambda: T.to_flashinfer_tables(_TABLES, _INT([-1]), 4), r"seq_lens\[0\] is -1; at least 0"),
        (lambda: T.to_flashinfer_tables(_TABLES, _LENS, 0), "block_size is 0; at least 1"),
        (lambda: T.to_flashinfer_tables(_TABLES, _INT([1, 2]), 4), r"seq_lens has shape \[2\]; \[1\] is needed"),
        (lambda: T.from_flashinfer_tables(_INT([0, 2]), _INT([1, 2]), _INT([5]), 4),
         r"kv_last_page_len\[0\] is 5; 1 to 4 is needed"),
        (lambda: T.from_flashinfer_tables(_INT([0, 2]), _INT([1, 2]), _INT([0]), 4),
         r"kv_last_page_len\[0\] is 0; 1 to 4 is needed"),
        (lambda: T.from_flashinfer_tables(_INT([0, 3]), _INT([1, 2]), _INT([1]), 4), "rise from 0 to the 2 entries"),
        (lambda: T.from_flashinfer_tables(_INT([0]), _INT([1]), _INT([1]), 4), "kv_indptr has 1 entries; 2 are needed"),
        (lambda: T.to_sglang_tables(_TABLES, _INT([9]), 4), r"is 9; its row of block_tables holds 8 tokens"),
        (lambda: T.from_sglang_tables(_INT([[4, 5, 7]]), _INT([3]), 4), r"req_to_token\[0, 2\] is 7; 6 is needed"),
        (lambda: T.from_sglang_tables(_INT([[4, 5]]), _INT([3]), 4), r"row of req_to_token holds 2 tokens"),
        (lambda: L.element_offsets("mine", (1, 1, 1, 4), 4), "layout is 'mine'; known are ours"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_slots_and_pages_that_int32_does_not_hold_are_refused() -> None:
    tables = np.array([[2**27 - 1], [2**27]], dtype=np.int32)
    lens = np.array([16, 1], dtype=np.int32)
    with pytest.raises(ValueError, match="req_to_token holds 2147483648; 2147483647 is the most that int32 holds"):
        T.to_sglang_tables(tables, lens, 16)
    assert T.to_sglang_tables(tables[:1], lens[:1], 16).max() == 2**31 - 1
    with pytest.raises(ValueError, match="kv_indices holds 2147483648; 2147483647 is the most"):
        T.to_flashinfer_tables(np.array([[2**31]]), np.array([4]), 4)
