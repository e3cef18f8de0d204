"""Attention as the model asks for it: the addresses of a step, one call for one layer, and the backends that run it.

A backend is a module with three functions:

    unavailable()      why it cannot run on this machine; None where it can
    unsupported(call)  why it cannot run this call; None where it can
    attend(call)       fill `call.out`, and `call.lse` where there is one

Rooms outside the core add theirs with `register`.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from ..checks import plural
from ..device import Array


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where the tokens of a step lie. One value serves all layers, so it is checked once.

    Integer arrays on the device of the queries. Paged memory has `block_tables`, contiguous memory has `starts`.
    """

    seq_lens: Array  # [num_seqs] keys of each sequence, this step's tokens included
    query_start_loc: Array  # [num_seqs + 1] cumulative counts of query tokens
    block_tables: Array | None = None  # [num_seqs, max_blocks] logical block to physical block
    starts: Array | None = None  # [num_seqs] first slot of each sequence's region
    slot_mapping: Array | None = None  # [num_tokens] where the step's K and V are written

    def check(self, num_tokens: int, num_blocks: int, block_size: int) -> None:
        """Raise ValueError, with argument, value and bound, for an address outside a cache of this size.

        Looks at values, so all arrays must lie in host memory.
        """
        seq_lens, loc = self.seq_lens.astype(np.int64), self.query_start_loc
        if seq_lens.size and seq_lens.min() < 0:
            s = int(seq_lens.argmin())
            raise ValueError(f"seq_lens[{s}] is {seq_lens[s]}; at least 0 is needed")
        if loc[0] != 0 or loc[-1] != num_tokens or (loc[1:] < loc[:-1]).any():
            shown = ", ".join(map(str, loc[:8])) + (", ..." if loc.size > 8 else "")
            raise ValueError(f"query_start_loc must rise from 0 to {num_tokens}, the length of query; it is [{shown}]")
        if self.block_tables is not None:
            _check_tables(self.block_tables, seq_lens, num_blocks, block_size)
        elif self.starts is not None:
            _check_starts(self.starts, seq_lens, num_blocks * block_size)
        if self.slot_mapping is not None:
            slots, num_slots = self.slot_mapping, num_blocks * block_size
            outside = slots[(slots < 0) | (slots >= num_slots)]
            if outside.size:
                raise ValueError(f"slot_mapping holds {outside[0]}; the cache has slots 0 to {num_slots - 1}")


def _check_tables(tables: np.ndarray, seq_lens: np.ndarray, num_blocks: int, block_size: int) -> None:
    needed = -(-seq_lens // block_size)  # [num_seqs] blocks that hold a token
    if needed.size and needed.max() > tables.shape[1]:
        s = int(needed.argmax())
        raise ValueError(
            f"seq_lens[{s}] is {seq_lens[s]}; its block table holds {plural(tables.shape[1], 'block')} "
            f"of {block_size} = {plural(tables.shape[1] * block_size, 'token')}"
        )
    bad = ((tables < 0) | (tables >= num_blocks)) & (np.arange(tables.shape[1]) < needed[:, None])
    if bad.any():
        s, b = (int(i) for i in np.argwhere(bad)[0])
        raise ValueError(f"block_tables[{s}, {b}] is {tables[s, b]}; the cache has blocks 0 to {num_blocks - 1}")


def _check_starts(starts: np.ndarray, seq_lens: np.ndarray, num_slots: int) -> None:
    bad = (seq_lens > 0) & ((starts < 0) | (starts > num_slots - seq_lens))
    if bad.any():
        s = int(bad.argmax())
        raise ValueError(
            f"starts[{s}] is {starts[s]}; with seq_lens {seq_lens[s]} the region leaves the slots 0 to {num_slots - 1}"
        )


@dataclass(slots=True)
class AttentionCall:
    """One layer's attention. Nothing in it is checked any more; a backend fills `out` and `lse`."""

    query: Array  # [num_tokens, num_heads, head_size]
    keys: Array  # [num_blocks, block_size, num_kv_heads, head_size]; contiguous: [num_slots, num_kv_heads, head_size]
    values: Array  # like keys
    addresses: Addresses
    scale: float  # of the scores, mostly 1 / sqrt(head_size)
    window: int | None  # how many keys a query sees, its own included; None: all before it
    out: Array  # [num_tokens, num_heads, head_size]
    lse: Array | None = None  # [num_tokens, num_heads] float32: the natural log of the sum of exp(score)
    variant: Any = None  # what another room adds to attention; None: what is said above is all


def by_slot(cache: Array) -> Array:
    """`cache` with one row for each slot: [num_slots, num_kv_heads, head_size], the same memory."""
    return cache.reshape(-1, *cache.shape[-2:])


# --- backends ------------------------------------------------------------------------------------------------


class Backend(NamedTuple):
    """One way to run attention. Its module is imported when it is first asked for."""

    name: str
    summary: str
    module: str
    rank: int | None  # `auto` takes the lowest rank that can run a call; None: never


_backends: dict[str, Backend] = {}


def register(name: str, summary: str, module: str, rank: int | None = None) -> None:
    """Make the backend `name` known. A name that is known already stands for the new module from now on."""
    _backends[name] = Backend(name, summary, module, rank)
    _load.cache_clear()
    _automatic.cache_clear()


@cache
def _load(name: str) -> tuple[Any, str | None]:
    """The backend's module, and why it cannot run here (None where it can)."""
    if name not in _backends:
        raise ValueError(f"backend is {name!r}; known are auto, {', '.join(known_backends())}")
    try:
        module = importlib.import_module(_backends[name].module)
        return module, module.unavailable()
    except Exception as error:  # whatever keeps one backend from starting, the others can run
        return None, f"it cannot start: {error}"


def known_backends() -> dict[str, str]:
    """All backends and what they are: those that `auto` takes first come first."""
    ordered = sorted(_backends.values(), key=lambda backend: np.inf if backend.rank is None else backend.rank)
    return {backend.name: backend.summary for backend in ordered}


def backends() -> tuple[str, ...]:
    """Names of the backends that work on this machine, the fastest first."""
    return tuple(name for name in known_backends() if why_not(name) is None)


def why_not(name: str) -> str | None:
    """Why the backend `name` does not work on this machine; None where it does."""
    return _load(name)[1]


@cache
def _automatic() -> tuple[str, ...]:
    """The backends that `auto` may take, the fastest first. One that is not needed is not imported."""
    return tuple(name for name in known_backends() if _backends[name].rank is not None)


def attend(call: AttentionCall, backend: str = "auto") -> None:
    """Fill `call.out`, and `call.lse` if there is one. Raises ValueError where `backend` cannot run the call."""
    for name in _automatic() if backend == "auto" else (backend,):
        module, reason = _load(name)
        reason = reason or module.unsupported(call)
        if reason is None:
            module.attend(call)
            return
    if backend == "auto":
        reason = "none of the fast ones supports it"
    others = [name for name in backends() if _load(name)[0].unsupported(call) is None]
    raise ValueError(f"backend {backend!r} cannot run this call: {reason}; {', '.join(others) or 'none'} can")


register("cuda", "the teaching kernels on a GPU: naive.py and paged.py", "paged_ref.core.attention.cuda", rank=10)
register("cpu", "the teaching kernels' loop, compiled for a CPU", "paged_ref.core.attention.cpu", rank=30)
register("reference", "plain array code, NumPy or CuPy: the oracle", "paged_ref.core.attention.reference", rank=40)
