"""The tuned kernels on a GPU, at real sizes, beside what test_attention.py asks of every backend."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from paged_ref.extras.formats import choose_scales, decode, encode
from paged_ref.kernels import backends, naive_attention, paged_attention

pytestmark = pytest.mark.gpu

Batch = tuple[Any, Any, Any, Any, Any, dict[str, Any]]


def batch(
    lens: list[int], heads: tuple[int, int], head_size: int, dtype: str, query_dtype: str, block_size: int = 16
) -> Batch:
    """Query (one for each sequence), caches, a permuted table, lengths, scales. All on the GPU."""
    import cupy

    rng = cupy.random.default_rng(0)
    blocks = [-(-n // block_size) for n in lens]
    width = max(blocks)
    num_blocks = sum(blocks) + 7
    shape = (num_blocks, block_size, heads[1], head_size)
    scales: dict[str, Any] = {}
    caches = []
    for name in ("key_scales", "value_scales"):
        numbers = rng.standard_normal(shape, dtype=np.float32)
        if dtype in ("int8", "uint8"):
            scales[name] = choose_scales(numbers, dtype)
        caches.append(encode(numbers, dtype, scales.get(name)))
    order = iter(np.random.default_rng(1).permutation(num_blocks).tolist())
    table = np.full((len(lens), width), -1, np.int32)
    for s, count in enumerate(blocks):
        table[s, :count] = [next(order) for _ in range(count)]
    query = encode(rng.standard_normal((len(lens), heads[0], head_size), dtype=np.float32), query_dtype)
    return query, *caches, cupy.asarray(table), cupy.asarray(lens, dtype=np.int32), scales


def check(arguments: Any, tolerance: float, function: Any = paged_attention, **options: Any) -> Any:
    out, lse = function(*arguments, return_lse=True, backend="cuda-flash", **options)
    want, want_lse = function(*arguments, return_lse=True, backend="reference", **options)
    np.testing.assert_allclose(decode(out).get(), decode(want).get(), rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(lse.get(), want_lse.get(), rtol=1e-4, atol=1e-4)
    return out


def test_the_backend_is_there_and_the_first_choice() -> None:
    assert backends()[0] == "cuda-flash"
    query, keys, values, table, lens, _ = batch([100, 7], (8, 2), 64, "float16", "float16")
    chosen = paged_attention(query, keys, values, table, lens)
    assert (chosen == paged_attention(query, keys, values, table, lens, backend="cuda-flash")).all()


@pytest.mark.parametrize("dtype", ["float16", "uint16", "float32", "int8", "uint8"])
@pytest.mark.parametrize("heads", [(32, 8), (8, 8), (8, 1), (14, 2), (24, 1)], ids=str)
def test_formats_and_groups(dtype: str, heads: tuple[int, int]) -> None:
    """Long and short sequences: split into many parts, and into none that has work."""
    query_dtype = dtype if dtype in ("float16", "uint16", "float32") else "float16"
    query, keys, values, table, lens, scales = batch([3000, 1, 517, 16], heads, 128, dtype, query_dtype)
    check((query, keys, values, table, lens), {"float16": 2e-3, "uint16": 1e-2}.get(query_dtype, 1e-4), **scales)


@pytest.mark.parametrize("head_size", [32, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("block_size", [1, 8, 16, 24, 128])
def test_head_and_block_sizes(head_size: int, block_size: int) -> None:
    query, keys, values, table, lens, _ = batch([900, 33, 1], (8, 2), head_size, "float16", "float16", block_size)
    check((query, keys, values, table, lens), 2e-3)


def test_one_long_sequence_and_many_short_ones() -> None:
    for lens in ([40_000], [70] * 200):
        query, keys, values, table, seq_lens, _ = batch(lens, (8, 2), 128, "float16", "float16")
        check((query, keys, values, table, seq_lens), 2e-3)


def test_all_features() -> None:
    import cupy

    query, keys, values, table, lens, _ = batch([2000, 1, 300], (32, 8), 128, "uint16", "uint16")
    per_head = {name: cupy.random.rand(32).astype(np.float32) for name in ("alibi_slopes", "sinks")}
    check((query, keys, values, table, lens), 1e-2, sliding_window=500, softcap=20.0, scale=0.1, **per_head)


@pytest.mark.parametrize("dtype", ["float16", "float32", "int8"])
def test_prefill(dtype: str) -> None:
    """Whole prompts, chunks of long ones, and single tokens in one batch."""
    import cupy

    query_lens, lens = [600, 1, 257, 0, 64], [600, 1500, 2000, 40, 64]
    _, keys, values, table, seq_lens, scales = batch(lens, (32, 8), 128, dtype, "float16")
    loc = cupy.asarray(np.cumsum([0, *query_lens]), dtype=np.int32)
    query = cupy.random.standard_normal((sum(query_lens), 32, 128), dtype=np.float32).astype(np.float16)
    check((query, keys, values, table, seq_lens, loc), 2e-3, **scales)


def test_the_contiguous_twin_gives_the_same_bits() -> None:
    """One storage, a table that names its blocks in order: the same tiles, the same sums."""
    import cupy

    query, keys, values, _, lens, _ = batch([1600, 1600], (8, 2), 128, "float16", "float16")
    table = cupy.arange(200, dtype=np.int32).reshape(2, 100)
    starts = cupy.asarray([0, 1600], dtype=np.int32)
    paged = check((query, keys[:200], values[:200], table, lens), 2e-3)
    flat = [cache[:200].reshape(-1, 2, 128) for cache in (keys, values)]
    assert (paged == check((query, *flat, starts, lens), 2e-3, naive_attention)).all()


def test_poison_around_what_is_visible_is_not_read() -> None:
    import cupy

    query, keys, values, table, lens, _ = batch([1001, 15], (8, 2), 128, "float16", "float16")
    want = paged_attention(query, keys, values, table, lens, backend="reference")
    used = cupy.zeros(keys.shape[0] * 16, dtype=bool)
    for s, length in enumerate([1001, 15]):
        position = cupy.arange(length)
        used[table[s][position // 16] * 16 + position % 16] = True
    for cache in (keys, values):
        cache.reshape(-1, 2, 128)[~used] = np.nan
    out = paged_attention(query, keys, values, table, lens, backend="cuda-flash")
    np.testing.assert_allclose(out.get(), want.get(), rtol=2e-3, atol=2e-3)


def test_the_kernels_keep_their_place_in_the_stream() -> None:
    """What CuPy did before on this stream is done; what comes after waits for the kernels."""
    import cupy

    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        query, keys, values, table, lens, _ = batch([5000], (8, 1), 128, "float16", "float16")
        values[:] = 0
        for _ in range(50):
            values += 1
        doubled = paged_attention(query, keys, values, table, lens, backend="cuda-flash") * 2
    stream.synchronize()
    np.testing.assert_allclose(doubled.get(), 100, rtol=1e-2)


def test_a_captured_graph_replays_with_new_lengths() -> None:
    """Splits follow the table's shape, not the lengths: the same launches serve them all."""
    import cupy

    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:  # the arrays are made on this stream too: nothing orders it after another one
        query, keys, values, table, lens, _ = batch([4000, 4000], (8, 2), 128, "float16", "float16")
        out = cupy.empty_like(query)
        paged_attention(query, keys, values, table, lens, out=out, backend="cuda-flash")  # compiles, fills the pool
        stream.begin_capture()
        paged_attention(query, keys, values, table, lens, out=out, backend="cuda-flash")
        graph = stream.end_capture()
        for new in ([4000, 17], [1, 2500]):
            lens[:] = cupy.asarray(new, dtype=np.int32)
            graph.launch(stream)
            stream.synchronize()
            want = paged_attention(query, keys, values, table, lens, backend="reference")
            np.testing.assert_allclose(out.get(), want.get(), rtol=2e-3, atol=2e-3)


def test_host_arrays_are_refused() -> None:
    query, cache = np.zeros((1, 1, 8), np.float16), np.zeros((1, 4, 1, 8), np.float16)
    table, lens = np.zeros((1, 1), np.int32), np.ones(1, np.int32)
    with pytest.raises(ValueError, match="host memory"):
        paged_attention(query, cache, cache, table, lens, backend="cuda-flash")
