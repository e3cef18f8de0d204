"""Every backend against the oracle: one table of cases, paged and contiguous.

In each case all that a kernel must not read is poison: NaN in unused slots and unreferenced blocks, and
nonsense in the padding of the block table.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import oracle
import pytest

from paged_ref.device import to_host, xp
from paged_ref.kernels import backends, naive_attention, paged_attention, write_kv
from paged_ref.kernels.quantize import choose_scales, decode, encode

# The tracer runs one thread after another and has its own, smaller tests.
BACKENDS = [
    pytest.param(name, marks=pytest.mark.gpu) if name.startswith("cuda") else name
    for name in backends()
    if name != "trace"
]
Array = np.ndarray[Any, np.dtype[Any]]


# What NumPy has no dtype for: bfloat16, int8 and float8 with scales (quantize.py). As poison, NaN; int8 has none.
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
    for cache, query in (("float16", "float32"), ("float16", "float16"), ("float32", "float16")):
        found.append(Case(cache_dtype=cache, query_dtype=query))
        found.append(Case(cache_dtype=cache, query_dtype=query, query_lens=(3, 1, 20), head_size=20,
                          options={"sliding_window": 9}))  # fmt: skip
    for cache in FORMATS:
        for query in ("float32", "uint16", "float16"):
            found.append(Case(cache_dtype=cache, query_dtype=query, num_heads=8))
        found.append(Case(cache_dtype=cache, query_lens=(3, 1, 20), head_size=20, seq_lens=(3, 1300, 40)))
        found.append(Case(cache_dtype=cache, per_head=("alibi_slopes", "sinks"), query_lens=(2, 5, 1),
                          options={"sliding_window": 20, "softcap": 3.0, "scale": 0.7}))  # fmt: skip
    found.append(Case(query_dtype="uint16"))
    for layout in ("k_and_v_in_one", "layers_last", "heads_first", "dims_apart"):
        for dtype in ("float32", "float16", *FORMATS):
            found.append(Case(layout=layout, cache_dtype=dtype, query_lens=(1, 2, 18)))
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
        if backend in ("reference", "cpu") or "cannot run this call" not in str(error):
            raise
        pytest.skip(str(error))
    return tuple(to_host(a) for a in result) if isinstance(result, tuple) else to_host(result)


def tolerance(case: Case) -> float:
    return {"float16": 2e-3, "uint16": 4e-3}.get(case.query_dtype, 2e-5)  # the output is rounded to the query's format


def true_options(problem: Problem) -> dict[str, Any]:
    """The options as the oracle takes them: its K and V are worth what they say."""
    return {name: value for name, value in problem.options.items() if not name.endswith("_scales")}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", cases(), ids=str)
def test_matches_the_oracle(case: Case, backend: str) -> None:
    problem = build(case)
    want, want_lse = oracle.attention(
        decode(problem.query), problem.keys, problem.values, problem.query_lens, **true_options(problem)
    )
    for form in ("paged", "contiguous"):
        out, lse = run(problem, backend, form, return_lse=True)
        assert out.dtype == problem.query.dtype
        assert lse.dtype == np.float32
        np.testing.assert_allclose(decode(out), want, rtol=tolerance(case), atol=tolerance(case), err_msg=form)
        np.testing.assert_allclose(lse, want_lse, rtol=2e-5, atol=2e-5, err_msg=form)


@pytest.mark.parametrize("backend", [name for name in ("reference", "cpu") if name in BACKENDS])
@pytest.mark.parametrize("case", cases(), ids=str)
def test_paged_and_contiguous_agree_to_the_bit(case: Case, backend: str) -> None:
    problem = build(case)
    if case.layout == "dims_apart" and case.cache_dtype == "float32":
        keys, values, starts = problem.contiguous  # unpacked from strides, as the blocks are
        problem.contiguous = np.repeat(keys, 2, axis=-1)[..., ::2], np.repeat(values, 2, axis=-1)[..., ::2], starts
    for a, b in zip(
        run(problem, backend, "paged", return_lse=True),
        run(problem, backend, "contiguous", return_lse=True),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sequence_gets_the_same_bits_in_any_company(backend: str) -> None:
    problem = build(Case(seq_lens=(700, 31, 90), query_lens=(1, 31, 5)))
    together = run(problem, backend, "paged")
    begin = 0
    for s, count in enumerate(problem.query_lens):
        key_cache, value_cache, tables = problem.paged
        alone = Problem(
            problem.query[begin : begin + count], [], [], [count], (key_cache, value_cache, tables[s : s + 1]),
            problem.contiguous, problem.seq_lens[s : s + 1], np.array([0, count], np.int32), {},
        )  # fmt: skip
        got, want = run(alone, backend, "paged"), together[begin : begin + count]
        if backend == "cuda-flash":  # cuts its work by the batch, so that it fills the GPU
            np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)
        else:
            np.testing.assert_array_equal(got, want)
        begin += count


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", ["paged", "contiguous"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_out_is_filled_and_returned(backend: str, form: str, dtype: str) -> None:
    problem = build(Case(query_dtype=dtype, query_lens=(1, 2, 3)))
    want = run(problem, backend, form)
    for out in (np.empty_like(problem.query), np.empty((*problem.query.shape[:2], 32), dtype)[..., ::2]):
        given_out = on(backend, out)
        function, storage = (
            (paged_attention, problem.paged) if form == "paged" else (naive_attention, problem.contiguous)
        )
        arrays = [on(backend, a) for a in (problem.query, *storage, problem.seq_lens, problem.query_start_loc)]
        assert function(*arrays, out=given_out, backend=backend) is given_out
        np.testing.assert_array_equal(to_host(given_out), want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_but_out_is_written(backend: str) -> None:
    problem = build(Case(query_lens=(1, 5, 20), per_head=("sinks",)))
    arrays = [on(backend, a) for a in (problem.query, *problem.paged, problem.seq_lens, problem.query_start_loc)]
    before = [to_host(a).copy() for a in arrays]
    paged_attention(*arrays, sinks=on(backend, problem.options["sinks"]), backend=backend)
    for array, copy in zip(arrays, before, strict=True):
        np.testing.assert_array_equal(to_host(array), copy)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nan_in_a_visible_slot_shows(backend: str) -> None:
    for which in (0, 1):
        problem = build(Case(seq_lens=(1100, 9)))  # split over two items, or more
        problem.paged[which][problem.paged[2][0, 0], 3] = np.nan
        out = run(problem, backend, "paged")
        assert np.isnan(out[0]).all()
        assert np.isfinite(out[1]).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_scores_neither_overflow_nor_drown_the_others(backend: str) -> None:
    problem = build(Case(seq_lens=(40, 17), options={"scale": 50.0}))
    want, want_lse = oracle.attention(problem.query, problem.keys, problem.values, [1, 1], scale=50.0)
    out, lse = run(problem, backend, "paged", return_lse=True)
    np.testing.assert_allclose(out, want, rtol=1e-3, atol=1e-3)  # float32 scores of several hundred
    np.testing.assert_allclose(lse, want_lse, rtol=1e-5)


def test_float64_runs_on_the_reference_and_the_cpu_backend_says_why_not() -> None:
    problem = build(Case(cache_dtype="float64", query_dtype="float64"))
    want, _ = oracle.attention(problem.query, problem.keys, problem.values, problem.query_lens)
    np.testing.assert_allclose(run(problem, "auto", "paged"), want, rtol=1e-13, atol=1e-13)
    with pytest.raises(ValueError, match=r"backend 'cpu' cannot run this call: query is float64.*reference can"):
        run(problem, "cpu", "paged")


def test_several_python_threads_may_call_at_once() -> None:
    problem = build(Case(seq_lens=(900, 1300), head_size=64))
    want = run(problem, "cpu", "paged")
    with ThreadPoolExecutor(4) as pool:
        for out in pool.map(lambda _: run(problem, "cpu", "paged"), range(16)):
            np.testing.assert_array_equal(out, want)


def test_numpy_in_numpy_out() -> None:
    problem = build(Case())
    assert type(paged_attention(problem.query, *problem.paged, problem.seq_lens)) is np.ndarray


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed: no DLPack partner")
def test_torch_in_torch_out_without_a_copy_of_the_cache() -> None:
    torch = pytest.importorskip("torch")
    problem = build(Case(query_lens=(1, 2, 18)))
    tensors = [
        torch.from_numpy(a.copy())
        for a in (problem.query, *problem.paged, problem.seq_lens, problem.query_start_loc)
        if a is not None
    ]
    result, lse = paged_attention(*tensors, return_lse=True, backend="cpu")
    assert isinstance(result, torch.Tensor)
    assert isinstance(lse, torch.Tensor)
    np.testing.assert_array_equal(result.numpy(), run(problem, "cpu", "paged"))
    out = torch.empty_like(tensors[0])
    assert paged_attention(*tensors, out=out, backend="cpu") is out
    np.testing.assert_array_equal(out.numpy(), result.numpy())


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed: no DLPack partner")
def test_torch_bfloat16_and_float8_without_a_copy() -> None:
    """NumPy knows neither, so their bits are taken. That nothing is copied shows in what write_kv leaves behind."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    query = torch.from_numpy(rng.standard_normal((2, 4, 16)).astype(np.float32)).to(torch.bfloat16)
    new = torch.from_numpy(rng.standard_normal((8, 2, 16)).astype(np.float32)).to(torch.bfloat16)
    tables, seq_lens = torch.arange(2, dtype=torch.int32)[:, None], torch.tensor([4, 3], dtype=torch.int32)
    for dtype in (torch.bfloat16, torch.float8_e4m3fn):
        scales = {}
        if dtype != torch.bfloat16:
            scales = {"key_scales": torch.full((2,), 0.01), "value_scales": torch.full((2,), 0.02)}
        keys, values = (torch.zeros((2, 4, 2, 16)).to(dtype) for _ in range(2))
        write_kv(new, -new, keys, values, torch.arange(8), **scales)
        scale = 1 if dtype == torch.bfloat16 else 0.01
        assert torch.equal(keys.float(), (new.float() / scale).to(dtype).float().reshape(2, 4, 2, 16))
        out, lse = paged_attention(query, keys, values, tables, seq_lens, return_lse=True, backend="cpu", **scales)
        assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
        worth = keys.float() * scale, values.float() * 2 * scale if scales else values.float()
        want = paged_attention(query.float(), worth[0], worth[1], tables, seq_lens, backend="reference")
        np.testing.assert_allclose(out.float(), want, rtol=4e-3, atol=4e-3)
        given = torch.empty_like(query)
        assert paged_attention(query, keys, values, tables, seq_lens, out=given, backend="cpu", **scales) is given
        assert torch.equal(given, out)


def test_importing_the_package_and_its_kernels_loads_no_numba() -> None:
    code = "import sys, paged_ref, paged_ref.kernels; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
