"""The teaching kernels on a GPU, beside what test_attention.py asks of every backend."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from paged_ref.kernels import backends, naive_attention, paged_attention

pytestmark = pytest.mark.gpu


def caches(num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, dtype: str) -> tuple[Any, Any]:
    import cupy

    rng = cupy.random.default_rng(0)
    shape = (num_blocks, block_size, num_kv_heads, head_size)
    return tuple(rng.standard_normal(shape, dtype=np.float32).astype(dtype) for _ in range(2))


def close(result: Any, expected: Any, dtype: str) -> None:
    tolerance = 2e-3 if dtype == "float16" else 2e-5
    np.testing.assert_allclose(result.get(), expected.get(), rtol=tolerance, atol=tolerance)


def test_the_backend_is_there() -> None:
    assert "cuda" in backends()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("table_dtype", ["int32", "int64"])
@pytest.mark.parametrize("head_size", [1, 33, 128, 256])
def test_many_blocks_and_both_tables(dtype: str, table_dtype: str, head_size: int) -> None:
    """Lengths over several tiles of 128 keys, blocks from all over the cache, nothing leaves the GPU."""
    import cupy

    num_heads, block_size, lens = 6, 16, [1, 0, 127, 128, 129, 1000]
    key_cache, value_cache = caches(512, block_size, 2, head_size, dtype)
    tables = cupy.random.permutation(512)[: len(lens) * 64].reshape(len(lens), -1).astype(table_dtype)
    seq_lens = cupy.asarray(lens, dtype=np.int32)
    query = cupy.random.standard_normal((len(lens), num_heads, head_size), dtype=np.float32).astype(dtype)
    out, lse = paged_attention(
        query, key_cache, value_cache, tables, seq_lens, return_lse=True, backend="cuda", validate=True
    )
    expected, expected_lse = paged_attention(
        query, key_cache, value_cache, tables, seq_lens, return_lse=True, backend="reference"
    )
    assert isinstance(out, cupy.ndarray)
    assert isinstance(lse, cupy.ndarray)
    close(out, expected, dtype)
    close(lse, expected_lse, "float32")
    assert float(abs(out[1]).max()) == 0
    assert (lse[1] == -np.inf).all()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_naive_and_paged_agree_to_the_bit(dtype: str) -> None:
    """One storage, a table that names its blocks in order: the same slots, so the same sums."""
    import cupy

    key_cache, value_cache = caches(64, 16, 2, 64, dtype)
    query = cupy.random.standard_normal((300, 8, 64), dtype=np.float32).astype(dtype)
    loc, seq_lens = cupy.asarray([0, 250, 300], dtype=np.int32), cupy.asarray([250, 500], dtype=np.int32)
    tables = cupy.arange(64, dtype=np.int32).reshape(2, 32)
    starts = cupy.asarray([0, 512], dtype=np.int32)
    keys, values = key_cache.reshape(-1, 2, 64), value_cache.reshape(-1, 2, 64)
    by_table = paged_attention(query, key_cache, value_cache, tables, seq_lens, loc, backend="cuda")
    by_start = naive_attention(query, keys, values, starts, seq_lens, loc, backend="cuda")
    assert (by_table == by_start).all()
    close(
        by_table,
        paged_attention(query, key_cache, value_cache, tables, seq_lens, loc, backend="reference"),
        dtype,
    )


def test_the_kernel_keeps_its_place_in_the_stream() -> None:
    """What CuPy did before on this stream is done; what comes after waits for the kernel."""
    import cupy

    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        key_cache, value_cache = caches(64, 16, 1, 64, "float32")
        query = cupy.ones((1, 1, 64), dtype=np.float32)
        tables = cupy.arange(64, dtype=np.int32)[None]
        seq_lens = cupy.asarray([1024], dtype=np.int32)
        value_cache[:] = 0
        for _ in range(50):
            value_cache += 1
        out = paged_attention(query, key_cache, value_cache, tables, seq_lens, backend="cuda")
        doubled = out * 2
    stream.synchronize()
    np.testing.assert_allclose(doubled.get(), 100, rtol=1e-5)


def test_host_arrays_are_refused() -> None:
    query = np.zeros((1, 1, 4), dtype=np.float32)
    cache = np.zeros((1, 4, 1, 4), dtype=np.float32)
    table, seq_lens = np.zeros((1, 1), dtype=np.int32), np.ones(1, dtype=np.int32)
    with pytest.raises(ValueError, match="host memory"):
        paged_attention(query, cache, cache, table, seq_lens, backend="cuda")
