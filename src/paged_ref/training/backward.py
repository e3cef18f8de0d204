"""Each part of the decoder forwards, as training runs it, and its gradient, written by hand.

A batch is packed: the tokens of all sequences, one after another, `num_tokens` in all. `x` of a function is
its input, `dy` the gradient of the loss by its output, `dx` by its input. A forward returns what its gradient
needs beside the input; activations.py decides where to keep it. All functions run on NumPy and CuPy, in the dtype of
their inputs (float32; float64 in tests).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from itertools import groupby

import numpy as np

from ..core.device import Array, on_gpu, xp
from ..core.model.llama import rotate
from ..tuned.linear import product

QUERY_CHUNK = 64  # queries whose scores exist at the same time; keys after the last of them are not read
SCORES = 2**27 if on_gpu else 2**18  # scores that exist at the same time; on a CPU they fit a core's cache
ROWS = 2**20 if on_gpu else 2**7  # tokens of one pass of elementwise operations
LOGITS = 2**27 if on_gpu else 2**20  # logits that exist at the same time


def rms_norm(x: Array, weight: Array, eps: float) -> tuple[Array, Array]:
    """y = x · inverse · weight, and inverse = 1 / RMS of each row: [num_tokens, hidden_size], [num_tokens, 1]."""
    mean_square = xp.einsum("th,th->t", x, x)[:, None] / x.shape[1]  # [num_tokens, 1]
    inverse = 1 / xp.sqrt(mean_square + eps)  # [num_tokens, 1]
    y = x * inverse  # [num_tokens, hidden_size]
    y *= weight
    return y, inverse


def rms_norm_backward(dy: Array, x: Array, inverse: Array, weight: Array) -> tuple[Array, Array]:
    """dx [num_tokens, hidden_size] and dweight [hidden_size].

    With n = x · inverse and dn = dy · weight: dx = inverse · (dn − n · mean(dn · n)), since each x of a row
    also moves the row's RMS.
    """
    n = x * inverse  # [num_tokens, hidden_size]
    dweight = xp.einsum("th,th->h", dy, n)  # [hidden_size]
    dx = dy * weight  # [num_tokens, hidden_size]; dn so far
    n *= xp.einsum("th,th->t", dx, n)[:, None] / x.shape[1]
    dx -= n
    dx *= inverse
    return dx, dweight


def rope(x: Array, cos: Array, sin: Array) -> None:
    """Turn each head of `x [num_tokens, heads, head_size]` in place, as model.llama.rotate does.

    `cos`, `sin [num_tokens, 1, head_size]`. With −sin it turns back, which is its gradient.
    """
    for rows in row_blocks(len(x)):
        x[rows] = rotate(x[rows], cos[rows], sin[rows])


def swiglu(gate_up: Array) -> Array:
    """silu(gate) · up: [num_tokens, 2 * intermediate_size] to [num_tokens, intermediate_size] (Shazeer 2020)."""
    num_tokens, size = len(gate_up), gate_up.shape[1] // 2
    y = xp.empty((num_tokens, size), dtype=gate_up.dtype)
    for rows in row_blocks(num_tokens):
        gate, up = gate_up[rows, :size], gate_up[rows, size:]  # [rows, intermediate_size] each
        s = _sigmoid(gate, out=y[rows])  # [rows, intermediate_size]
        s *= gate
        s *= up
    return y


def swiglu_backward(dy: Array, gate_up: Array) -> tuple[Array, Array]:
    """dgate_up [num_tokens, 2 * intermediate_size], and y, which is cheaper to compute again than to keep.

    silu'(g) = s · (1 + g · (1 − s)) with s = sigmoid(g).
    """
    num_tokens, size = dy.shape
    dgate_up, y = xp.empty_like(gate_up), xp.empty_like(dy)
    for rows in row_blocks(num_tokens):
        gate, up = gate_up[rows, :size], gate_up[rows, size:]  # [rows, intermediate_size] each
        dgate, dup = dgate_up[rows, :size], dgate_up[rows, size:]  # [rows, intermediate_size] each
        s = _sigmoid(gate)  # [rows, intermediate_size]
        silu = xp.multiply(gate, s, out=y[rows])
        xp.multiply(dy[rows], silu, out=dup)
        xp.subtract(1, s, out=dgate)
        dgate *= silu
        dgate += s  # silu'(gate)
        dgate *= up
        dgate *= dy[rows]
        silu *= up
    return dgate_up, y


def row_blocks(num_rows: int) -> Iterator[slice]:
    """All rows in parts that fit the cache, so that a chain of operations reads them from there."""
    return (slice(first, first + ROWS) for first in range(0, num_rows, ROWS))


def logit_rows(num_rows: int, vocab_size: int) -> Iterator[slice]:
    """All rows in parts with at most LOGITS logits, or of one row."""
    count = max(1, LOGITS // vocab_size)
    return (slice(first, first + count) for first in range(0, num_rows, count))


def _sigmoid(x: Array, out: Array | None = None) -> Array:
    y = xp.negative(x, out=out)
    with np.errstate(over="ignore"):  # exp(-x) = inf is right: 1 / inf is 0
        xp.exp(y, out=y)
    y += 1
    return xp.divide(1, y, out=y)


def causal_attention(qkv: Array, lengths: Sequence[int], num_heads: int, num_kv_heads: int) -> tuple[Array, Array]:
    """Attention of each sequence to itself: output [num_tokens, num_heads, head_size], lse [num_tokens, num_heads].

    `qkv [num_tokens, num_heads + 2 * num_kv_heads, head_size]`, q and k turned by RoPE. Query head h reads
    KV head h // (num_heads // num_kv_heads). `lse` is the log of the sum that softmax divides by. From it the
    gradient computes the probabilities again, so that memory grows with the number of tokens and not with its square
    (Dao et al. 2022).
    """
    num_tokens, head_size = qkv.shape[0], qkv.shape[2]
    scale = head_size**-0.5
    mixed = xp.empty((num_tokens, num_heads, head_size), dtype=qkv.dtype)
    lse = xp.empty((num_tokens, num_heads), dtype=qkv.dtype)
    for rows, count, length in _equal_lengths(lengths, num_heads):
        query, key, value = _split(qkv[rows], count, num_heads, num_kv_heads)
        mixed_of = _by_head(mixed[rows], count, num_kv_heads)  # [count, num_kv_heads, group, length, head_size]
        lse_of = _by_head(lse[rows], count, num_kv_heads)  # [count, num_kv_heads, group, length]
        for first in range(0, length, QUERY_CHUNK):
            last = min(first + QUERY_CHUNK, length)
            chunk = _rows(query[:, :, :, first:last]) * scale  # [count, num_kv_heads, group * chunk, head_size]
            p = _scores(chunk, key[:, :, :last], first)  # [count, num_kv_heads, group * chunk, last]
            highest = p.max(axis=-1, keepdims=True)  # [count, num_kv_heads, group * chunk, 1]
            p -= highest
            xp.exp(p, out=p)
            total = p.sum(axis=-1, keepdims=True)  # [count, num_kv_heads, group * chunk, 1]
            y = p @ value[:, :, :last]  # [count, num_kv_heads, group * chunk, head_size]
            y /= total
            part = mixed_of[:, :, :, first:last]
            part[...] = y.reshape(part.shape)
            part = lse_of[:, :, :, first:last]
            part[...] = (highest + xp.log(total)).reshape(part.shape)
    return mixed, lse


def causal_attention_backward(
    dmixed: Array, qkv: Array, mixed: Array, lse: Array, lengths: Sequence[int], num_heads: int, num_kv_heads: int
) -> Array:
    """dqkv, in the shape of `qkv`. `dmixed` is in the shape of `mixed`.

    With p = exp(scores − lse): dv = pᵀ dy, dp = dy vᵀ, dscores = p · (dp − sum over keys of dp · p), and that
    sum is dy · y of the row. The heads of a group add up in their KV head.
    """
    dqkv = xp.zeros_like(qkv)
    delta = xp.einsum("thd,thd->th", dmixed, mixed)  # [num_tokens, num_heads]
    scale = qkv.shape[2] ** -0.5
    for rows, count, length in _equal_lengths(lengths, num_heads):
        query, key, value = _split(qkv[rows], count, num_heads, num_kv_heads)
        dquery, dkey, dvalue = _split(dqkv[rows], count, num_heads, num_kv_heads)
        dy_of = _by_head(dmixed[rows], count, num_kv_heads)  # [count, num_kv_heads, group, length, head_size]
        lse_of = _by_head(lse[rows], count, num_kv_heads)  # [count, num_kv_heads, group, length]
        delta_of = _by_head(delta[rows], count, num_kv_heads)  # [count, num_kv_heads, group, length]
        for first in range(0, length, QUERY_CHUNK):
            last = min(first + QUERY_CHUNK, length)
            chunk = _rows(query[:, :, :, first:last]) * scale  # [count, num_kv_heads, group * chunk, head_size]
            dy = _rows(dy_of[:, :, :, first:last])  # [count, num_kv_heads, group * chunk, head_size]
            p = _scores(chunk, key[:, :, :last], first)  # [count, num_kv_heads, group * chunk, last]
            p -= lse_of[:, :, :, first:last].reshape(*p.shape[:3], 1)
            xp.exp(p, out=p)
            dvalue[:, :, :last] += p.swapaxes(2, 3) @ dy
            dscores = dy @ value[:, :, :last].swapaxes(2, 3)  # [count, num_kv_heads, group * chunk, last]
            dscores -= delta_of[:, :, :, first:last].reshape(*p.shape[:3], 1)
            dscores *= p
            part = dquery[:, :, :, first:last]
            part[...] = (dscores @ key[:, :, :last]).reshape(part.shape)  # by the scaled query
            part *= scale
            dkey[:, :, :last] += dscores.swapaxes(2, 3) @ chunk
    return dqkv


def _equal_lengths(lengths: Sequence[int], num_heads: int) -> Iterator[tuple[slice, int, int]]:
    """Neighbours of one length, which are computed together: their rows, how many sequences, and the length."""
    row = 0
    for length, group in groupby(lengths):
        left = len(list(group))
        most = max(1, SCORES // (num_heads * min(QUERY_CHUNK, length) * length))
        while left:
            count = min(left, most)
            yield slice(row, row + count * length), count, length
            row += count * length
            left -= count


def _by_head(x: Array, count: int, num_kv_heads: int) -> Array:
    """A view of [count * length, num_heads, ...] as [count, num_kv_heads, group, length, ...]."""
    shaped = x.reshape(count, -1, num_kv_heads, x.shape[1] // num_kv_heads, *x.shape[2:])
    return shaped.swapaxes(1, 2).swapaxes(2, 3)


def _split(qkv: Array, count: int, num_heads: int, num_kv_heads: int) -> tuple[Array, Array, Array]:
    """Views: query [count, num_kv_heads, group, length, head_size]; key, value without `group`."""
    cuts = num_heads, num_heads + num_kv_heads
    query = _by_head(qkv[:, : cuts[0]], count, num_kv_heads)
    key, value = (
        _by_head(part, count, num_kv_heads)[:, :, 0] for part in (qkv[:, cuts[0] : cuts[1]], qkv[:, cuts[1] :])
    )
    return query, key, value


def _rows(x: Array) -> Array:
    """[count, num_kv_heads, group, chunk, head_size] to [count, num_kv_heads, group * chunk, head_size]."""
    return x.reshape(*x.shape[:2], -1, x.shape[4])


def _scores(chunk: Array, key: Array, first: int) -> Array:
    """Scaled and masked scores of queries `first` and on: [count, num_kv_heads, group * chunk, last]."""
    scores = chunk @ key.swapaxes(2, 3)
    size = key.shape[2] - first  # queries of the chunk
    square = scores.reshape(*scores.shape[:2], -1, size, key.shape[2])[..., first:]  # its own keys
    square += _future(size, scores.dtype)
    return scores


@cache
def _future(size: int, dtype: np.dtype) -> Array:
    """−inf where a key comes after its query, else 0: [size, size]."""
    return xp.triu(xp.full((size, size), -xp.inf, dtype=dtype), 1)


def cross_entropy(h: Array, head: Array, targets: Array, token_weight: float) -> tuple[float, Array, Array]:
    """The head and its loss in one, with both gradients: loss, dh [num_tokens, hidden_size], dhead as `head`.

    `head [vocab_size, hidden_size]`, `targets [num_tokens]` token ids. The loss is `token_weight` times the
    sum over tokens of −ln(probability of the target). Logits are computed for a part of the rows, then the next: all
    together they would be the largest array of all.
    """
    dh, dhead, loss = xp.empty_like(h), xp.zeros_like(head), xp.zeros((), dtype=np.float64)
    for rows in logit_rows(h.shape[0], head.shape[0]):
        p = product(h[rows], head.T)  # [rows, vocab_size]; logits so far
        target = xp.arange(p.shape[0]), targets[rows]
        p -= p.max(axis=1, keepdims=True)
        chosen = p[target]  # [rows]
        xp.exp(p, out=p)
        total = p.sum(axis=1, keepdims=True)  # [rows, 1]
        loss += (xp.log(total[:, 0]) - chosen).sum(dtype=np.float64)
        p *= token_weight / total
        p[target] -= token_weight  # dlogits
        dh[rows] = product(p, head)
        dhead += product(p.T, h[rows])
    return token_weight * float(loss), dh, dhead
