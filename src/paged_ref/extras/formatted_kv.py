"""A KV cache in a smaller format than the model's: bfloat16, int8 or float8 (e4m3). `LLM(kv_dtype=...)`.

Numbers are rounded when they are written, and attention decodes them. int8 and float8 have a scale for each layer and
KV head, for K and for V.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..core.attention.attention import Addresses
from ..core.checks import require_one_of
from ..core.device import Array, to_host, xp
from ..core.memory.kv import KVCache
from .formats import BFLOAT16, FLOAT8, FLOAT8_NAN, INT8, MAX_VALUE, choose_scales, encode
from .variants import PLAIN, Variant

FORMATS: dict[str, np.dtype[Any]] = {"bfloat16": BFLOAT16, "int8": INT8, "float8": FLOAT8}
ALIASES = {"fp8": "float8", "fp8_e4m3": "float8"}  # vLLM's names
NANS = {BFLOAT16: 0x7FC0, INT8: 0, FLOAT8: FLOAT8_NAN}  # int8 has none
Scales = Sequence[tuple[Array, Array]]  # for each layer those of K and of V, [num_kv_heads] float32
HEADROOM = 1.5  # of a measured scale: how far later numbers may exceed the first ones before they saturate


def format_of(kv_dtype: str) -> np.dtype[Any] | None:
    """The dtype of the arrays that hold this format; None for all other names."""
    return FORMATS.get(ALIASES.get(kv_dtype, kv_dtype))


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
        scales: Scales = (),
    ) -> None:
        """`scales` are by default measured on the tokens of the first step."""
        require_one_of((*FORMATS, *ALIASES), kv_dtype=kv_dtype)
        self.kv_dtype, stored = kv_dtype, FORMATS[ALIASES.get(kv_dtype, kv_dtype)]
        self.nan = NANS[stored]
        sizes = (num_layers, num_blocks, block_size, num_kv_heads, head_size)
        super().__init__(*sizes, stored.name, num_host_blocks, backend)
        self._measures = stored in MAX_VALUE
        for layer, (key_scales, value_scales) in enumerate(scales):
            self.variants[layer] = Variant(key_scales=key_scales, value_scales=value_scales)

    @property
    def scales(self) -> dict[int, tuple[Array, Array]]:
        """By layer, as far as they are known: those of K and of V, [num_kv_heads] float32."""
        variants = ((layer, variant or PLAIN) for layer, variant in enumerate(self.variants))
        return {layer: (v.key_scales, v.value_scales) for layer, v in variants if v.key_scales is not None}

    def try_backend(self, num_heads: int, dtype: str) -> None:
        """Attend once, on one slot of its own, with `num_heads` queries in `dtype`. Raises ValueError where the backend
        cannot read this format."""
        _, _, _, size, num_kv_heads, head_size = self.device.shape
        one = FormattedKV(1, 1, size, num_kv_heads, head_size, self.kv_dtype, backend=self.backend)
        query, key = (xp.zeros((1, heads, head_size), dtype) for heads in (num_heads, num_kv_heads))
        numbers = [xp.asarray(np.array(value, dtype=np.int32)) for value in ([1], [0, 1], [[0]], [0])]
        seq_lens, query_start_loc, tables, slots = numbers
        try:
            one.attend(0, query, key, key, Addresses(seq_lens, query_start_loc, tables, None, slots), None)
        except ValueError as error:
            raise ValueError(f"kv_dtype is {self.kv_dtype!r}, and {error}") from None

    def _write(self, layer: int, key: Array, value: Array, slot_mapping: Array) -> None:
        keys, values = self.slots[layer]
        variant = self.variants[layer] or PLAIN
        if self._measures and variant.key_scales is None:
            measured = [choose_scales(new, keys.dtype) * xp.float32(HEADROOM) for new in (key, value)]
            variant = replace(variant, key_scales=measured[0], value_scales=measured[1])
            self.variants[layer] = variant
        keys[slot_mapping] = encode(key, keys.dtype, variant.key_scales)
        values[slot_mapping] = encode(value, values.dtype, variant.value_scales)


def read_scales(given: Any, num_layers: int, num_kv_heads: int) -> Scales:
    """The scales, on the device.

    `given` has a pair for each layer: a list, or a mapping from layer to pair, as FormattedKV.scales is. Each of a pair
    is one number for all heads, or one for each. Raises ValueError with the layer, the value and what is needed.
    """
    layers = range(num_layers)
    if isinstance(given, Mapping) and given.keys() == set(layers):
        given = [given[layer] for layer in layers]
    if isinstance(given, Mapping) or not isinstance(given, Sequence) or len(given) != num_layers:
        raise ValueError(f"kv_scales is {reprlib.repr(given)}; a pair for each of the {num_layers} layers is needed")
    found = []
    for layer, pair in enumerate(given):
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
            raise ValueError(f"kv_scales of layer {layer} is {reprlib.repr(pair)}; a pair for K and V is needed")
        found.append((_scales(layer, pair[0], num_kv_heads), _scales(layer, pair[1], num_kv_heads)))
    return found


def _scales(layer: int, given: Any, num_kv_heads: int) -> Array:
    try:
        numbers = np.broadcast_to(np.asarray(to_host(given), dtype=np.float32), (num_kv_heads,))
    except (TypeError, ValueError):
        numbers = np.zeros(1, np.float32)
    if not (np.isfinite(numbers) & (numbers > 0)).all():
        raise ValueError(
            f"kv_scales of layer {layer} holds {reprlib.repr(given)}; a number above 0, or one for each of the "
            f"{num_kv_heads} KV heads, is needed"
        )
    return xp.asarray(numbers.copy())
