"""The decoder of core/model/llama.py for small models on a CPU: one compiled call from one attention to the next.

A layer of a small model takes less time to compute than Python takes from one array function to the next: the weights
have just pushed what Python needs out of the CPU's caches. So all that stands between two attentions is one call, in
one thread for a few rows. The layers' weights lie in the order in which they are read, in memory of large pages.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..core.device import Array
from ..core.model.llama import AttendingKV, Layer, Llama, StepInputs
from . import cpu_code
from .cpu_machine import LANES
from .host_arrays import address, in_lines, whole_lines
from .linear import FEW, LARGE, PARALLEL, WHOLE, linear, places
from .threads import in_turns, num_threads

ROWS = LANES // 2  # that the loop takes at a time, as in linear.py
MOST = PARALLEL // FEW  # numbers of a matrix: if one is larger, linear.py's threads share its products of a few rows
PIECE = 1 << 22  # numbers of memory that NumPy asks large pages for


def can_compile(decoder: Llama) -> bool:
    """Whether CompiledDecoder is for this decoder, on this machine."""
    if type(decoder) is not Llama or decoder.dtype != np.float32 or decoder.linear is not linear:
        return False
    matrices = [matrix for layer in decoder.layers for matrix in _matrices(layer)]
    whole = all(size % WHOLE == 0 for matrix in matrices for size in matrix.shape)
    return whole and max(matrix.size for matrix in matrices) <= MOST and cpu_code.unavailable() is None


class CompiledDecoder(Llama):
    """Another decoder's weights, and the same tokens (`can_compile`). A row's bits depend on nothing but the row."""

    def __init__(self, decoder: Llama) -> None:
        vars(self).update(vars(decoder))  # all that Llama.__init__ made
        _move_together(self.layers)
        config, size, first = self.config, self.config.intermediate_size, self.layers[0]
        hidden, inner = config.hidden_size, config.num_heads * config.head_size
        self._widths = hidden, hidden, max(inner, size), max(hidden, 2 * size, len(first.qkv))  # x, h, narrow, wide
        self._sizes = (
            hidden, inner, size, config.num_heads, config.num_kv_heads, config.head_size, config.rms_norm_eps,
            *map(address, map(places, (hidden, inner, size))),
        )  # fmt: skip
        norms = [*(layer.attention_norm for layer in self.layers), self.final_norm]
        before, after = [first, *self.layers], [*self.layers, first]  # the layers around each norm
        self._weights = [
            tuple(map(address, (a.output, a.mlp_norm, a.gate_up, a.down, norm, b.qkv)))
            for a, norm, b in zip(before, norms, after, strict=True)
        ]
        self._layer_size = sum(matrix.size for matrix in _matrices(first))

    def forward(self, inputs: StepInputs, kv: AttendingKV) -> Array:
        """As Llama.forward: logits [num_rows, vocab_size], float32."""
        if self.linear is not linear:  # another product was set
            return super().forward(inputs, kv)
        config, num_tokens = self.config, len(inputs.token_ids)
        block = 2 if num_tokens <= 2 and self._layer_size >= LARGE else ROWS
        rows = [in_lines(-(-num_tokens // block) * block, width) for width in self._widths]
        x, h = rows[:2]  # as in Llama.forward; zeros after the last token
        x[:num_tokens], x[num_tokens:] = self.embedding[inputs.token_ids], 0
        heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        query, key, value = (np.empty((num_tokens, count, config.head_size), np.float32) for count in heads)
        arrays = [*self.turns(inputs.positions), query, key, value, *rows]
        given, between = (*map(address, arrays), *self._sizes), cpu_code.function("between", "float32", block)

        def part(first: int, end: int, index: int, mixed: Array, *alive: Any) -> None:  # alive: until all threads end
            ends, begins = index > 0, index < config.num_layers
            between(ends, begins, first, end, address(mixed), *given, *self._weights[index])

        parallel, mixed = num_tokens * self._layer_size >= PARALLEL and num_threads() > 1, query
        for index, window in enumerate((*config.sliding_windows, None)):
            if parallel:
                in_turns(part, num_tokens, FEW, index, mixed, arrays)
            else:
                part(0, num_tokens, index, mixed)
            if index < config.num_layers:
                mixed = kv.attend(index, query, key, value, inputs.addresses, window)  # the query's shape
                mixed = np.ascontiguousarray(mixed, np.float32)
        return self.linear(h[inputs.logits_rows], self.head)


def _matrices(layer: Layer) -> list[np.ndarray]:
    return [layer.qkv, layer.output, layer.gate_up, layer.down]


def _move_together(layers: list[Layer]) -> None:
    """Move the layers' weights into memory of large pages, in the order in which a step reads them."""
    memory = np.empty(0, np.float32)
    for layer in layers:
        for name in layer.__slots__:
            array = getattr(layer, name)
            size = whole_lines(array.size)
            if size > len(memory):
                (memory,) = in_lines(1, max(size, PIECE))
            place, memory = memory[: array.size].reshape(array.shape), memory[size:]
            place[...] = array
            setattr(layer, name, place)
