"""What is launched for a call: the kernel, its grid and its arguments; and what the teaching kernels leave out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from support.plain_calls import plain_call

from paged_ref.core import device
from paged_ref.core.attention import cuda

pytest.importorskip("numba_cuda", reason="numba-cuda compiles the kernels (extra test, cuda12 or cuda13)")


def test_a_paged_call_launches_the_paged_kernel_with_its_table() -> None:
    from paged_ref.core.attention import paged

    call = plain_call([5, 9], [2, 1], block_size=4).call
    launch = cuda.launch(call, num_threads=64)
    assert launch.kernel is paged.attention_kernel
    assert (launch.grid, launch.num_threads) == ((3, 4), 64)
    out, lse, query, keys, values, tables, block_size, seq_lens, query_start_loc, scale = launch.args
    assert (out is call.out, lse is call.lse, query is call.query) == (True, True, True)
    for rows, cache in ((keys, call.keys), (values, call.values)):
        assert rows.shape == (cache.shape[0] * 4, 2, 8)
        assert np.shares_memory(rows, cache)
    assert tables is call.addresses.block_tables
    assert block_size == 4
    assert seq_lens is call.addresses.seq_lens
    assert query_start_loc is call.addresses.query_start_loc
    assert (type(scale), scale) == (np.float32, np.float32(8**-0.5))


def test_a_contiguous_call_launches_the_naive_kernel_with_its_starts() -> None:
    from paged_ref.core.attention import naive

    call = plain_call([5, 9], paged=False, want_lse=False).call
    launch = cuda.launch(call)
    assert launch.kernel is naive.attention_kernel
    assert (launch.grid, launch.num_threads) == ((2, 4), cuda.NUM_THREADS)
    assert launch.args[5] is call.addresses.starts
    assert len(launch.args) == 9
    lse = launch.args[1]  # the kernel always writes it
    assert (lse.shape, lse.dtype) == ((2, 4), np.float32)


def test_an_empty_grid_is_not_launched() -> None:
    cuda.start(cuda.launch(plain_call([]).call))  # without a GPU a launch would raise


def test_what_the_teaching_kernels_leave_out_is_named() -> None:
    call: Any = plain_call([5]).call
    assert cuda.unsupported_by_kernels(call) is None
    call.variant = "softcap, sinks"
    assert cuda.unsupported_by_kernels(call) == "the teaching kernels have no softcap, sinks"
    assert cuda.unsupported_by_kernels(plain_call([5], window=3).call) == "the teaching kernels have no sliding_window"
    double = plain_call([5], dtype="float64").call
    assert cuda.unsupported_by_kernels(double) == "query is float64; the teaching kernels read float32 and float16"
    apart: Any = plain_call([5]).call
    apart.keys = np.repeat(apart.keys, 2, axis=0)[::2]
    assert "do not follow one another in memory" in str(cuda.unsupported_by_kernels(apart))


@pytest.mark.skipif(device.on_gpu, reason="a GPU is in use")
def test_without_a_gpu_the_reason_is_the_devices() -> None:
    assert cuda.unavailable() == device.reason


def test_host_arrays_are_refused() -> None:
    assert str(cuda.unsupported(plain_call([5]).call)).startswith("query lies in host memory")


@pytest.mark.parametrize(
    ("shape", "take", "follow"),
    [
        ((6, 4, 2, 8), np.s_[:], True),
        ((6, 4, 2, 8), np.s_[::2], False),
        ((6, 2, 4, 2, 8), np.s_[:, 0], False),  # K and V of a block side by side
        ((1, 2, 4, 2, 8), np.s_[:, 0], True),
        ((6, 1, 2, 8), np.s_[:], True),
        ((24, 2, 8), np.s_[:], True),
    ],
)
def test_whether_blocks_follow_one_another(shape: tuple[int, ...], take: Any, follow: bool) -> None:
    assert cuda.slots_follow(np.zeros(shape, np.float32)[take]) is follow


def test_the_compiler_finds_row_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(np, "row_stack", raising=False)
    cuda.prepare_compiler()
    assert np.row_stack is np.vstack
