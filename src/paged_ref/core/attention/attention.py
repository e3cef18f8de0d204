"""Which backend runs a call: the public `paged_attention` and `naive_attention`."""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

import numpy as np

from ...interop.arguments import AttentionCall, build_call, like_caller
from ..device import module_of

# The fastest first. A backend is the module of its name: unavailable(), unsupported(call), attention(call).
# It is imported when it is first asked for.
BACKENDS = {
    "cuda-flash": "tuned kernels on a GPU: split sequences, tensor cores, all formats",
    "cuda": "the teaching kernels on a GPU: naive.py and paged.py",
    "cpu": "the same two operations for CPU threads, compiled by Numba",
    "reference": "plain array code, NumPy or CuPy: the oracle",
    "trace": "the teaching kernels run here, thread by thread, and every access recorded",
}
_MODULES = {
    "cuda-flash": "paged_ref.tuned.flash",
    "cuda": "paged_ref.core.attention.cuda",
    "cpu": "paged_ref.tuned.cpu_simd",
    "reference": "paged_ref.core.attention.reference",
    "trace": "paged_ref.tracer.trace",
}
# `auto` takes the first of these that supports the call. Never the tracer: it is a microscope.
_AUTO = ("cuda-flash", "cuda", "cpu", "reference")


@cache
def _load(name: str) -> tuple[Any, str | None]:
    """The backend's module, and why it cannot run here (None where it can)."""
    if name not in BACKENDS:
        raise ValueError(f"backend is {name!r}; known are auto, {', '.join(BACKENDS)}")
    try:
        module = importlib.import_module(_MODULES[name])
    except ImportError as error:
        return None, f"it needs the package {error.name}"
    return module, module.unavailable()


def backends() -> tuple[str, ...]:
    """Names of the backends that work on this machine, the fastest first."""
    return tuple(name for name in BACKENDS if _load(name)[1] is None)


def why_not(name: str) -> str | None:
    """Why the backend `name` does not work on this machine; None where it does."""
    return _load(name)[1]


def _run(call: AttentionCall, backend: str) -> None:
    if backend != "auto":
        module, reason = _load(backend)
        if reason is None:
            reason = module.unsupported(call)
        if reason is not None:
            able = [name for name in backends() if _load(name)[0].unsupported(call) is None]
            raise ValueError(f"backend {backend!r} cannot run this call: {reason}; {', '.join(able)} can")
        (getattr(module, "attend", None) or module.attention)(call)
        return
    names = [name for name in _AUTO if module_of(call.query) is not np or not name.startswith("cuda")]
    for name in names:
        module, reason = _load(name)
        if reason is None and module.unsupported(call) is None:
            (getattr(module, "attend", None) or module.attention)(call)
            return
    raise ValueError("no backend supports this call")  # the reference supports all, so this is a bug


def _finish(call: AttentionCall, caller: Any, out: Any, return_lse: bool) -> Any:
    result = out if out is not None else like_caller(call.out, caller)
    return (result, like_caller(call.lse, caller)) if return_lse else result


def paged_attention(
    query: Any,
    key_cache: Any,
    value_cache: Any,
    block_tables: Any,
    seq_lens: Any,
    query_start_loc: Any = None,
    *,
    scale: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    alibi_slopes: Any = None,
    sinks: Any = None,
    key_scales: Any = None,
    value_scales: Any = None,
    return_lse: bool = False,
    out: Any = None,
    backend: str = "auto",
    validate: bool | None = None,
) -> Any:
    """Causal attention over K and V that lie in blocks.

    Shapes: `query [num_tokens, num_heads, head_size]`, caches `[num_blocks, block_size, num_kv_heads,
    head_size]`, `block_tables [num_seqs, max_blocks]`, `seq_lens [num_seqs]` (keys of each sequence, this
    step's included), `query_start_loc [num_seqs + 1]` (None: one query token for each sequence). Query i of
    a sequence sees key j when `j <= i + seq_len - query_len`.

    `scale` defaults to 1/sqrt(head_size); `sliding_window=W` sees W keys, the token itself included;
    `softcap=c` is c·tanh(s/c), before ALiBi (`slope * (key_position - query_position)`) and the mask;
    `sinks [num_heads]` is one more logit without a value. `return_lse` adds `lse [num_tokens, num_heads]`,
    float32, natural log. A query with no visible key gives output 0 and lse −inf (with sinks: the sink).

    Formats: float16, float32, float64; bfloat16, in uint16 where the library has none; caches also int8, and
    float8 e4m3 in uint8, with `key_scales` and `value_scales [num_kv_heads]`: the value is stored * scale.
    quantize.py makes them.

    Arrays are NumPy, CuPy or DLPack; the answer is of the query's kind, dtype and device. Raises ValueError
    with the argument, the value and the bound. Values on a GPU are only checked with `validate=True`.
    The kernel of Kwon et al. 2023, §4.1, with the conventions of FlashAttention and of today's vLLM.
    """
    call = build_call(
        query, key_cache, value_cache, seq_lens, query_start_loc,
        block_tables=block_tables, names=("key_cache", "value_cache"), scale=scale,
        sliding_window=sliding_window, softcap=softcap, alibi_slopes=alibi_slopes, sinks=sinks,
        key_scales=key_scales, value_scales=value_scales, return_lse=return_lse, out=out, validate=validate,
    )  # fmt: skip
    _run(call, backend)
    return _finish(call, query, out, return_lse)


def naive_attention(
    query: Any,
    keys: Any,
    values: Any,
    starts: Any,
    seq_lens: Any,
    query_start_loc: Any = None,
    *,
    scale: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    alibi_slopes: Any = None,
    sinks: Any = None,
    key_scales: Any = None,
    value_scales: Any = None,
    return_lse: bool = False,
    out: Any = None,
    backend: str = "auto",
    validate: bool | None = None,
) -> Any:
    """Causal attention over K and V in one contiguous region for each sequence.

    `keys, values [num_slots, num_kv_heads, head_size]`, `starts [num_seqs]` the first slot of each region;
    all the rest as in `paged_attention`.
    """
    call = build_call(
        query, keys, values, seq_lens, query_start_loc,
        starts=starts, names=("keys", "values"), scale=scale,
        sliding_window=sliding_window, softcap=softcap, alibi_slopes=alibi_slopes, sinks=sinks,
        key_scales=key_scales, value_scales=value_scales, return_lse=return_lse, out=out, validate=validate,
    )  # fmt: skip
    _run(call, backend)
    return _finish(call, query, out, return_lse)
