"""paged_ref: PagedAttention to read, run, single-step and import.

    from paged_ref import LLM, SamplingParams
    from paged_ref.kernels import paged_attention

The names load on first use, so that `import paged_ref` starts no compiler and touches no GPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .core.engine.outputs import RequestOutput, SequenceOutput
    from .extras.sampling_params import SamplingParams
    from .llm import LLM

__version__ = "0.1.0"
__all__ = ["LLM", "RequestOutput", "SamplingParams", "SequenceOutput", "__version__"]

_HOME = {
    "LLM": "paged_ref.llm",
    "RequestOutput": "paged_ref.core.engine.outputs",
    "SequenceOutput": "paged_ref.core.engine.outputs",
    "SamplingParams": "paged_ref.extras.sampling_params",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'paged_ref' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOME[name]), name)
