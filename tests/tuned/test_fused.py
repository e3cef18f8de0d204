"""The fused kernels, run in the tracer beside the model's array code, and their machine code."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytest.importorskip("greenlet", reason="greenlet runs the tracer's threads")
pytest.importorskip("numba_cuda", reason="numba-cuda compiles the kernels (extra test, cuda12 or cuda13)")

from paged_ref.core.attention.cuda import Launch
from paged_ref.core.device import to_host, xp
from paged_ref.core.model.llama import gated, rms_norm, rotate
from paged_ref.tracer.trace import Trace, run
from paged_ref.tuned.fused import gated_launch, rms_norm_launch, rotate_launch
from paged_ref.tuned.machine_code import bounds_of, compile_kernel, parameters

RNG = np.random.default_rng(0)
CLOSE = {"float32": 3e-6, "float16": 3e-3}  # relative, and absolute: float16 rounds on the way in the array code


def traced(launch: Launch) -> Trace:
    return run(launch.kernel, launch.grid, launch.num_threads, *launch.args)


def close(got: np.ndarray, want: np.ndarray) -> None:
    bound = CLOSE[got.dtype.name]
    np.testing.assert_allclose(got.astype(np.float64), want.astype(np.float64), rtol=bound, atol=bound)


def by_array_code(function: Callable[..., Any], *args: Any) -> np.ndarray:
    """What the model's own code gives, where the device is."""
    return to_host(function(*(xp.asarray(arg) if isinstance(arg, np.ndarray) else arg for arg in args)))


def random(*shape: int, dtype: str = "float32") -> np.ndarray:
    return RNG.standard_normal(shape).astype(dtype)


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("size", [7, 32, 300])
def test_rms_norm(dtype: str, size: int) -> None:
    x, weight = random(3, size, dtype=dtype) * np.array([[1], [100], [0]], dtype), random(size, dtype=dtype)
    out = np.full_like(x, np.nan)
    trace = traced(rms_norm_launch(out, x, weight, 1e-5))
    close(out, by_array_code(rms_norm, x, weight, 1e-5))
    assert (trace.counts("out", write=True) == 1).all()
    assert (trace.counts("x") == 2).all()


@pytest.mark.parametrize("dtype", CLOSE)
def test_rotate(dtype: str) -> None:
    qkv = random(3, 9, 10, dtype=dtype)
    angles = random(3, 1, 10)
    cos, sin = np.cos(angles).astype(dtype), np.sin(angles).astype(dtype)
    for part in (qkv[:, :4], qkv[:, 4:6], qkv):
        out = np.full(part.shape, np.nan, dtype)
        trace = traced(rotate_launch(out, part, cos, sin))
        close(out, by_array_code(rotate, part, cos, sin))
        assert (trace.counts("out", write=True) == 1).all()
        assert trace.counts("x").sum() == part.size


@pytest.mark.parametrize("dtype", CLOSE)
def test_gate(dtype: str) -> None:
    gate_up = random(2, 2 * 300, dtype=dtype) * 8
    out = np.full((2, 300), np.nan, dtype)
    trace = traced(gated_launch(out, gate_up))
    close(out, by_array_code(gated, gate_up))
    assert (trace.counts("out", write=True) == 1).all()
    assert (trace.counts("gate_up") == 1).all()


def test_gate_of_the_largest_is_no_nan() -> None:
    gate_up = np.array([[-200, 200, 1, 1]], np.float32)
    out = np.zeros((1, 2), np.float32)
    traced(gated_launch(out, gate_up))
    assert out.tolist() == [[0, 200]]


@pytest.mark.parametrize("dtype", CLOSE)
def test_machine_code(dtype: str) -> None:
    pytest.importorskip("cuda.bindings.nvjitlink", reason="cuda-bindings links PTX to machine code")
    x, cos = random(2, 64, dtype=dtype), random(2, 1, 8, dtype=dtype)
    for launch in (
        rms_norm_launch(x, x, x[0], 1e-5),
        rotate_launch(x.reshape(2, 8, 8), x.reshape(2, 8, 8), cos, cos),
        gated_launch(x[:, :32].copy(), x),
    ):
        code = compile_kernel(launch.kernel, parameters(launch.args), bounds_of(launch), (9, 0))
        assert ".f64" not in code.ptx
        assert ".local" not in code.ptx
        assert not re.search(r"\bcall\b", code.ptx)
        assert (code.stack_bytes, code.spill_stores, code.spill_loads) == (0, 0, 0)
