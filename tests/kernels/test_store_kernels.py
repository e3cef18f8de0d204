"""The CUDA kernels that move K and V: run in the tracer beside the array code, and their PTX."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import numpy as np
import pytest

pytest.importorskip("greenlet", reason="greenlet runs the tracer's threads")
pytest.importorskip("numba_cuda", reason="numba-cuda compiles the kernels (extra test, cuda12 or cuda13)")

from numba import cuda, types

from paged_ref.kernels import copy_blocks, write_kv
from paged_ref.kernels.quantize import encode
from paged_ref.kernels.store import copy_launch, write_launch
from paged_ref.kernels.store_kernels import copy_blocks_kernel, move_rows_kernel, write_kv_kernel
from paged_ref.kernels.trace import Trace, run

Array = np.ndarray[Any, np.dtype[Any]]
FORMATS = ("float32", "float16", "uint16", "int8", "uint8")


def numbers(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> Array:
    """Of many sizes, with the numbers that formats treat apart."""
    values = (rng.standard_normal(shape) * 10.0 ** rng.integers(-6, 4, shape)).astype(np.float32)
    values.flat[:8] = np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0, 2.0**-9, 3e38
    with np.errstate(over="ignore", invalid="ignore"):
        stored: Array = encode(values, dtype)
    return stored


def traced(launch: Any) -> Trace:
    kernel, grid, threads, args = launch
    return run(kernel, grid, threads, *args)


@pytest.mark.parametrize("target", FORMATS)
@pytest.mark.parametrize("source", ["float32", "float16", "uint16"])
def test_write_kv_kernels_write_what_the_array_code_writes(source: str, target: str) -> None:
    rng = np.random.default_rng(0)
    slots = np.array([9, -1, 0, 5, 11], np.int32)
    for row, form in (((2, 7), "blocks"), ((1, 16), "blocks"), ((2, 8), "slots"), ((2, 8), "strided key")):
        key, value = (numbers(rng, (5, row[0] * 3, row[1]), source)[:, : row[0]] for _ in range(2))
        if form != "strided key":
            key, value = key.copy(), value.copy()
        scales: list[Any] = [None, None]
        if target in ("int8", "uint8"):
            scales = [rng.uniform(0.01, 1, row[0]).astype(np.float32) for _ in range(2)]
        shape = (12, *row) if form == "slots" else (3, 4, *row)
        want, got = ([np.full(shape, 3, target) for _ in range(2)] for _ in range(2))
        with np.errstate(over="ignore", invalid="ignore"):
            write_kv(key, value, want[0], want[1], slots, key_scales=scales[0], value_scales=scales[1])
        launch = write_launch(key, value, got[0], got[1], slots, *scales)
        aligned = row[0] * row[1] * key.itemsize % 16 == 0
        assert (launch[0] is move_rows_kernel) == (source == target and aligned)
        traced(launch)
        for a, b in zip(got, want, strict=True):
            np.testing.assert_array_equal(a, b, err_msg=form)  # takes NaN for equal to NaN


def test_every_number_of_a_row_is_read_and_written_once() -> None:
    """Also where a row is longer than the threads reach at once."""
    for dtype in ("float32", "uint8"):
        key = value = np.ones((3, 4, 300), np.float32)
        caches = np.zeros((2, 2, 2, 4, 300), dtype)
        scales = [np.ones(4, np.float32)] * 2 if dtype == "uint8" else [None, None]
        trace = traced(write_launch(key, value, caches[0], caches[1], np.array([3, -2, 0]), *scales))
        for name in ("key", "value"):
            reads, writes = trace.counts(name), trace.counts(f"{name}_cache", write=True)
            assert reads.sum() == writes.sum() == reads.size * 2 // 3
            assert reads.max() == writes.max() == 1


@pytest.mark.parametrize("planes", [1, 3])
def test_copy_blocks_kernel(planes: int) -> None:
    rng = np.random.default_rng(0)
    cache = rng.standard_normal((planes, 6, 4, 2, 6)).astype(np.float32)
    pairs = np.array([[0, 3], [0, 5], [4, 1]])
    want = cache.copy()
    want[:, [3, 5, 1]] = want[:, [0, 0, 4]]
    launch = copy_launch(cache, pairs)
    assert launch is not None
    trace = traced(launch)
    np.testing.assert_array_equal(cache, want)
    writes = trace.counts("cache", write=True)
    assert writes.sum() == planes * 3 * 48
    assert writes.max() == 1


def test_the_copy_kernel_leaves_alone_what_it_cannot_do() -> None:
    cache = np.zeros((1, 6, 4, 2, 6), np.float32)
    assert copy_launch(cache, np.array([[0, 1], [1, 2]])) is None  # block 1 must be read before it is written
    assert copy_launch(cache[..., :5], np.array([[0, 1]])) is None
    assert copy_launch(np.zeros((1, 6, 1, 1, 3), np.float32), np.array([[0, 1]])) is None  # blocks of 12 bytes
    chain = np.arange(6, dtype=np.float32).reshape(6, 1, 1, 1).repeat(4, axis=3)
    copy_blocks(chain, chain.copy(), [(0, 1), (1, 2)])
    assert chain[:, 0, 0, 0].tolist() == [0, 0, 1, 3, 4, 5]


# ---- machine code


def array(dtype: str, ndim: int, layout: str = "C") -> Any:
    return types.Array(getattr(types, dtype), ndim, layout)


@cache
def ptx_of(name: str, cc: tuple[int, int]) -> str:
    words, slots, i64 = array("uint32", 1), array("int32", 1), types.int64
    if name == "move_rows":
        kernel, signature = move_rows_kernel, (words, words, words, words, slots, i64, i64, i64)
    elif name == "copy_blocks":
        kernel, signature = copy_blocks_kernel, (words, array("int64", 2), i64, i64)
    else:
        source, target = name.split(" to ")
        key, kv_cache, scales = array(source, 3, "A"), array(target, 4), array("float32", 1)
        kernel, signature = write_kv_kernel(source, target), (key, key, kv_cache, kv_cache, slots, scales, scales)
    ptx, _ = cuda.compile_ptx(kernel.py_func, signature, cc=cc)
    return str(ptx)


CONVERSIONS = [f"{a} to {b}" for a, b in (("float32", "float16"), ("float16", "uint16"), ("uint16", "int8"),
               ("float32", "uint8"), ("float32", "float32"))]  # fmt: skip


@pytest.mark.parametrize("name", ["move_rows", "copy_blocks", *CONVERSIONS])
def test_ptx_has_no_float64_no_local_memory_and_no_call(name: str) -> None:
    for cc in ((8, 0), (9, 0)):
        ptx = ptx_of(name, cc)
        assert ".f64" not in ptx
        assert ".local" not in ptx
        assert not re.search(r"\bcall\b", ptx)


@pytest.mark.parametrize("name", ["move_rows", "copy_blocks"])
def test_ptx_moves_16_bytes_at_once(name: str) -> None:
    ptx = ptx_of(name, (8, 0))
    assert re.search(r"ld\.global\S*\.v4\.", ptx), ptx
    assert re.search(r"st\.global\S*\.v4\.", ptx)
