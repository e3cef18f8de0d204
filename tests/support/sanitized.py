"""A dozen variants of the CUDA kernels on small inputs: what `make gpu-check` runs under compute-sanitizer.

Among them is each kernel and each branch that touches memory in another way. CuPy's pool is off, so that each array is
an allocation of its own, and a step past its end is seen. Without a GPU the same calls run on NumPy, which only shows
that they are right calls.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from paged_ref import LLM, SamplingParams
from paged_ref.core.device import on_gpu, synchronize, xp
from paged_ref.extras.formats import encode
from paged_ref.kernels import backends, copy_blocks, naive_attention, paged_attention, write_kv

from .gpu_smoke import Check, run_all

DECODE, MIXED = (1, 1, 1, 1), (1, 0, 1, 40)  # new tokens of each sequence
EVERYTHING: dict[str, Any] = {"softcap": 3.0, "alibi_slopes": 1, "sinks": 1}
# dtype of the cache, new tokens, (query heads, KV heads, head size), features
Call = tuple[str, tuple[int, ...], tuple[int, int, int], dict[str, Any]]
TUNED: tuple[Call, ...] = (
    ("float16", DECODE, (8, 1, 128), {}),
    ("float16", MIXED, (4, 4, 64), {"sliding_window": 9}),
    ("uint16", MIXED, (8, 1, 128), EVERYTHING),
    ("float32", MIXED, (4, 4, 64), {}),
    ("int8", DECODE, (8, 1, 128), {"sliding_window": 9}),
    ("uint8", MIXED, (4, 4, 64), EVERYTHING),
)
TEACHING: tuple[Call, ...] = (("float32", MIXED, (4, 4, 64), {}), ("float16", DECODE, (8, 1, 128), {}))


def attention(
    backend: str, cache_dtype: str, query_lens: tuple[int, ...], heads: tuple[int, int, int], features: dict[str, Any]
) -> str:
    """A paged and a contiguous call."""
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
    options = dict(features)
    for name in ("alibi_slopes", "sinks"):
        if name in options:
            options[name] = xp.ones(num_heads, dtype=np.float32)
    if scales is not None:
        options |= {"key_scales": xp.asarray(scales), "value_scales": xp.asarray(scales)}
    blocks = (64, 16, num_kv_heads, head_size)
    in_blocks = (keys.reshape(blocks), values.reshape(blocks))
    paged_attention(query, *in_blocks, tables, lens, loc, backend=backend, return_lse=True, **options)
    naive_attention(query, keys, values, starts, lens, loc, backend=backend, return_lse=True, **options)
    synchronize()  # a fault is reported here
    return backend


def moves(source: str, target: str, row: tuple[int, int]) -> str:
    """write_kv, by chunks or by numbers, and copy_blocks."""
    rng = np.random.default_rng(0)
    slots = xp.asarray(np.array([9, -1, 0, 63, 11], np.int32))
    key = xp.asarray(encode(rng.standard_normal((5, *row), np.float32), source))
    caches = [xp.zeros((16, 4, *row), dtype=target) for _ in range(2)]
    given: dict[str, Any] = {}
    if target in ("int8", "uint8"):
        given = {f"{name}_scales": xp.ones(row[0], dtype=np.float32) for name in ("key", "value")}
    write_kv(key, key, caches[0], caches[1], slots, **given)
    copy_blocks(caches[0], caches[1], [(0, 15), (2, 7)])
    synchronize()
    return f"{source} to {target}"


def model() -> str:
    """Three tokens of the embedded model: the decoder's kernels."""
    (output,) = LLM("tiny").generate("Four score and seven years ago our", SamplingParams(max_tokens=3))
    return output.outputs[0].text


def checks() -> list[Check]:
    """All variants, each on its own."""
    kinds = [("cuda-flash", TUNED), ("cuda", TEACHING)] if on_gpu else [("cpu-simd", TUNED)]
    found = [Check("the embedded model", 20, model)]
    for backend, variants in kinds:
        assert backend in backends(), backend
        for variant in variants:
            words = f"{backend}: {variant[0]}, {'mixed' if variant[1] == MIXED else 'decode'}, {' '.join(variant[3])}"
            found.append(Check(words.rstrip(", "), 10, partial(attention, backend, *variant)))
    for source, target, row in (
        ("float16", "float16", (2, 64)),
        ("float32", "int8", (3, 7)),
        ("uint16", "uint8", (2, 64)),
    ):
        found.append(Check(f"write_kv: {source} to {target}", 10, partial(moves, source, target, row)))
    return found


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=110)
    parser.add_argument("--out", type=Path, default=Path("build/gpu"))
    parser.add_argument("--file", default="sanitized.jsonl")
    args = parser.parse_args()
    if on_gpu:
        xp.cuda.set_allocator(None)
    return 1 if run_all(args.out, args.seconds, checks(), args.file) else 0


if __name__ == "__main__":
    raise SystemExit(main())
