"""The batches that `paged-ref bench kernels` measures, and how much memory they need."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
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
HEADS = MODELS | {"embedded": (8, 4, 16)}  # the last is measured on a CPU only
BATCHES = (1, 8, 64, 256)
KEYS = (256, 1024, 4096, 16384, 65536)
BLOCK_SIZES = (16, 8, 32, 64, 128)


@dataclass(frozen=True)
class Shape:
    """One batch, for one layer of a model."""

    model: str
    batch: int
    keys: int  # of the longest sequence
    block_size: int = 16
    dtype: str = "float16"  # or bfloat16, float32
    ragged: bool = False  # lengths from an eighth of `keys` up to `keys`, else all the same
    query_len: int = 1  # new tokens of each sequence, the last of its keys

    @property
    def heads(self) -> tuple[int, int, int]:
        return HEADS[self.model]

    @property
    def array_dtype(self) -> np.dtype[Any]:
        """The type of the arrays that hold these numbers."""
        return BFLOAT16 if self.dtype == "bfloat16" else np.dtype(self.dtype)

    @property
    def tolerance(self) -> float:
        """How far a right answer may be from the reference, by rounding."""
        return 1e-4 if self.dtype == "float32" else 1e-2

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


def gpu_shapes() -> Iterator[Shape]:
    """All shapes for a GPU, each once, those that matter most first: a time budget cuts off the end."""
    yield from dict.fromkeys(_by_weight())


def _by_weight() -> Iterator[Shape]:
    for model in MODELS:  # these have targets
        yield Shape(model, 1, 65536)
        for batch, keys in product((64, 256), (4096, 16384)):
            yield Shape(model, batch, keys)
    for model in MODELS:
        yield Shape(model, 64, 4096, ragged=True)
        yield Shape(model, 64, 4096, dtype="bfloat16")
        yield from (Shape(model, 64, 4096, block_size) for block_size in BLOCK_SIZES)
    kinds = [
        (16, "float16", False), (16, "float16", True), (16, "bfloat16", False), (16, "bfloat16", True),
        *((block_size, "float16", False) for block_size in BLOCK_SIZES),
    ]  # fmt: skip
    for kind, batch, keys, model in product(kinds, BATCHES, KEYS, MODELS):
        yield Shape(model, batch, keys, *kind)
