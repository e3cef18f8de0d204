"""What `paged-ref bench kernels` measures on a GPU: which shapes, in which order, and how much memory they need."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from ..core.model.config import ModelConfig, kv_bytes_per_token
from ..extras.formats import BFLOAT16

# (query heads, KV heads, head size)
MODELS = {
    "Llama-3-8B": (32, 8, 128),
    "Llama-2-7B": (32, 32, 128),
    "Qwen2.5-0.5B": (14, 2, 64),
    "Llama-3-70B, one of 8": (8, 1, 128),
}
BATCHES = (1, 8, 64, 256)
KEYS = (256, 1024, 4096, 16384, 65536)
BLOCK_SIZES = (16, 8, 32, 64, 128)


@dataclass(frozen=True)
class GpuShape:
    """One decode batch, one query token for each sequence."""

    model: str
    batch: int
    keys: int  # of the longest sequence
    block_size: int = 16
    dtype: str = "float16"  # or bfloat16
    ragged: bool = False  # lengths from an eighth of `keys` up to `keys`, else all the same

    @property
    def heads(self) -> tuple[int, int, int]:
        return MODELS[self.model]

    @property
    def array_dtype(self) -> np.dtype[Any]:
        """The type of the arrays that hold these numbers."""
        return BFLOAT16 if self.dtype == "bfloat16" else np.dtype(self.dtype)

    def seq_lens(self) -> np.ndarray[Any, np.dtype[np.int32]]:
        """Keys of each sequence, int32 [batch]."""
        if not self.ragged:
            return np.full(self.batch, self.keys, np.int32)
        lens = np.random.default_rng(0).integers(self.keys // 8, self.keys, self.batch, dtype=np.int32, endpoint=True)
        lens[-1] = self.keys
        return lens

    @property
    def token_bytes(self) -> int:
        """K and V of one token."""
        return kv_bytes_per_token(one_layer(*self.heads), self.array_dtype)

    @property
    def bytes_read(self) -> int:
        """K and V of all sequences, once."""
        return int(self.seq_lens().sum(dtype=np.int64)) * self.token_bytes

    @property
    def bytes_held(self) -> int:
        """Each sequence has whole blocks up to `keys`."""
        return self.batch * -(-self.keys // self.block_size) * self.block_size * self.token_bytes

    def __str__(self) -> str:
        ragged = ", ragged" if self.ragged else ""
        return f"{self.model}: {self.batch} x {self.keys} keys, blocks of {self.block_size}, {self.dtype}{ragged}"


def shapes() -> Iterator[GpuShape]:
    """All shapes, each once, those that matter most first: a time budget cuts off the end."""
    seen: set[GpuShape] = set()
    for shape in _by_weight():
        if shape not in seen:
            seen.add(shape)
            yield shape


def _by_weight() -> Iterator[GpuShape]:
    yield from _with_targets()
    for model in MODELS:
        yield GpuShape(model, 64, 4096, ragged=True)
        yield GpuShape(model, 64, 4096, dtype="bfloat16")
        yield from (GpuShape(model, 64, 4096, block_size) for block_size in BLOCK_SIZES)
    kinds = [
        (16, "float16", False), (16, "float16", True), (16, "bfloat16", False), (16, "bfloat16", True),
        *((block_size, "float16", False) for block_size in BLOCK_SIZES),
    ]  # fmt: skip
    for kind, batch, keys, model in product(kinds, BATCHES, KEYS, MODELS):
        yield GpuShape(model, batch, keys, *kind)


def _with_targets() -> Iterator[GpuShape]:
    for model in MODELS:
        yield GpuShape(model, 1, 65536)
        for batch, keys in product((64, 256), (4096, 16384)):
            yield GpuShape(model, batch, keys)


def one_layer(num_heads: int, num_kv_heads: int, head_size: int) -> ModelConfig:
    """A model of one layer with these heads; its other sizes do not matter here."""
    return ModelConfig(
        vocab_size=1, hidden_size=1, intermediate_size=1, num_layers=1, num_heads=num_heads,
        num_kv_heads=num_kv_heads, head_size=head_size, max_position_embeddings=1,
    )  # fmt: skip
