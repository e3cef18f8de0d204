"""The CUDA kernels that move K and V: run in the tracer beside the array code, and their PTX."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

pytest.importorskip("greenlet", reason="greenlet runs the tracer's threads")
pytest.importorskip("numba_cuda", reason="numba-cuda compiles the kernels (extra test, cuda12 or cuda13)")

from support.launched import Launched, launched, traced

from paged_ref.extras.formats import encode
from paged_ref.interop import cache_api
from paged_ref.kernels import copy_blocks, write_kv
from paged_ref.tuned import store
from paged_ref.tuned.store_kernels import move_rows_kernel

Array = np.ndarray[Any, np.dtype[Any]]
FORMATS = ("float32", "float16", "uint16", "int8", "uint8")


def numbers(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> Array:
    """Of many sizes, with the numbers that formats treat apart."""
    values = (rng.standard_normal(shape) * 10.0 ** rng.integers(-6, 4, shape)).astype(np.float32)
    values.flat[:8] = np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0, 2.0**-9, 3e38
    with np.errstate(over="ignore", invalid="ignore"):
        stored: Array = encode(values, dtype)
    return stored


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
        with launched() as launches:
            assert store.write(key, value, got[0], got[1], slots, (scales[0], scales[1]))
        aligned = row[0] * row[1] * key.itemsize % 16 == 0
        assert (launches[0].launch.kernel is move_rows_kernel) == (source == target and aligned)
        for a, b in zip(got, want, strict=True):
            np.testing.assert_array_equal(a, b, err_msg=form)  # takes NaN for equal to NaN


@pytest.mark.parametrize(("dtype", "names"), [("float32", ("key", "key_cache")), ("uint8", ("rows", "cache"))])
def test_every_number_of_a_row_is_read_and_written_once(dtype: str, names: tuple[str, str]) -> None:
    """Also where a row is longer than the threads reach with one access each."""
    key, caches = np.ones((3, 4, 300), np.float32), np.zeros((2, 2, 2, 4, 300), dtype)
    scales = [np.ones(4, np.float32)] * 2 if dtype == "uint8" else [None, None]
    with launched() as launches:
        assert store.write(key, key, caches[0], caches[1], np.array([3, -2, 0]), (scales[0], scales[1]))
    trace = launches[0].trace
    assert trace is not None
    reads, writes = trace.counts(names[0]), trace.counts(names[1], write=True)
    assert reads.sum() == writes.sum() == 2 * 1200
    assert reads.max() == writes.max() == 1


@pytest.mark.parametrize("planes", [1, 3])
def test_copy_blocks_kernel(planes: int) -> None:
    rng = np.random.default_rng(0)
    cache = rng.standard_normal((planes, 6, 4, 2, 6)).astype(np.float32)
    pairs = np.array([[0, 3], [0, 5], [4, 1]])
    want = cache.copy()
    want[:, [3, 5, 1]] = want[:, [0, 0, 4]]
    done, trace = traced(store.copy, cache, pairs)
    assert done
    np.testing.assert_array_equal(cache, want)
    writes = trace.counts("cache", write=True)
    assert writes.sum() == planes * 3 * 48
    assert writes.max() == 1


def test_the_copy_kernel_leaves_alone_what_it_cannot_do() -> None:
    cache = np.zeros((1, 6, 4, 2, 6), np.float32)
    with launched() as launches:
        assert not store.copy(cache, np.array([[0, 1], [1, 2]]))  # block 1 must be read before it is written
        assert not store.copy(cache[..., :5], np.array([[0, 1]]))
        assert not store.copy(np.zeros((1, 6, 1, 1, 3), np.float32), np.array([[0, 1]]))  # blocks of 12 bytes
    assert launches == []
    chain = np.arange(6, dtype=np.float32).reshape(6, 1, 1, 1).repeat(4, axis=3)
    copy_blocks(chain, chain.copy(), [(0, 1), (1, 2)])
    assert chain[:, 0, 0, 0].tolist() == [0, 0, 1, 3, 4, 5]


# ---- machine code


KINDS = ["float16 to float16", "float32 to float16", "float16 to uint16", "uint16 to int8", "float32 to uint8",
         "uint8 to uint8", "copy_blocks"]  # fmt: skip


def launch_of(kind: str) -> Launched:
    """The kernel as it would be launched."""
    with launched(run=False) as found:
        if kind == "copy_blocks":
            store.copy(np.zeros((2, 3, 4, 2, 8), np.float16), np.array([[0, 1]]))
        else:
            source, target = kind.split(" to ")
            key = np.zeros((3, 2, 7 if source == "uint8" else 8), source)
            cache = np.zeros((2, 2, *key.shape[1:]), target)
            scales = [np.ones(2, np.float32)] * 2 if target in ("int8", "uint8") else [None, None]
            store.write(key, key, cache, cache, np.arange(3), (scales[0], scales[1]))
    return found[0]


@pytest.mark.parametrize("name", KINDS)
def test_machine_code(name: str) -> None:
    pytest.importorskip("cuda.bindings.nvjitlink", reason="cuda-bindings links PTX to machine code")
    launch = launch_of(name)
    in_chunks = name in ("float16 to float16", "copy_blocks")
    for capability in ((8, 0), (9, 0)) if in_chunks else ((9, 0),):
        code = launch.compiled(capability)
        assert ".f64" not in code.ptx
        assert ".local" not in code.ptx
        assert not re.search(r"\bcall\b", code.ptx)
        assert (code.stack_bytes, code.spill_stores, code.spill_loads) == (0, 0, 0)
        if in_chunks:
            for what in ("ld", "st"):
                assert re.search(rf"{what}\.global\S*\.v4\.", code.ptx), code.ptx


# ---- the callers


def test_the_public_functions_ask_the_kernels_first_and_these_leave_host_memory_alone() -> None:
    key, cache, pairs = np.ones((1, 1, 4), np.float32), np.zeros((3, 1, 1, 4), np.float32), np.array([[0, 1]])
    assert not store.write(key, key, cache, cache, np.array([2]))
    assert not store.copy(cache[None], pairs)
    assert not cache.any()


def test_what_a_mover_has_done_is_not_done_again(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mover:
        def __init__(self) -> None:
            self.asked: list[str] = []

        def write(self, *arrays: Any) -> bool:
            self.asked.append("write")
            return True

        def copy(self, *arrays: Any) -> bool:
            self.asked.append("copy")
            return True

    mover = Mover()
    monkeypatch.setattr(cache_api, "store", mover)
    key, cache = np.ones((1, 1, 4), np.float32), np.zeros((3, 1, 1, 4), np.float32)
    write_kv(key, key, cache, cache.copy(), np.array([2]))
    copy_blocks(cache, cache.copy(), [(0, 1)])
    assert mover.asked == ["write", "copy", "copy"]
    assert not cache.any()
