"""Every backend against the oracle: one table of cases, paged and contiguous.

In each case all that a kernel must not read is poison: NaN in unused slots and unreferenced blocks, and
nonsense in the padding of the block table.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from support import oracle
from support.attention_cases import Case, Problem, build, cases, on, run, tolerance, true_options

from paged_ref.core.device import to_host
from paged_ref.extras.formats import decode
from paged_ref.kernels import backends, naive_attention, paged_attention, write_kv

# The tracer runs one thread after another and has its own, smaller tests.
BACKENDS = [
    pytest.param(name, marks=pytest.mark.gpu) if name.startswith("cuda") else name
    for name in backends()
    if name != "trace"
]
Array = np.ndarray[Any, np.dtype[Any]]


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


@pytest.mark.parametrize("backend", [name for name in ("reference", "cpu", "cpu-simd") if name in BACKENDS])
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
    options = {} if backend in ("cpu", "cuda") else {"sinks": on(backend, problem.options["sinks"])}
    paged_attention(*arrays, **options, backend=backend)
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


@pytest.mark.parametrize("backend", [name for name in ("cpu", "cpu-simd") if name in BACKENDS])
def test_several_python_threads_may_call_at_the_same_time(backend: str) -> None:
    problem = build(Case(seq_lens=(900, 1300), head_size=64))
    want = run(problem, backend, "paged")
    with ThreadPoolExecutor(4) as pool:
        for out in pool.map(lambda _: run(problem, backend, "paged"), range(16)):
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
        out, lse = paged_attention(query, keys, values, tables, seq_lens, return_lse=True, **scales)
        assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
        worth = keys.float() * scale, values.float() * 2 * scale if scales else values.float()
        want = paged_attention(query.float(), worth[0], worth[1], tables, seq_lens, backend="reference")
        np.testing.assert_allclose(out.float(), want, rtol=4e-3, atol=4e-3)
        given = torch.empty_like(query)
        assert paged_attention(query, keys, values, tables, seq_lens, out=given, **scales) is given
        assert torch.equal(given, out)


def test_importing_the_package_and_its_kernels_loads_no_numba() -> None:
    code = "import sys, paged_ref, paged_ref.kernels; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
