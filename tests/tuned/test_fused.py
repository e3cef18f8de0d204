"""The fused kernels, run in the tracer beside the model's array code, and their machine code."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytest.importorskip("greenlet", reason="greenlet runs the tracer's threads")
pytest.importorskip("numba_cuda", reason="numba-cuda compiles the kernels (extra test, cuda12 or cuda13)")

from support.launched import launched, traced

from paged_ref.core.device import to_host, xp
from paged_ref.core.model.llama import gated, rms_norm, rotate
from paged_ref.kernels import merge_states
from paged_ref.tuned import fused
from paged_ref.tuned.parts import add_part

RNG = np.random.default_rng(0)
CLOSE = {"float32": 3e-6, "float16": 3e-3}  # relative, and absolute: float16 rounds on the way in the array code


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
    out, trace = traced(fused.rms_norm, x, weight, 1e-5)
    close(out, by_array_code(rms_norm, x, weight, 1e-5))
    assert (trace.counts("out", write=True) == 1).all()
    assert (trace.counts("x") == 2).all()


@pytest.mark.parametrize("dtype", CLOSE)
def test_rotate(dtype: str) -> None:
    qkv = random(3, 9, 10, dtype=dtype)
    angles = random(3, 1, 10)
    cos, sin = np.cos(angles).astype(dtype), np.sin(angles).astype(dtype)
    for part in (qkv[:, :4], qkv[:, 4:6], qkv):
        out, trace = traced(fused.rotate, part, cos, sin)
        close(out, by_array_code(rotate, part, cos, sin))
        assert (trace.counts("out", write=True) == 1).all()
        assert trace.counts("x").sum() == part.size


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("size", [7, 300])
def test_add_norm(dtype: str, size: int) -> None:
    x, change, weight = random(3, size, dtype=dtype), random(3, size, dtype=dtype), random(size, dtype=dtype)
    want = x + change
    out, trace = traced(fused.add_norm, x, change, weight, 1e-5)
    np.testing.assert_array_equal(x, want)
    close(out, rms_norm(want, weight, 1e-5))
    assert (trace.counts("out", write=True) == 1).all()
    assert (trace.counts("change") == 1).all()


@pytest.mark.parametrize("dtype", CLOSE)
def test_one_more_part(dtype: str) -> None:
    """Four rows: two parts, an empty one, the first one, and one with a NaN key."""
    outs, lses = random(2, 2, 2, 10), random(2, 2, 2) * 20
    lses[1, 0, 1], lses[0, 1, 0], outs[0, 1, 0] = -np.inf, -np.inf, 0
    lses[1, 1, 1], outs[1, 1, 1] = np.nan, np.nan
    part = outs[1].astype(dtype)
    want, want_lse = merge_states(np.stack([outs[0], part.astype(np.float32)]), lses)
    out, lse = outs[0].copy(), lses[0].copy()
    assert traced(add_part, out, lse, part, lses[1])[0]
    np.testing.assert_allclose(out, want, rtol=3e-6, atol=3e-6)
    np.testing.assert_allclose(lse, want_lse, rtol=3e-6, atol=3e-6)
    assert np.isnan(out[1, 1]).all()
    np.testing.assert_array_equal(out[0, 1], outs[0, 0, 1])
    nothing, minus = np.zeros((1, 1, 4), np.float32), np.full((1, 1), -np.inf, np.float32)
    assert traced(add_part, nothing, minus, random(1, 1, 4), minus.copy())[0]
    assert nothing.tolist() == [[[0] * 4]]
    assert minus.tolist() == [[-np.inf]]


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("joined", [True, False])
def test_turn_and_write(dtype: str, joined: bool) -> None:
    """Three query heads, two KV heads of size 10; the second token has no slot."""
    qkv = random(3, 7, 10, dtype=dtype)
    qk, value = (qkv[:, :5], qkv[:, 5:]) if joined else (qkv[:, :5].copy(), random(3, 2, 10, dtype=dtype))
    angles = random(3, 1, 10)
    cos, sin = np.cos(angles).astype(dtype), np.sin(angles).astype(dtype)
    caches = [np.full((6, 2, 10), np.nan, dtype) for _ in range(2)]
    slots = np.array([4, -1, 0], np.int32)
    query, trace = traced(fused.turn_and_write, qk, value, cos, sin, caches[0], caches[1], slots)
    turned = rotate(qk, cos, sin)
    close(query, np.ascontiguousarray(turned[:, :3]))
    for cache, new in zip(caches, (turned[:, 3:], value), strict=True):
        close(cache[[4, 0]], np.ascontiguousarray(new[[0, 2]]))
        assert np.isnan(cache[[1, 2, 3, 5]]).all()
    assert (trace.counts("query", write=True) == 1).all()


@pytest.mark.parametrize("dtype", CLOSE)
def test_gate(dtype: str) -> None:
    gate_up = random(2, 2 * 300, dtype=dtype) * 8
    out, trace = traced(fused.gated, gate_up)
    close(out, by_array_code(gated, gate_up))
    assert (trace.counts("out", write=True) == 1).all()
    assert (trace.counts("gate_up") == 1).all()


def test_gate_of_the_largest_is_no_nan() -> None:
    gate_up = np.array([[-200, 200, 1, 1]], np.float32)
    assert traced(fused.gated, gate_up)[0].tolist() == [[0, 200]]


@pytest.mark.parametrize("dtype", CLOSE)
def test_machine_code(dtype: str) -> None:
    pytest.importorskip("cuda.bindings.nvjitlink", reason="cuda-bindings links PTX to machine code")
    x, cos = random(2, 64, dtype=dtype), random(2, 1, 8, dtype=dtype)
    heads, slots = x.reshape(2, 8, 8), np.zeros(2, np.int32)
    with launched(run=False) as launches:
        fused.rms_norm(x, x[0], 1e-5)
        fused.rotate(heads, cos, cos)
        fused.gated(x)
        fused.add_norm(x.copy(), x, x[0], 1e-5)
        fused.turn_and_write(heads[:, :6], heads[:, 6:], cos, cos, heads, heads, slots)
        add_part(random(2, 4, 8), random(2, 4), heads[:, :4].copy(), random(2, 4))
    assert len(launches) == 6
    for launch in launches:
        code = launch.compiled((9, 0))
        assert ".f64" not in code.ptx
        assert ".local" not in code.ptx
        assert not re.search(r"\bcall\b", code.ptx)
        assert (code.stack_bytes, code.spill_stores, code.spill_loads) == (0, 0, 0)
