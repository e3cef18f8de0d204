"""Every CUDA kernel of the project once, on small inputs: what `make gpu` runs under compute-sanitizer.

CuPy's pool is off, so that each array is an allocation of its own, and a step past its end is seen. Without a
GPU it runs the same calls on NumPy, which only shows that they are right calls.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from paged_ref import LLM, SamplingParams
from paged_ref.core.device import on_gpu, synchronize, xp
from paged_ref.extras.formats import encode
from paged_ref.kernels import backends, copy_blocks, naive_attention, paged_attention, write_kv

FEATURES: tuple[dict[str, Any], ...] = ({}, {"sliding_window": 9}, {"softcap": 3.0, "alibi_slopes": 1, "sinks": 1})


def attention(backend: str, cache_dtype: str, query_lens: tuple[int, ...], heads: tuple[int, int, int]) -> int:
    """Paged and contiguous calls with each set of features; returns how many the backend took."""
    num_heads, num_kv_heads, head_size = heads
    rng = np.random.default_rng(0)
    seq_lens = [n if n > 1 else length for n, length in zip(query_lens, (70, 0, 1, 700), strict=True)]
    scales = None if cache_dtype not in ("int8", "uint8") else np.full(num_kv_heads, 0.03, np.float32)
    rows = (2, 64 * 16, num_kv_heads, head_size)
    keys, values = xp.asarray(encode(rng.standard_normal(rows, np.float32), cache_dtype, scales))
    tables = xp.asarray(np.stack([rng.permutation(64)[:44] for _ in seq_lens]).astype(np.int32))
    starts = xp.asarray(np.array([0, 5, 70, 300], np.int32))
    lens = xp.asarray(np.array(seq_lens, np.int32))
    loc = xp.asarray(np.cumsum([0, *query_lens]).astype(np.int32))
    query_dtype = "float32" if cache_dtype == "float32" else "float16"
    query = xp.asarray(rng.standard_normal((sum(query_lens), num_heads, head_size)).astype(query_dtype))
    done = 0
    for features in FEATURES:
        options = dict(features)
        for name in ("alibi_slopes", "sinks"):
            if name in options:
                options[name] = xp.ones(num_heads, dtype=np.float32)
        if scales is not None:
            options |= {"key_scales": xp.asarray(scales), "value_scales": xp.asarray(scales)}
        blocks = (64, 16, num_kv_heads, head_size)
        try:
            paged_attention(
                query, keys.reshape(blocks), values.reshape(blocks), tables, lens, loc, backend=backend,
                return_lse=True, **options,
            )  # fmt: skip
            naive_attention(query, keys, values, starts, lens, loc, backend=backend, return_lse=True, **options)
        except ValueError as error:
            if "cannot run this call" not in str(error):
                raise
            continue
        done += 2
    return done


def moves() -> None:
    """write_kv in all formats, by chunks and by numbers, and copy_blocks."""
    rng = np.random.default_rng(0)
    slots = xp.asarray(np.array([9, -1, 0, 63, 11], np.int32))
    for source in ("float32", "float16", "uint16"):
        for target in ("float32", "float16", "uint16", "int8", "uint8"):
            for row in ((2, 64), (3, 7)):
                key = xp.asarray(encode(rng.standard_normal((5, *row), np.float32), source))
                caches = [xp.zeros((16, 4, *row), dtype=target) for _ in range(2)]
                given: dict[str, Any] = {}
                if target in ("int8", "uint8"):
                    given = {f"{name}_scales": xp.ones(row[0], dtype=np.float32) for name in ("key", "value")}
                write_kv(key, key, caches[0], caches[1], slots, **given)
                copy_blocks(caches[0], caches[1], [(0, 15), (2, 7)])


def main() -> int:
    if on_gpu:
        xp.cuda.set_allocator(None)
    taken = {}
    for backend in [name for name in backends() if name.startswith("cuda")] or ["cpu-simd"]:
        taken[backend] = sum(
            attention(backend, dtype, query_lens, heads)
            for dtype in ("float32", "float16", "uint16", "int8", "uint8")
            for query_lens in ((1, 1, 1, 1), (1, 0, 1, 40))
            for heads in ((4, 4, 64), (8, 1, 128))
        )
    moves()
    (output,) = LLM("tiny").generate("Four score and seven years ago our", SamplingParams(max_tokens=3))
    synchronize()
    print(f"{taken} attention calls; the model says{output.outputs[0].text}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
