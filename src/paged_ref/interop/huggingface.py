"""PagedAttention for the models of Hugging Face transformers: an attention to register, and a cache to hand over::

    from paged_ref.interop.huggingface import PagedCache, register

    register()
    model.set_attn_implementation("paged_ref")
    model.generate(**inputs, cache=PagedCache(num_blocks=256))  # or past_key_values=, its older name

The cache (hf_cache.py) hands K and V of a step through to the attention, and the mask function hands through what is
padding and how wide the window is. There the three meet: K and V are written into their slots, and the kernel reads
through the block tables. Arrays are shared through DLPack, NumPy's on a CPU and CuPy's on a GPU; the cache is never
copied. A model without a cache runs the contiguous kernel on what it has just computed.

What the kernels cannot do is refused: masks that are not causal, chunked masks, masks made by hand, position biases,
sparse attention, dropout, gradients. Tested with transformers 5.24.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from types import CodeType
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, sliding_window_causal_mask_function

from .cache_api import write_kv
from .hf_cache import NAME, KVPool, NewKV, Packing, PagedCache, Sealed
from .kernel_api import naive_attention, paged_attention

__all__ = ["KVPool", "PagedCache", "register"]

# What some models hand to their attention, and no kernel here takes.
REFUSED = (
    "position_bias", "indices", "block_indices", "sinks", "cu_seq_lens_q", "cu_seq_lens_k", "output_attentions",
)  # fmt: skip


def register(name: str = NAME) -> None:
    """Make the attention and its masks known to transformers, under `name`."""
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, paged_mask)


# --- masks -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class PagedMask(Sealed):
    """What a causal mask consists of."""

    real: torch.Tensor  # bool [num_rows, columns]: False is padding
    window: int | None  # keys that a query sees, its own included


def paged_mask(
    batch_size: int, kv_length: int, mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: torch.Tensor | None = None, local_size: int | None = None, device: Any = None, **_: Any,
) -> PagedMask:  # fmt: skip
    """What transformers asks for in place of a 4D mask. Raises ValueError for a pattern that no kernel here has."""
    known = causal_mask_function if local_size is None else sliding_window_causal_mask_function(local_size)
    pattern = _pattern(mask_function)
    if pattern != _pattern(known):
        names = ", ".join(sorted(_names(pattern)))
        raise ValueError(f"a mask of {names} has no paged kernel; {NAME} is causal attention, with a window or without")
    if attention_mask is None:
        attention_mask = torch.ones(batch_size, kv_length, dtype=torch.bool, device=device)
    return PagedMask(attention_mask.bool(), local_size)


def _pattern(part: Any) -> Any:
    """A function as its code with what it closes over: two that do the same are equal."""
    if isinstance(part, tuple):
        return tuple(map(_pattern, part))
    code = getattr(part, "__code__", None)
    return part if code is None else (code, *(_pattern(cell.cell_contents) for cell in part.__closure__ or ()))


def _names(pattern: Any) -> set[str]:
    if isinstance(pattern, tuple):
        return set().union(*map(_names, pattern))
    return {pattern.co_qualname.partition(".")[0]} if isinstance(pattern, CodeType) else set()


# --- attention -------------------------------------------------------------------------------------------


def attention(
    module: Any, query: torch.Tensor, key: Any, value: Any, attention_mask: Any, scaling: float | None = None,
    dropout: float = 0.0, softcap: float | None = None, s_aux: torch.Tensor | None = None,
    is_causal: bool | None = None, **kwargs: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """What each layer calls instead of its own attention: `query [num_rows, num_heads, count, head_size]` in,
    `[num_rows, count, num_heads, head_size]` out.

    `key` and `value` are a NewKV, or tensors like `query` with `num_kv_heads`. The window comes from the mask, as some
    models tell only the mask of it. Raises ValueError for what the kernels cannot do, OutOfBlocks for a full pool.
    """
    tensors = (query, key.key, key.value, s_aux) if isinstance(key, NewKV) else (query, key, value, s_aux)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    _refuse(causal, attention_mask, dropout, tensors, kwargs)
    how: dict[str, Any] = {
        "scale": scaling, "sliding_window": attention_mask.window, "softcap": softcap,
        "sinks": None if s_aux is None else s_aux.detach().float(),
    }  # fmt: skip
    with _same_stream(query):
        if isinstance(key, NewKV):
            return _paged(query, key, attention_mask.real, how), None
        return _contiguous(query, key, value, attention_mask.real, how), None


def _paged(query: torch.Tensor, new: NewKV, real: torch.Tensor, how: dict[str, Any]) -> torch.Tensor:
    """Write the new K and V, unless a layer that shares them has, and attend through the block tables."""
    layer, cache = new.layer, new.layer.cache
    keys, values = cache.pool.layer(layer.index, new.key)
    if new.step is None:
        step = cache.step(layer, real, query.shape[2], query.device)
        packed, slots = (step.packing.pack(new.key), step.packing.pack(new.value)), step.slots.to(query.device)
        write_kv(*packed, keys, values, slots, validate=False)  # the manager made the slots
        layer.columns, new.step = step.end, step
    packing = new.step.packing
    where = (new.step.block_tables, new.step.seq_lens, packing.query_start_loc)
    addresses = (index.to(query.device) for index in where)
    return packing.unpack(paged_attention(packing.pack(query), keys, values, *addresses, **how, validate=False))


def _contiguous(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, real: torch.Tensor, how: dict[str, Any]
) -> torch.Tensor:
    """Attention over what this run has computed."""
    if query.shape[2] != key.shape[2] or real.shape != (query.shape[0], key.shape[2]):
        raise ValueError(
            f"{query.shape[2]} new tokens meet K of {key.shape[2]}, which lies in no PagedCache; pass "
            "cache=PagedCache(num_blocks=...), or use_cache=False"
        )
    packing = Packing(real, query.device)
    starts = packing.query_start_loc
    packed = packing.pack(query), packing.pack(key), packing.pack(value)
    return packing.unpack(naive_attention(*packed, starts[:-1], starts.diff(), starts, **how))


def _refuse(causal: bool, mask: Any, dropout: float, tensors: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise ValueError for what no kernel here does."""
    if not causal:
        raise ValueError(f"bidirectional attention has no paged kernel; {NAME} is causal attention")
    for name in REFUSED:
        if kwargs.get(name) is not None and kwargs[name] is not False:
            raise ValueError(f"attention with {name} has no paged kernel")
    if not isinstance(mask, PagedMask):
        what = f"the mask is a tensor of {list(mask.shape)}" if isinstance(mask, torch.Tensor) else "there is no mask"
        raise ValueError(f"{what}; {NAME} needs the one that transformers makes for it from [num_rows, columns]")
    if dropout:
        raise ValueError(f"dropout is {dropout}; the paged kernels have none: call model.eval()")
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        raise ValueError("the paged kernels have no backward; run the model under torch.no_grad()")


def _same_stream(tensor: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """CuPy uses torch's current stream, so that neither waits, and torch gives no memory away that is still read."""
    stack = contextlib.ExitStack()
    if tensor.device.type == "cuda":
        import cupy

        stack.enter_context(cupy.cuda.Device(tensor.device.index))
        stream = torch.cuda.current_stream(tensor.device).cuda_stream
        stack.enter_context(cupy.cuda.ExternalStream(stream, tensor.device.index))
    return stack
