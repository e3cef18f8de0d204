"""A KV cache in a smaller format than the model's: bfloat16, int8 or float8 (e4m3). `LLM(kv_dtype=...)`.

Numbers are rounded when they are written, and attention decodes them. int8 and float8 have a scale for each layer and
KV head, for K and for V.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..core.checks import require_one_of
from ..core.device import Array, xp
from ..core.memory.kv import KVCache
from .formats import BFLOAT16, FLOAT8, FLOAT8_NAN, INT8, choose_scales, encode
from .variants import PLAIN, Variant

FORMATS: dict[str, np.dtype[Any]] = {"bfloat16": BFLOAT16, "int8": INT8, "float8": FLOAT8}
NANS = {"bfloat16": 0x7FC0, "int8": 0, "float8": FLOAT8_NAN}  # int8 has none
HEADROOM = 1.5  # of a measured scale: how far later numbers may exceed the first ones before they saturate


class FormattedKV(KVCache):
    """A KVCache whose arrays hold the bits of a format of `FORMATS`."""

    def __init__(
        self,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_size: int,
        kv_dtype: str,
        num_host_blocks: int = 0,
        backend: str = "auto",
        scales: Sequence[tuple[Array, Array]] = (),
    ) -> None:
        """`scales`: for each layer those of K and of V, [num_kv_heads] float32; by default they are measured on the
        tokens of the first step."""
        require_one_of(tuple(FORMATS), kv_dtype=kv_dtype)
        self.nan = NANS[kv_dtype]
        sizes = (num_layers, num_blocks, block_size, num_kv_heads, head_size)
        super().__init__(*sizes, FORMATS[kv_dtype].name, num_host_blocks, backend)
        self._measures = kv_dtype != "bfloat16"
        for layer, (key_scales, value_scales) in enumerate(scales):
            self.variants[layer] = Variant(key_scales=key_scales, value_scales=value_scales)

    @property
    def scales(self) -> dict[int, tuple[Array, Array]]:
        """By layer, as far as they are known: those of K and of V, [num_kv_heads] float32."""
        variants = ((layer, variant or PLAIN) for layer, variant in enumerate(self.variants))
        return {layer: (v.key_scales, v.value_scales) for layer, v in variants if v.key_scales is not None}

    def _write(self, layer: int, key: Array, value: Array, slot_mapping: Array) -> None:
        keys, values = self.slots[layer]
        variant = self.variants[layer] or PLAIN
        if self._measures and variant.key_scales is None:
            measured = [choose_scales(new, keys.dtype) * xp.float32(HEADROOM) for new in (key, value)]
            variant = replace(variant, key_scales=measured[0], value_scales=measured[1])
            self.variants[layer] = variant
        keys[slot_mapping] = encode(key, keys.dtype, variant.key_scales)
        values[slot_mapping] = encode(value, values.dtype, variant.value_scales)
