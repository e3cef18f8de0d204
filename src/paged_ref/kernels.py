"""The kernels, importable on their own: arrays in, arrays out, no engine."""

from .core.attention.addressing import slot_of
from .core.attention.attention import backends, naive_attention, paged_attention, why_not
from .core.attention.write import copy_blocks, merge_states, write_kv

__all__ = [
    "backends",
    "copy_blocks",
    "merge_states",
    "naive_attention",
    "paged_attention",
    "slot_of",
    "why_not",
    "write_kv",
]
