"""Does it work on this GPU? `make gpu-smoke`: a minute or two, the checks that say most first, each on its own.

Each check writes one line of JSON to OUT/smoke.jsonl as soon as it ends, so a run that is cut short has said what it
knows. A check for which too little of --seconds is left is left out, and the line says so.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from paged_ref import LLM, SamplingParams
from paged_ref.core import device
from paged_ref.core.device import Array, to_host, xp
from paged_ref.extras.formats import choose_scales, decode, encode
from paged_ref.views.common.versions import versions as versions_of

PACKAGES = (
    "numpy", "numba", "numba-cuda", "llvmlite", "cupy-cuda13x", "cupy-cuda12x", "cuda-bindings", "nvidia-nvvm",
    "nvidia-nvjitlink", "nvidia-cuda-nvrtc", "torch", "triton", "msgspec", "greenlet", "pytest-xdist",
)  # fmt: skip
PROMPTS = ["Four score and seven years ago our", "Once upon a time", "The cat"]


class Check(NamedTuple):
    name: str
    seconds: float  # that it needs, about, with nothing compiled yet
    run: Callable[[], Any]


CHECKS: list[Check] = []


def check(name: str, seconds: float) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    """Decorates a check: what it returns is written, what it raises is its failure."""

    def add(run: Callable[[], Any]) -> Callable[[], Any]:
        CHECKS.append(Check(name, seconds, run))
        return run

    return add


def run_all(out: Path, seconds: float, checks: list[Check], file: str = "smoke.jsonl") -> int:
    """Run the checks in their order, and write a line for each. Returns how many failed."""
    out.mkdir(parents=True, exist_ok=True)
    began, failed = time.perf_counter(), 0
    with (out / file).open("w", encoding="utf-8") as lines:
        for each in checks:
            record: dict[str, Any] = {"check": each.name}
            left = seconds - (time.perf_counter() - began)
            if left < each.seconds:
                record |= {"ok": None, "found": f"left out: {left:.0f} s are left, about {each.seconds:.0f} are needed"}
            else:
                record |= _result(each)
            failed += record["ok"] is False
            lines.write(json.dumps(record, default=str) + "\n")
            lines.flush()
            words = {True: "ok  ", False: "FAIL", None: "-   "}[record["ok"]]
            print(f"{words} {record.get('seconds', ''):>6} {each.name}: {record['found']}", flush=True)
    return failed


def _result(each: Check) -> dict[str, Any]:
    began = time.perf_counter()
    try:
        result: dict[str, Any] = {"ok": True, "found": each.run()}
    except Exception as error:
        places = traceback.extract_tb(error.__traceback__)[-6:]
        at = [f"{Path(place.filename).name}:{place.lineno}" for place in places]
        result = {"ok": False, "found": f"{type(error).__name__}: {str(error)[:600]}", "at": at}
    return result | {"seconds": round(time.perf_counter() - began, 2)}


# --- the checks, the most telling first ----------------------------------------------------------------------


@check("versions", 0)
def versions() -> Any:
    found: dict[str, Any] = {"python": platform.python_version(), "device": device.reason}
    found |= {name: number for name, number in versions_of(PACKAGES).items() if number}
    if device.on_gpu:
        runtime = xp.cuda.runtime
        found |= {"driver": runtime.driverGetVersion(), "runtime": runtime.runtimeGetVersion()}
    assert device.on_gpu, device.reason
    return found


@check("a kernel compiles, and both CUDA backends work", 10)
def backends() -> Any:
    from paged_ref.kernels import why_not

    reasons = {name: why_not(name) for name in ("cuda-flash", "cuda")}
    assert not any(reasons.values()), reasons
    return "cuda-flash, cuda"


@check("CuPy: elementwise code by NVRTC, products by cuBLAS", 5)
def cupy() -> Any:
    numbers = xp.arange(12, dtype=np.float32).reshape(3, 4)
    assert float((numbers * 2 + 1).sum()) == 144
    for dtype in ("float32", "float16"):
        of_dtype = numbers.astype(dtype)
        assert float((of_dtype @ of_dtype.T).sum()) == 1134, dtype
    return "right"


@check("small kernels: norm, add and norm, RoPE, gate, write_kv, copy_blocks", 20)
def small_kernels() -> Any:
    from paged_ref.core.model import llama
    from paged_ref.kernels import copy_blocks, write_kv
    from paged_ref.tuned import fused

    rng = np.random.default_rng(0)
    x, change = xp.asarray(rng.standard_normal((2, 7, 256), np.float32))
    weight, qkv = (xp.asarray(rng.standard_normal(shape, np.float32)) for shape in (256, (7, 8, 32)))
    cos, sin = xp.asarray(rng.standard_normal((2, 7, 1, 32), np.float32))
    slots = np.array([3, -1, 9, 30, 0, 1, 2], np.int32)
    turned = llama.rotate(qkv[:, :6], cos, sin)  # array code: the oracle
    want = [llama.rms_norm(x, weight, 1e-5), llama.rms_norm(x + change, weight, 1e-5), llama.gated(x), turned[:, :4]]
    caches = [np.zeros((8, 4, 2, 32), np.float32) for _ in range(2)]
    write_kv(to_host(turned)[:, 4:], to_host(qkv)[:, 6:], caches[0], caches[1], slots)
    copy_blocks(caches[0], caches[1], [(0, 5), (2, 6)])

    first, second = ([xp.zeros((8, 4, 2, 32), dtype="float32") for _ in range(2)] for _ in range(2))
    got = [fused.rms_norm(x, weight, 1e-5), fused.add_norm(x.copy(), change, weight, 1e-5), fused.gated(x)]
    flat = [cache.reshape(-1, 2, 32) for cache in first]
    got.append(fused.turn_and_write(qkv[:, :6], qkv[:, 6:], cos, sin, flat[0], flat[1], xp.asarray(slots)))
    write_kv(fused.rotate(qkv[:, :6], cos, sin)[:, 4:], qkv[:, 6:], second[0], second[1], xp.asarray(slots))
    for pair in (first, second):
        copy_blocks(pair[0], pair[1], [(0, 5), (2, 6)])
        got, want = [*got, *pair], [*want, *caches]
    off = [float(np.abs(to_host(a) - to_host(b)).max()) for a, b in zip(got, want, strict=True)]
    assert max(off) < 1e-4, off
    return {"off by": max(off)}


@check("cuda-flash, float16: decode, split, prefill beside it", 35)
def tuned() -> Any:
    decoding = beside_reference("cuda-flash", *batch([3000, 1, 517, 16], (32, 8), 128, "float16"), 2e-3)
    mixed = beside_reference(
        "cuda-flash", *batch([600, 900, 40], (8, 2), 128, "float16", query_lens=[600, 1, 30]), 2e-3
    )
    return {"off by": [decoding, mixed]}


@check("the teaching kernels; and a NaN shows", 15)
def teaching() -> Any:
    from paged_ref.kernels import paged_attention

    arguments, scales = batch([1000, 1, 129], (4, 2), 64, "float32", "float32")
    off = beside_reference("cuda", arguments, scales, 1e-4)
    query, keys, values, tables, lens, _ = arguments
    keys[int(to_host(tables)[0, 0]), 3] = np.nan
    out = to_host(paged_attention(query, keys, values, tables, lens, backend="cuda"))
    assert np.isnan(out[0]).all(), "a NaN key gave numbers"
    return {"off by": off}


@check("the embedded model says what it should, by every backend", 60)
def model() -> Any:
    said = {}
    ways: dict[str, dict[str, Any]] = {
        "tuned": {}, "teaching": {"backend": "cuda"}, "standard": {"manager": "standard"}, "f16": {"dtype": "float16"},
    }  # fmt: skip
    for name, options in ways.items():
        (output,) = LLM("tiny", **options).generate(PROMPTS[0], SamplingParams(max_tokens=12))
        said[name] = output.outputs[0].text
    assert all(text == said["tuned"] and text.startswith(" fathers brought forth") for text in said.values()), said
    return said["tuned"]


@check("cuda-flash: bfloat16, float32, int8, float8 caches", 60)
def formats() -> Any:
    kinds = (
        ("uint16", "uint16", 2e-2),
        ("float32", "float32", 1e-4),
        ("int8", "float16", 2e-3),
        ("uint8", "float16", 2e-3),
    )
    return {
        dtype: beside_reference("cuda-flash", *batch([700, 33], (8, 1), 64, dtype, query), bound)
        for dtype, query, bound in kinds
    }


@check("swaps on a stream of their own, prefix cache, beams: the same tokens", 60)
def managers() -> Any:
    params = [SamplingParams(max_tokens=n, ignore_eos=True) for n in (24, 22, 20)]

    def tokens(**options: Any) -> tuple[list[list[int]], int]:
        outputs = LLM("tiny", **options).generate(PROMPTS, params)
        return [output.outputs[0].token_ids for output in outputs], sum(each.num_preemptions for each in outputs)

    want, _ = tokens()
    small = {"block_size": 4, "kv_cache_tokens": 48, "watermark": 0, "preemption": "swap"}
    preempted = []
    for options in ({"manager": "swapping", "kv_cache_tokens": 64}, small, small | {"sanitize": True}):
        got, count = tokens(**options)
        assert got == want, options
        preempted.append(count)
    assert min(preempted) > 0, preempted
    assert tokens(prefix_cache=True, block_size=4)[0] == want, "prefix cache"
    (beams,) = LLM("tiny", block_size=4).generate(PROMPTS[1], SamplingParams(max_tokens=6, beam_width=3))
    return {"preemptions": preempted, "beams": len(beams.outputs)}


@check("speed: a copy, decoding 64 x 4096 and 1 x 65536 (Llama 3 8B), the host's time for a launch", 40)
def speed() -> Any:
    from paged_ref.bench.batch import Batch
    from paged_ref.bench.gpu_clock import GpuClock
    from paged_ref.bench.shapes import Shape

    clock, found = GpuClock(), {}
    copy = clock.copy_bandwidth()
    for shape in (Shape("Llama-3-8B", 64, 4096), Shape("Llama-3-8B", 1, 65536)):
        each = Batch(shape, xp, min(8, max(1, -(-4 * clock.l2_bytes // shape.bytes_held))))
        each.out = xp.empty_like(each.query)
        for name, calls in (("paged", each.paged("cuda-flash")), ("contiguous", each.contiguous("cuda-flash"))):
            timing = clock.time(calls)
            found[f"{shape}, {name}"] = {
                "µs": round(1e6 * timing.seconds, 1), "host µs": round(1e6 * timing.launch_seconds, 1),
                "of the copy": round(shape.bytes_read / timing.seconds / copy, 3), "graph": timing.graph,
            }  # fmt: skip
        del each
    return {"copy GB/s": round(copy / 1e9)} | found


@check("a context longer than the device, the same tokens", 30)
def long_context() -> Any:
    prompt, params = "One day, Ben found a red box under the tree. " * 3, SamplingParams(max_tokens=5)
    small: dict[str, Any] = {"block_size": 4, "device_blocks": 8, "host_blocks": 80, "max_batch_tokens": 32}
    here, streamed = (LLM("tiny", **each).generate(prompt, params)[0].outputs[0].text for each in ({}, small))
    assert here == streamed, (here, streamed)
    return here


@check("training: activations kept, swapped and paged give one gradient", 40)
def training() -> Any:
    from paged_ref.core.model.loading import load
    from paged_ref.training.activations import Keep, Paged, Swap
    from paged_ref.training.network import Activations, PackedBatch, loss_and_gradient
    from paged_ref.training.parameters import Parameters

    config = load("tiny").config
    weights = Parameters(config)
    weights.initialize(0)
    packed = PackedBatch.of([np.random.default_rng(0).integers(500, size=65) for _ in range(4)])
    gradients = []
    ways: tuple[Activations, ...] = (Keep(), Swap(600_000, config, 256), Paged(600_000, 1 << 16, config, 256))
    for way in ways:
        gradient = Parameters(config)
        loss = loss_and_gradient(weights, gradient, packed, way)
        gradients.append(to_host(gradient.flat))
    assert all(np.array_equal(gradients[0], other) for other in gradients[1:])
    return {"loss": round(loss, 4)}


# --- attention beside the oracle ----------------------------------------------------------------------------


def batch(
    lens: list[int], heads: tuple[int, int], head_size: int, dtype: str, query_dtype: str = "float16",
    query_lens: list[int] | None = None,
) -> tuple[tuple[Any, ...], dict[str, Array]]:  # fmt: skip
    """Arguments of paged_attention: sequences of these lengths, blocks of 16 in any order."""
    rng = np.random.default_rng(0)
    blocks = [-(-length // 16) for length in lens]
    scales, caches = {}, []
    for name in ("key_scales", "value_scales"):
        numbers = rng.standard_normal((sum(blocks) + 3, 16, heads[1], head_size), np.float32)
        if dtype in ("int8", "uint8"):
            scales[name] = choose_scales(numbers, np.dtype(dtype))
        caches.append(xp.asarray(encode(numbers, dtype, scales.get(name))))
    order, tables = rng.permutation(sum(blocks) + 3), np.full((len(lens), max(blocks)), -1, np.int32)
    for row, count in enumerate(blocks):
        tables[row, :count], order = order[:count], order[count:]
    num_tokens = sum(query_lens) if query_lens else len(lens)
    query = xp.asarray(encode(rng.standard_normal((num_tokens, heads[0], head_size), np.float32), query_dtype))
    loc = None if query_lens is None else xp.asarray(np.cumsum([0, *query_lens]).astype(np.int32))
    arguments = (query, *caches, xp.asarray(tables), xp.asarray(np.array(lens, np.int32)), loc)
    return arguments, {name: xp.asarray(value) for name, value in scales.items()}


def beside_reference(backend: str, arguments: tuple[Any, ...], scales: dict[str, Array], bound: float) -> float:
    """The largest difference of `backend` from the reference, which must be below `bound`."""
    from paged_ref.kernels import paged_attention

    (out, lse), (want, want_lse) = (
        paged_attention(*arguments, return_lse=True, backend=name, **scales) for name in (backend, "reference")
    )
    off = float(np.abs(to_host(decode(out)).astype(np.float64) - to_host(decode(want))).max())
    lse_off = float(np.abs(to_host(lse) - to_host(want_lse)).max())
    assert off < bound, f"off by {off}"
    assert lse_off < 1e-3, f"the log-sum-exp is off by {lse_off}"
    return off


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=230)
    parser.add_argument("--out", type=Path, default=Path("build/gpu"))
    parser.add_argument("--without", action="append", default=[], metavar="WORDS", help="leave out checks with these")
    args = parser.parse_args()
    from paged_ref.tuned import cubins

    began = time.perf_counter()
    chosen = [each for each in CHECKS if not any(words in each.name for words in args.without)]
    failed = run_all(args.out, args.seconds, chosen)
    folder = os.environ.get("PAGED_REF_CUBINS", "no folder")
    print(
        f"{failed} of {len(chosen)} checks failed, in {time.perf_counter() - began:.0f} s; kernels ({folder}):",
        cubins.counts,
    )
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
