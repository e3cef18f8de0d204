"""The decoder as training runs it: a forward that saves what backward needs, and backward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ..core.device import Array, on_gpu, xp
from ..core.model.config import ModelConfig
from ..core.model.llama import rope_frequencies
from ..tuned.linear import product
from .backward import (
    causal_attention,
    causal_attention_backward,
    cross_entropy,
    logit_rows,
    rms_norm,
    rms_norm_backward,
    rope,
    swiglu,
    swiglu_backward,
)
from .parameters import LayerViews, Parameters

Saved = dict[str, Array]  # what a layer's backward needs


class Activations(Protocol):
    """Storage for saved activations. Backward loads the last layer first; what is loaded is no longer stored."""

    recompute: bool  # save a layer's input only, and run its forward once more

    def save(self, layer: int, saved: Saved) -> None: ...

    def load(self, layer: int) -> Saved: ...


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Sequences packed one after another. `num_tokens` is the sum of `lengths`."""

    lengths: Sequence[int]  # of each sequence
    inputs: Array  # [num_tokens] token ids
    targets: Array  # [num_tokens] the token that follows each

    @staticmethod
    def of(sequences: Sequence[Sequence[int] | np.ndarray]) -> PackedBatch:
        """Pack token ids. Each id predicts the next one of its sequence, so a sequence has at least two."""
        inputs = np.concatenate([np.asarray(ids[:-1]) for ids in sequences])
        targets = np.concatenate([np.asarray(ids[1:]) for ids in sequences])
        return PackedBatch([len(ids) - 1 for ids in sequences], xp.asarray(inputs), xp.asarray(targets))


class Dropout:
    """Zeroes each element with probability `rate`, and scales the others up (Srivastava et al. 2014).

    The mask of a place is drawn from the key and the place alone, so backward and recomputation draw the mask again
    instead of keeping it.
    """

    def __init__(self, rate: float, key: Sequence[int]) -> None:
        self.rate, self.key = rate, key

    def __call__(self, x: Array, place: int) -> Array:
        """Change `x` in place and return it. `place` numbers the places in the model where dropout happens."""
        cut = round(256 * self.rate)
        if cut:
            seed = np.random.SeedSequence([*self.key, place])
            drawn = xp.asarray(np.random.Generator(np.random.SFC64(seed)).integers(256, size=x.shape, dtype=np.uint8))
            x *= (drawn >= cut) * x.dtype.type(256 / (256 - cut))
        return x


@dataclass(frozen=True, slots=True)
class Pass:
    """What all layers of one forward and backward share."""

    config: ModelConfig
    lengths: Sequence[int]
    cos: Array  # [num_tokens, 1, head_size] as model.llama.rotate wants them
    sin: Array  # [num_tokens, 1, head_size]
    dropout: Dropout


def loss_and_gradient(
    weights: Parameters,
    gradient: Parameters,
    batch: PackedBatch,
    activations: Activations,
    dropout: Dropout | None = None,
    token_weight: float | None = None,
) -> float:
    """The batch's loss in nats; its gradient by the weights is added to `gradient`.

    The loss is the sum over tokens, each times `token_weight`: 1 / num_tokens by default, which makes the mean.
    """
    config, num_tokens = weights.config, batch.inputs.shape[0]
    shared = _shared(weights, batch, dropout)
    x = shared.dropout(weights.embedding[batch.inputs], 0)  # [num_tokens, hidden_size]
    for index, layer in enumerate(weights.layers):
        y, saved = layer_forward(layer, x, shared, index)
        activations.save(index, {"x": x} if activations.recompute else saved)
        x = y
        del y, saved  # only what `activations` keeps stays in memory
    h, inverse = rms_norm(x, weights.final_norm, config.rms_norm_eps)  # [num_tokens, hidden_size]
    token_weight = 1 / num_tokens if token_weight is None else token_weight
    loss, dh, dhead = cross_entropy(h, weights.embedding, batch.targets, token_weight)
    gradient.embedding += dhead
    dx, dnorm = rms_norm_backward(dh, x, inverse, weights.final_norm)  # [num_tokens, hidden_size]
    gradient.final_norm += dnorm
    del h, x, dh
    for index in reversed(range(config.num_layers)):
        saved = activations.load(index)
        if activations.recompute:
            saved = layer_forward(weights.layers[index], saved["x"], shared, index)[1]
        dx = layer_backward(weights.layers[index], gradient.layers[index], dx, saved, shared, index)
        del saved
    _add_rows(gradient.embedding, batch.inputs, shared.dropout(dx, 0))
    return loss


def total_loss(weights: Parameters, batch: PackedBatch) -> float:
    """The sum of the tokens' losses in nats, without dropout. Saves nothing."""
    shared = _shared(weights, batch, None)
    x = weights.embedding[batch.inputs]  # [num_tokens, hidden_size]
    for index, layer in enumerate(weights.layers):
        x = layer_forward(layer, x, shared, index)[0]  # [num_tokens, hidden_size]
    h, _ = rms_norm(x, weights.final_norm, weights.config.rms_norm_eps)  # [num_tokens, hidden_size]
    return cross_entropy(h, weights.embedding, batch.targets, 1.0)[0]


def layer_forward(layer: LayerViews, x: Array, shared: Pass, index: int) -> tuple[Array, Saved]:
    """Layer `index`: x [num_tokens, hidden_size] to the next layer's x, and what the backward of this layer needs."""
    config = shared.config
    eps, num_heads, num_kv_heads = config.rms_norm_eps, config.num_heads, config.num_kv_heads
    num_qk, head_size = num_heads + num_kv_heads, config.head_size  # the heads that RoPE turns
    h, inverse1 = rms_norm(x, layer.attention_norm, eps)  # [num_tokens, hidden_size]
    qkv = product(h, layer.qkv.T).reshape(len(x), -1, head_size)  # [num_tokens, num_qk + num_kv_heads, head_size]
    rope(qkv[:, :num_qk], shared.cos, shared.sin)
    mixed, lse = causal_attention(qkv, shared.lengths, num_heads, num_kv_heads)  # [num_tokens, num_heads, head_size]
    middle = shared.dropout(
        product(mixed.reshape(len(x), -1), layer.output.T), 2 * index + 1
    )  # [num_tokens, hidden_size]
    middle += x
    h, inverse2 = rms_norm(middle, layer.mlp_norm, eps)  # [num_tokens, hidden_size]
    gate_up = product(h, layer.gate_up.T)  # [num_tokens, 2 * intermediate_size]
    y = shared.dropout(product(swiglu(gate_up), layer.down.T), 2 * index + 2)  # [num_tokens, hidden_size]
    y += middle
    saved = {
        "x": x, "inverse1": inverse1, "qkv": qkv, "mixed": mixed, "lse": lse,
        "middle": middle, "inverse2": inverse2, "gate_up": gate_up,
    }  # fmt: skip
    return y, saved


def saved_shapes(config: ModelConfig, num_tokens: int) -> dict[str, tuple[int, ...]]:
    """The shape of each array that `layer_forward` saves."""
    num_heads, num_kv_heads = config.num_heads, config.num_kv_heads
    return {
        "x": (num_tokens, config.hidden_size),
        "inverse1": (num_tokens, 1),
        "qkv": (num_tokens, num_heads + 2 * num_kv_heads, config.head_size),
        "mixed": (num_tokens, num_heads, config.head_size),
        "lse": (num_tokens, num_heads),
        "middle": (num_tokens, config.hidden_size),
        "inverse2": (num_tokens, 1),
        "gate_up": (num_tokens, 2 * config.intermediate_size),
    }


def layer_backward(layer: LayerViews, gradient: LayerViews, dy: Array, saved: Saved, shared: Pass, index: int) -> Array:
    """dx [num_tokens, hidden_size] from `dy` of the same shape; the weights' gradients are added to `gradient`."""
    config = shared.config
    x, middle = saved["x"], saved["middle"]  # [num_tokens, hidden_size]
    num_qk = config.num_heads + config.num_kv_heads

    ddown = shared.dropout(dy.copy(), 2 * index + 2)  # [num_tokens, hidden_size]
    dgate_up, activated = swiglu_backward(
        product(ddown, layer.down), saved["gate_up"]
    )  # [num_tokens, 2 * inter...], half
    gradient.down[...] += product(ddown.T, activated)
    h = middle * saved["inverse2"]  # [num_tokens, hidden_size]
    h *= layer.mlp_norm
    gradient.gate_up[...] += product(dgate_up.T, h)
    dmiddle, dnorm = rms_norm_backward(product(dgate_up, layer.gate_up), middle, saved["inverse2"], layer.mlp_norm)
    gradient.mlp_norm[...] += dnorm
    dmiddle += dy  # [num_tokens, hidden_size]

    doutput = shared.dropout(dmiddle.copy(), 2 * index + 1)  # [num_tokens, hidden_size]
    mixed, lse, qkv = saved["mixed"], saved["lse"], saved["qkv"]
    gradient.output[...] += product(doutput.T, mixed.reshape(len(x), -1))
    dmixed = product(doutput, layer.output).reshape(mixed.shape)  # [num_tokens, num_heads, head_size]
    dqkv = causal_attention_backward(dmixed, qkv, mixed, lse, shared.lengths, config.num_heads, config.num_kv_heads)
    rope(dqkv[:, :num_qk], shared.cos, -shared.sin)  # turned back
    dqkv = dqkv.reshape(len(x), -1)  # [num_tokens, (num_heads + 2 * num_kv_heads) * head_size]
    h = x * saved["inverse1"]  # [num_tokens, hidden_size]
    h *= layer.attention_norm
    gradient.qkv[...] += product(dqkv.T, h)
    dx, dnorm = rms_norm_backward(product(dqkv, layer.qkv), x, saved["inverse1"], layer.attention_norm)
    gradient.attention_norm[...] += dnorm
    dx += dmiddle
    return dx


def _shared(weights: Parameters, batch: PackedBatch, dropout: Dropout | None) -> Pass:
    config, dtype = weights.config, weights.flat.dtype
    positions = xp.asarray(np.concatenate([np.arange(length) for length in batch.lengths]))  # [num_tokens]
    frequencies = xp.asarray(rope_frequencies(config), dtype=np.float32)  # [head_size // 2]
    angles = positions[:, None, None].astype(np.float32) * xp.concatenate([-frequencies, frequencies])
    cos, sin = xp.cos(angles).astype(dtype), xp.sin(angles).astype(dtype)  # [num_tokens, 1, head_size]
    return Pass(config, batch.lengths, cos, sin, dropout or Dropout(0.0, []))


def _add_rows(table: Array, ids: Array, rows: Array) -> None:
    """table[ids[i]] += rows[i], for ids that repeat, in an order that is always the same.

    `table [vocab_size, hidden_size]`, `ids [num_tokens]`, `rows [num_tokens, hidden_size]`.
    """
    if on_gpu:  # atomic adds have no fixed order; a product with ones and zeros has one
        for part in logit_rows(len(ids), len(table)):
            chosen = xp.arange(len(table))[:, None] == ids[part]  # [vocab_size, part]
            table += chosen.astype(rows.dtype) @ rows[part]
        return
    order = np.argsort(ids, kind="stable")
    ids, rows = ids[order], rows[order]
    firsts = np.flatnonzero(np.diff(ids, prepend=-1))  # [number of different ids]
    table[ids[firsts]] += np.add.reduceat(rows, firsts, axis=0)
