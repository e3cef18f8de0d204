"""On a GPU: what moves, converts and normalises, against the same on NumPy; and that nothing makes the host wait."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from paged_ref.core.device import to_host
from paged_ref.core.memory.manager import Transfer
from paged_ref.extras.formats import choose_scales, decode, encode, from_float8
from paged_ref.kernels import copy_blocks, merge_states, naive_attention, paged_attention, write_kv
from paged_ref.tuned import fused, launching
from paged_ref.tuned.kv import TunedKV

pytestmark = pytest.mark.gpu
Array = np.ndarray[Any, np.dtype[Any]]
FORMATS = ("float32", "float16", "uint16", "int8", "uint8")


def numbers(shape: tuple[int, ...], dtype: str, seed: int = 0) -> Array:
    rng = np.random.default_rng(seed)
    values = (rng.standard_normal(shape) * 10.0 ** rng.integers(-6, 4, shape)).astype(np.float32)
    values.flat[:8] = np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0, 2.0**-9, 3e38
    with np.errstate(over="ignore", invalid="ignore"):
        stored: Array = encode(values, dtype)
    return stored


def same(got: Any, want: Array) -> None:
    """To the bit; of a NaN any."""
    a, b = to_host(got), want
    assert a.dtype == b.dtype
    nan = np.isnan(decode(b).astype(np.float32))
    np.testing.assert_array_equal(a[~nan], b[~nan])
    assert np.isnan(decode(a).astype(np.float32)[nan]).all()


def recorded(run: Callable[[], Any]) -> None:
    """Run it as a CUDA graph: recording fails where the host would wait."""
    import cupy

    run()  # compiles
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream:
        stream.begin_capture()
        run()
        graph = stream.end_capture()
        graph.launch()
    stream.synchronize()


def test_kernels_can_be_launched() -> None:
    assert launching.unavailable() is None


@pytest.mark.parametrize("dtype", FORMATS)
def test_conversions_on_the_device(dtype: str) -> None:
    import cupy

    values = numbers((50, 3, 8), "float32")
    scales = None if dtype not in ("int8", "uint8") else np.array([0.01, 1, 3], np.float32)
    on_device = None if scales is None else cupy.asarray(scales)
    with np.errstate(over="ignore", invalid="ignore"):
        want = encode(values, dtype, scales)
    got = encode(cupy.asarray(values), dtype, on_device)
    same(got, want)
    back, want_back = to_host(decode(got, on_device)), decode(want, scales)
    np.testing.assert_array_equal(back, want_back)
    if scales is not None:
        usual = np.nan_to_num(values, posinf=1, neginf=-1)
        np.testing.assert_array_equal(to_host(choose_scales(cupy.asarray(usual), dtype)), choose_scales(usual, dtype))


def test_every_float8_code_on_the_device() -> None:
    import cupy

    codes = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(to_host(from_float8(cupy.asarray(codes))), from_float8(codes))


@pytest.mark.parametrize("target", FORMATS)
@pytest.mark.parametrize("source", ["float32", "float16", "uint16", "float64"])
def test_write_kv(source: str, target: str) -> None:
    import cupy

    if source == "float64" and target != "float32":
        pytest.skip("float64 goes by array code")
    slots = np.array([9, -1, 0, 700, 11, -5], np.int32)
    scales: dict[str, Any] = {}
    for row, form in (((2, 7), "blocks"), ((8, 128), "blocks"), ((1, 16), "slots"), ((2, 8), "strided key")):
        key, value = (numbers((6, row[0] * 3, row[1]), source, seed)[:, : row[0]] for seed in (0, 1))
        if target in ("int8", "uint8"):
            scales = {f"{k}_scales": np.linspace(0.01, 1, row[0], dtype=np.float32) for k in ("key", "value")}
        shape = (1000, *row) if form == "slots" else (200, 5, *row)
        want = [np.full(shape, 3, target) for _ in range(2)]
        got = [cupy.asarray(cache) for cache in want]
        with np.errstate(over="ignore", invalid="ignore"):
            write_kv(key, value, want[0], want[1], slots, **scales)
        new = [cupy.asarray(array) for array in (key, value)]
        if form == "strided key":
            wide = cupy.zeros((6, 3 * row[0], row[1]), source)
            wide[:, row[0] : 2 * row[0]] = new[0]
            new[0] = wide[:, row[0] : 2 * row[0]]
        given = {name: cupy.asarray(array) for name, array in scales.items()}
        write_kv(new[0], new[1], got[0], got[1], cupy.asarray(slots), **given)
        for a, b in zip(got, want, strict=True):
            same(a, b)


@pytest.mark.parametrize("dtype", ["float16", "uint8"])
@pytest.mark.parametrize("row", [(2, 64), (1, 3)])
def test_copy_blocks(dtype: str, row: tuple[int, int]) -> None:
    """Also in a chain, where a block is read before it is written."""
    import cupy

    caches = [numbers((20, 4, *row), "float32", seed).astype(np.float16).view(np.uint16) for seed in (0, 1)]
    caches = [cache.astype(np.uint8) if dtype == "uint8" else cache.view(np.float16) for cache in caches]
    for pairs in ([(0, 3), (0, 5), (4, 19)], [(0, 1), (1, 2), (2, 0)]):
        got = [cupy.asarray(cache) for cache in caches]
        copy_blocks(got[0], got[1], pairs)
        want = [cache.copy() for cache in caches]
        copy_blocks(want[0], want[1], pairs)
        for a, b in zip(got, want, strict=True):
            np.testing.assert_array_equal(to_host(a), b)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_fused_kernels_agree_with_the_array_code(dtype: str) -> None:
    import cupy

    from paged_ref.core.model import llama

    x = cupy.random.standard_normal((33, 2048), dtype=np.float32).astype(dtype)
    weight = cupy.random.standard_normal(2048, dtype=np.float32).astype(dtype)
    qkv = cupy.random.standard_normal((33, 12, 64), dtype=np.float32).astype(dtype)
    angles = cupy.random.standard_normal((33, 1, 64), dtype=np.float32)
    cos, sin = cupy.cos(angles).astype(dtype), cupy.sin(angles).astype(dtype)

    def run(operations: Any) -> list[Any]:
        return [
            operations.rms_norm(x, weight, 1e-5), operations.rotate(qkv[:, :8], cos, sin),
            operations.rotate(qkv[:, 8:10], cos, sin), operations.gated(x),
        ]  # fmt: skip

    with pytest.MonkeyPatch.context() as patch:
        for name in ("rms_norm", "rotate", "gated"):  # no call falls back to the array code
            patch.delattr(llama, name)
        got = run(fused)
    bound = 1e-2 if dtype == "float16" else 1e-5
    for a, b in zip(map(to_host, got), map(to_host, run(llama)), strict=True):
        np.testing.assert_allclose(a.astype(np.float32), b.astype(np.float32), rtol=bound, atol=bound)
    recorded(lambda: run(fused))


def test_nothing_makes_the_host_wait() -> None:
    """write_kv, both kinds of attention and merge_states, as they are in a decode step."""
    import cupy

    from paged_ref.kernels import backends

    key_cache, value_cache = (cupy.zeros((64, 16, 2, 64), np.float16) for _ in range(2))
    query = cupy.random.standard_normal((3, 8, 64), dtype=np.float32).astype(np.float16)
    new = cupy.ones((3, 2, 64), np.float16)
    tables = cupy.arange(24, dtype=np.int32).reshape(3, 8)
    seq_lens = cupy.asarray([100, 0, 17], dtype=np.int32)
    loc = cupy.arange(4, dtype=np.int32)
    slots, starts = cupy.asarray([99, -1, 144], dtype=np.int32), cupy.asarray([0, 0, 512], dtype=np.int32)
    flat = [cache.reshape(-1, 2, 64) for cache in (key_cache, value_cache)]
    for backend in ("cuda", "cuda-flash"):
        if backend not in backends():
            continue

        def run(backend: str = backend) -> None:
            write_kv(new, new, key_cache, value_cache, slots, validate=False)
            parts = [
                paged_attention(query, key_cache, value_cache, tables, seq_lens, loc, return_lse=True, backend=backend),
                naive_attention(query, flat[0], flat[1], starts, seq_lens, loc, return_lse=True, backend=backend),
            ]
            merge_states(cupy.stack([out for out, _ in parts]), cupy.stack([lse for _, lse in parts]))

        recorded(run)


def test_swaps_keep_their_order_with_the_work_around_them() -> None:
    """Large blocks and no wait by the host: a copy that came late would show."""
    import cupy

    storage = TunedKV(4, 32, 16, 8, 128, "float16", num_host_blocks=32)
    first = cupy.random.standard_normal(storage.device.shape, dtype=np.float32).astype(np.float16)
    want = to_host(first)
    stream = cupy.cuda.Stream(non_blocking=True)
    stream.wait_event(cupy.cuda.get_current_stream().record())
    with stream:
        for round_ in range(5):
            storage.device[...] = first
            storage.apply([Transfer("swap_out", 0, 8, 16), Transfer("swap_out", 20, 0, 2)])
            storage.device[...] = -1 - round_
            storage.apply([Transfer("swap_in", 8, 16, 16), Transfer("copy", 16, 3), Transfer("swap_in", 0, 1, 2)])
            got = storage.device.copy()
    stream.synchronize()
    storage.synchronize()
    after = to_host(got)
    np.testing.assert_array_equal(after[:, :, 16:], want[:, :, :16])
    np.testing.assert_array_equal(after[:, :, 3], want[:, :, 0])
    np.testing.assert_array_equal(after[:, :, 1:3], want[:, :, 20:22])
    assert (after[:, :, 4:16] == -5).all()
    np.testing.assert_array_equal(storage.host[:, :, 8:24], want[:, :, :16])


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
def test_torch_tensors_on_the_device_without_a_copy(dtype: str) -> None:
    import cupy

    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this torch sees no GPU")
    query = torch.randn(2, 4, 64, device="cuda").to(torch.bfloat16)
    new = torch.randn(8, 2, 64, device="cuda").to(torch.bfloat16)
    cache_dtype = getattr(torch, dtype)
    scales = {}
    if dtype != "bfloat16":
        scales = {f"{name}_scales": torch.full((2,), 0.01, device="cuda") for name in ("key", "value")}
    keys, values = (torch.zeros((2, 4, 2, 64), device="cuda").to(cache_dtype) for _ in range(2))
    torch.cuda.synchronize()
    write_kv(new, -new, keys, values, torch.arange(8, device="cuda"), **scales)
    cupy.cuda.Device().synchronize()
    scale = 0.01 if scales else 1
    want = (new.float() / scale).to(cache_dtype).float().reshape(2, 4, 2, 64)
    assert torch.equal(keys.float(), want)
    tables = torch.arange(2, dtype=torch.int32, device="cuda")[:, None]
    seq_lens = torch.tensor([4, 3], dtype=torch.int32, device="cuda")
    out = paged_attention(query, keys, values, tables, seq_lens, **scales)
    assert out.dtype == torch.bfloat16
    plain = paged_attention(
        query.float(), keys.float() * scale, values.float() * scale, tables, seq_lens, backend="reference"
    )
    assert float((out.float() - plain).abs().max()) < 2e-2
