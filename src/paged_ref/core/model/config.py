"""What a model is in numbers.

Sizes are counts of elements, `kv_bytes_per_token` is in bytes. Field names are Hugging Face's where the paper and
vLLM have no shorter word: num_layers, num_heads, num_kv_heads, head_size.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import DTypeLike

from ..checks import require


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """One decoder of the Llama family. Raises ValueError, with field and bound, for sizes that cannot be."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False
    sliding_windows: tuple[int | None, ...] = ()  # one for each layer; () becomes (None,) * num_layers
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads")
        require(**{name: (getattr(self, name), 1) for name in (*sizes, "head_size", "max_position_embeddings")})
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads is {self.num_heads}; a multiple of the {self.num_kv_heads} KV heads is needed")
        if self.head_size % 2:
            raise ValueError(f"head_size is {self.head_size}; RoPE turns pairs, so an even number is needed")
        if not self.sliding_windows:
            object.__setattr__(self, "sliding_windows", (None,) * self.num_layers)
        if len(self.sliding_windows) != self.num_layers:
            raise ValueError(f"sliding_windows has length {len(self.sliding_windows)}; num_layers is {self.num_layers}")
        for window in self.sliding_windows:
            if window is not None and window < 1:
                raise ValueError(f"sliding_windows holds {window}; at least 1 is needed (the token itself)")


def kv_bytes_per_token(config: ModelConfig, dtype: DTypeLike) -> int:
    """Bytes of K and V that one token keeps, over all layers (Kwon et al. 2023, §3)."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_size * np.dtype(dtype).itemsize
