"""What `paged-ref bench kernels` measures on a GPU: which shapes, in which order, and what they ask for in memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

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
    ragged: bool = False  # lengths from an eighth of `keys` up to `keys`, else all alike

    @property
    def heads(self) -> tuple[int, int, int]:
        return MODELS[self.model]

    @property
    def array_dtype(self) -> np.dtype[Any]:
        """Of the arrays that hold these numbers."""
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
        _, num_kv_heads, head_size = self.heads
        return 2 * num_kv_heads * head_size * self.array_dtype.itemsize

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
    for model in MODELS:  # the shapes with targets
        yield GpuShape(model, 1, 65536)
        for batch in (64, 256):
            yield from (GpuShape(model, batch, keys) for keys in (4096, 16384))
    for model in MODELS:
        yield GpuShape(model, 64, 4096, ragged=True)
        yield GpuShape(model, 64, 4096, dtype="bfloat16")
        yield from (GpuShape(model, 64, 4096, block_size) for block_size in BLOCK_SIZES)
    for batch in BATCHES:
        for keys in KEYS:
            yield from (GpuShape(model, batch, keys) for model in MODELS)
    for ragged, dtype, block_size in ((True, "float16", 16), (False, "bfloat16", 16), (True, "bfloat16", 16)):
        for batch in BATCHES:
            for keys in KEYS:
                yield from (GpuShape(model, batch, keys, block_size, dtype, ragged) for model in MODELS)
    for block_size in BLOCK_SIZES:
        for batch in BATCHES:
            for keys in KEYS:
                yield from (GpuShape(model, batch, keys, block_size) for model in MODELS)
