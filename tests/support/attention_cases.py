"""Every backend against the oracle: one table of cases, paged and contiguous.

In each case all that a kernel must not read is poison: NaN in unused slots and unreferenced blocks, and
nonsense in the padding of the block table.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from paged_ref.core.device import to_host, xp
from paged_ref.extras.formats import choose_scales, decode, encode
from paged_ref.kernels import naive_attention, paged_attention

Array = np.ndarray[Any, np.dtype[Any]]


# What NumPy has no dtype for: bfloat16, int8 and float8 with scales (extras/formats.py). As poison, NaN; int8 has none.
FORMATS = {"uint16": 0x7FC0, "int8": 127, "uint8": 0x7F}


@dataclass
class Case:
    """What to compute. `options` go to the kernel as they are; per-head ones are made here from `per_head`."""

    seq_lens: tuple[int, ...] = (5, 17, 33)
    query_lens: tuple[int, ...] | None = None  # None: one for each sequence
    num_heads: int = 4
    num_kv_heads: int = 2
    head_size: int = 16
    block_size: int = 16
    cache_dtype: str = "float32"
    query_dtype: str = "float32"
    integer: str = "int32"
    layout: str = "plain"
    per_head: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        changed = {k: v for k, v in vars(self).items() if v != getattr(Case(), k)}
        return ",".join(f"{k}={v}" for k, v in changed.items()).replace(" ", "") or "default"


def cases() -> list[Case]:
    found = [Case()]
    for num_heads, num_kv_heads in ((2, 2), (4, 2), (6, 2), (4, 1), (7, 1), (8, 1), (1, 1), (16, 2)):
        found.append(Case(num_heads=num_heads, num_kv_heads=num_kv_heads, query_lens=(1, 3, 2)))
    for head_size in (1, 7, 8, 20, 32, 63, 64, 80, 128, 255, 256):
        found.append(Case(head_size=head_size, seq_lens=(19, 4), query_lens=(2, 1)))
    for block_size in (1, 3, 16, 64):
        found.append(Case(block_size=block_size, seq_lens=(0, 1, block_size, block_size + 1, 50)))
        found.append(Case(block_size=block_size, seq_lens=(1, 70, 9), query_lens=(1, 20, 9)))
    found += [
        Case(seq_lens=(0,)),
        Case(seq_lens=()),
        Case(seq_lens=(0, 0), query_lens=(0, 0)),
        Case(seq_lens=(9, 20, 0), query_lens=(0, 4, 3)),
        Case(seq_lens=(2, 3, 0), query_lens=(5, 3, 2)),  # more queries than keys: the first see nothing
        Case(seq_lens=(70, 40), query_lens=(70, 33)),  # whole prompts, over several chunks of queries
        Case(seq_lens=(1300,), num_heads=2, num_kv_heads=1, head_size=8),  # long enough to be split
        Case(seq_lens=(1300, 3, 600), query_lens=(2, 3, 1), num_heads=2, num_kv_heads=1, head_size=8),
        Case(integer="int64"),
        Case(options={"scale": 0.3}),
    ]
    settings_of_models: list[tuple[tuple[str, ...], dict[str, Any]]] = [
        ((), {"sliding_window": 1}),
        ((), {"sliding_window": 7}),
        ((), {"sliding_window": 1000}),
        ((), {"softcap": 1.5}),
        (("alibi_slopes",), {}),
        (("sinks",), {}),
        (("sinks",), {"sliding_window": 5}),
        (("alibi_slopes", "sinks"), {"sliding_window": 20, "softcap": 3.0, "scale": 0.7}),
    ]
    for per_head, options in settings_of_models:
        for query_lens, seq_lens in (((1, 1, 1, 1), (0, 1, 17, 45)), ((2, 1, 30, 6), (1, 1, 45, 20))):
            found.append(Case(per_head=per_head, options=options, query_lens=query_lens, seq_lens=seq_lens))
    found.append(Case(seq_lens=(1200,), options={"sliding_window": 700}, per_head=("sinks", "alibi_slopes"),
                      num_heads=2, num_kv_heads=1, head_size=8))  # fmt: skip
    # A format's cases have head sizes and groups for which `cpu-simd` has one loop: to compile one takes seconds.
    for cache, query in (("float16", "float32"), ("float16", "float16"), ("float32", "float16")):
        found.append(Case(cache_dtype=cache, query_dtype=query, head_size=32))
        found.append(Case(cache_dtype=cache, query_dtype=query, query_lens=(3, 1, 20), head_size=28,
                          options={"sliding_window": 9}))  # fmt: skip
    for cache in FORMATS:
        for query in ("float32", "uint16", "float16"):
            found.append(Case(cache_dtype=cache, query_dtype=query, head_size=32))
        found.append(Case(cache_dtype=cache, query_lens=(3, 1, 20), head_size=28, seq_lens=(3, 1300, 40)))
        found.append(Case(cache_dtype=cache, per_head=("alibi_slopes", "sinks"), query_lens=(2, 5, 1), head_size=32,
                          options={"sliding_window": 20, "softcap": 3.0, "scale": 0.7}))  # fmt: skip
    found.append(Case(query_dtype="uint16"))
    for layout in ("k_and_v_in_one", "layers_last", "heads_first", "dims_apart"):
        for dtype in ("float32", "float16", *FORMATS):
            found.append(Case(layout=layout, cache_dtype=dtype, query_lens=(1, 2, 18), head_size=32))
    return found


def empty_caches(case: Case, num_blocks: int) -> tuple[Array, Array]:
    """K and V caches full of poison, [num_blocks, block_size, num_kv_heads, head_size], in some memory layout."""
    shape = (num_blocks, case.block_size, case.num_kv_heads, case.head_size)
    if case.layout == "k_and_v_in_one":
        both = poison(case, (shape[0], 2, *shape[1:]))
        return both[:, 0], both[:, 1]
    if case.layout == "layers_last":
        layers = poison(case, (*shape[:2], 3, *shape[2:]))
        return layers[:, :, 1], layers[:, :, 2]
    if case.layout == "heads_first":
        return (
            poison(case, (shape[2], shape[0], shape[1], shape[3])).transpose(1, 2, 0, 3),
            poison(case, (shape[0], shape[2], shape[1], shape[3])).transpose(0, 2, 1, 3),
        )
    if case.layout == "dims_apart":
        return poison(case, (*shape, 2))[..., 1], poison(case, (*shape, 3))[..., 0]
    return poison(case, shape), poison(case, shape)


def poison(case: Case, shape: tuple[int, ...]) -> Array:
    return np.full(shape, FORMATS.get(case.cache_dtype, np.nan), case.cache_dtype)


@dataclass
class Problem:
    query: Array
    keys: list[Array]  # for each sequence, in order: what the cache's numbers are worth
    values: list[Array]
    query_lens: list[int]
    paged: tuple[Array, Array, Array]  # key_cache, value_cache, block_tables
    contiguous: tuple[Array, Array, Array]  # keys, values, starts
    seq_lens: Array
    query_start_loc: Array | None
    options: dict[str, Any]


def build(case: Case) -> Problem:
    rng = np.random.default_rng(len(str(case)))
    query_lens = [1] * len(case.seq_lens) if case.query_lens is None else list(case.query_lens)
    row = (case.num_kv_heads, case.head_size)
    query = encode(rng.standard_normal((sum(query_lens), case.num_heads, case.head_size)), case.query_dtype)
    scales: dict[str, Any] = {"key_scales": None, "value_scales": None}
    stored = []
    for name, size in zip(scales, (1, 3), strict=True):
        numbers = rng.standard_normal((sum(case.seq_lens), *row)) * rng.uniform(0.3, size, (row[0], 1))
        if case.cache_dtype in ("int8", "uint8"):
            scales[name] = choose_scales(numbers, case.cache_dtype)
        all_rows = encode(numbers, case.cache_dtype, scales[name])
        stored.append(np.split(all_rows, np.cumsum(case.seq_lens)[:-1]) if case.seq_lens else [])
    keys, values = stored

    blocks = [-(-n // case.block_size) for n in case.seq_lens]
    num_blocks = sum(blocks) + 3
    order = iter(rng.permutation(num_blocks).tolist())
    tables = np.full((len(blocks), max(blocks, default=0) + 2), -1, case.integer)  # padding: nonsense
    tables[:, -1:] = 2**31 - 1
    key_cache, value_cache = empty_caches(case, num_blocks)
    for s, count in enumerate(blocks):
        for b in range(count):
            block = tables[s, b] = next(order)
            part = slice(b * case.block_size, (b + 1) * case.block_size)
            length = len(keys[s][part])
            key_cache[block, :length], value_cache[block, :length] = keys[s][part], values[s][part]

    starts = np.cumsum([2, *(n + 3 for n in case.seq_lens)])[:-1].astype(case.integer)
    num_slots = sum(case.seq_lens) + 3 * len(case.seq_lens) + 5
    flat_keys, flat_values = poison(case, (num_slots, *row)), poison(case, (num_slots, *row))
    for s, start in enumerate(starts):
        flat_keys[start : start + len(keys[s])] = keys[s]
        flat_values[start : start + len(keys[s])] = values[s]

    options = dict(case.options)
    for name in case.per_head:
        options[name] = rng.random(case.num_heads).astype(np.float32)
    loc = None
    if case.query_lens is not None:
        loc = np.cumsum([0, *query_lens]).astype(case.integer)
    if scales["key_scales"] is not None:
        options |= scales
    keys = [decode(part, scales["key_scales"], np.float64) for part in keys]
    values = [decode(part, scales["value_scales"], np.float64) for part in values]
    return Problem(
        query, keys, values, query_lens, (key_cache, value_cache, tables), (flat_keys, flat_values, starts),
        np.array(case.seq_lens, case.integer), loc, options,
    )  # fmt: skip


def on(backend: str, array: Any) -> Any:
    """`array` where the backend wants it."""
    return xp.asarray(array) if backend.startswith("cuda") and isinstance(array, np.ndarray) else array


def run(problem: Problem, backend: str, form: str, **more: Any) -> Any:
    function, storage = {
        "paged": (paged_attention, problem.paged),
        "contiguous": (naive_attention, problem.contiguous),
    }[form]
    arguments = [on(backend, a) for a in (problem.query, *storage, problem.seq_lens, problem.query_start_loc)]
    options = {name: on(backend, value) for name, value in {**problem.options, **more}.items()}
    try:
        result = function(*arguments, backend=backend, **options)
    except ValueError as error:
        if backend in ("reference", "cpu-simd") or "cannot run this call" not in str(error):
            raise
        pytest.skip(str(error))
    return tuple(to_host(a) for a in result) if isinstance(result, tuple) else to_host(result)


def tolerance(case: Case) -> float:
    return {"float16": 2e-3, "uint16": 4e-3}.get(case.query_dtype, 2e-5)  # the output is rounded to the query's format


def true_options(problem: Problem) -> dict[str, Any]:
    """The options as the oracle takes them: its K and V are worth what they say."""
    return {name: value for name, value in problem.options.items() if not name.endswith("_scales")}
