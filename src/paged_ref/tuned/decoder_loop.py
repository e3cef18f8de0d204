# mypy: ignore-errors
"""The loop of compiled_decoder.py: from one attention to the next, in rows of whole vectors. It is compiled as
cpu_loop.py is, and made of the same vectors."""

from __future__ import annotations  # noqa: I001  (names of the vectors, several a line)

import math

import numpy as np

from .cpu_machine import LANES
from .cpu_vectors import multiply as times
from .cpu_vectors import add, divide, exp, fold_sum, load, maximum, offset, splat, store, subtract
from .linear_loop import part, product

FLOAT = np.float32
TOGETHER = 32  # rows that go through a layer together: its weights are read once


@part
def norm(x, change, weight, h, num_rows, size, eps, adds):
    """x += change where `adds`; then h = x over its root mean square, times `weight [size]`."""
    for first in range(0, num_rows * size, size):
        squares = splat(FLOAT(0))
        for i in range(first, first + size, LANES):
            now = load(x, i)
            if adds:
                now = add(now, load(change, i))
                store(x, i, now)
            squares = add(squares, times(now, now))
        store(h, first, fold_sum(squares, (0,)))  # of one row: each lane is the sum, which is read below
        root = splat(FLOAT(math.sqrt(h[first] / FLOAT(size) + eps)))
        for d in range(0, size, LANES):
            store(h, first + d, times(divide(load(x, first + d), root), load(weight, d)))


@part
def gate(gate_up, out, num_rows, size):
    """out [num_rows, size] = silu(gate) * up of `gate_up [num_rows, 2 * size]`."""
    zero, one = splat(FLOAT(0)), splat(FLOAT(1))
    for row in range(num_rows):
        for d in range(0, size, LANES):
            x, up = load(gate_up, 2 * row * size + d), load(gate_up, (2 * row + 1) * size + d)
            minus = subtract(zero, x)
            # 1 / (1 + e**-x), with powers up to 0, for which alone `exp` is made
            share = divide(exp(subtract(zero, maximum(minus, zero))), add(one, exp(subtract(zero, maximum(x, minus)))))
            store(out, row * size + d, times(times(x, share), up))


@part
def rotate(x, at, out, to, num_heads, cos, sin, angle, size):
    """RoPE of a token's heads from x[at] on, by the angles from `angle` on, to out[to] and on."""
    half = size // 2
    for first in range(0, num_heads * size, size):
        for d in range(half):
            a, b = x[at + first + d], x[at + first + half + d]
            out[to + first + d] = a * cos[angle + d] + b * sin[angle + d]
            out[to + first + half + d] = b * cos[angle + half + d] + a * sin[angle + half + d]


def between(rows):
    """The function that goes from one layer's attention to the next one's, with blocks of len(rows) rows."""

    def between_attentions(
        ends, begins, first, end, mixed, cos, sin, query, key, value, x, h, narrow, wide,
        hidden, inner, size, num_heads, num_kv_heads, head_size, eps, hidden_places, inner_places, size_places,
        output, mlp_norm, gate_up, down, next_norm, qkv,
    ):  # fmt: skip
        """For tokens `first` to `end - 1`, `first` a whole number of blocks. Where `ends`: what a layer does after its
        attention, `mixed [num_tokens, inner]`. Then the next norm, to h. Where `begins`: what the next layer does
        before its attention, to query, key and value.

        x, h [whole blocks, hidden]; `narrow` and `wide` are for what goes into products and what comes out of them:
        [whole blocks, the largest of their sizes]. The three `_places` are what linear.places gives for these sizes.
        """
        out = (num_heads + 2 * num_kv_heads) * head_size
        for token in range(first, end, TOGETHER):
            num_tokens = min(TOGETHER, end - token)
            num_rows = (num_tokens + len(rows) - 1) // len(rows) * len(rows)
            now, normed = offset(x, token * hidden), offset(h, token * hidden)
            given, found = offset(narrow, token * max(inner, size)), offset(wide, token * max(hidden, 2 * size, out))
            if ends:
                for i in range(0, num_tokens * inner, LANES):
                    store(given, i, load(mixed, token * inner + i))
                for i in range(num_tokens * inner, num_rows * inner, LANES):
                    store(given, i, splat(FLOAT(0)))
                product(0, hidden, given, num_rows, inner, output, hidden, inner_places, found, rows)
                norm(now, found, mlp_norm, normed, num_rows, hidden, eps, True)
                product(0, 2 * size, normed, num_rows, hidden, gate_up, 2 * size, hidden_places, found, rows)
                gate(found, given, num_rows, size)
                product(0, hidden, given, num_rows, size, down, hidden, size_places, found, rows)
            norm(now, found, next_norm, normed, num_rows, hidden, eps, ends != 0)
            if begins:
                product(0, out, normed, num_rows, hidden, qkv, out, hidden_places, found, rows)
                for i in range(num_tokens):
                    at, to, angle = i * out, token + i, (token + i) * head_size
                    rotate(found, at, query, to * num_heads * head_size, num_heads, cos, sin, angle, head_size)
                    at, to = at + num_heads * head_size, to * num_kv_heads * head_size
                    rotate(found, at, key, to, num_kv_heads, cos, sin, angle, head_size)
                    for d in range(num_kv_heads * head_size):
                        value[to + d] = found[at + num_kv_heads * head_size + d]

    return between_attentions
