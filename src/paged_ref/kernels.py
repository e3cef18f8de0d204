"""The kernels, importable on their own: arrays in, arrays out, no engine."""

from . import tracer, tuned  # each makes its backends known
from .core.attention.addressing import slot_of
from .core.attention.attention import backends, why_not
from .interop.cache_api import copy_blocks, write_kv
from .interop.kernel_api import merge_states, naive_attention, paged_attention

__all__ = [
    "backends",
    "copy_blocks",
    "merge_states",
    "naive_attention",
    "paged_attention",
    "slot_of",
    "tracer",
    "tuned",
    "why_not",
    "write_kv",
]
