"""The Llama decoder in array code.

The decoder asks memory for one thing, `kv.attend`; tables and slots are none of its business. In the shapes,
`num_tokens` counts the new tokens of all sequences in a step, packed one sequence after another, so prefill and decode
are the same code. The other names are fields of ModelConfig.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ..attention.attention import Addresses
from ..checks import require_one_of
from ..device import Array, xp
from .config import ModelConfig


@dataclass(frozen=True, slots=True)
class StepInputs:
    """All that the forward pass of one step needs to know beside the weights. Integer arrays."""

    token_ids: Array  # [num_tokens]
    positions: Array  # [num_tokens] place of each token in its sequence
    logits_rows: Array  # [num_rows] the tokens whose logits are wanted: mostly the last of each sequence
    addresses: Addresses  # where the K and V of these tokens and of those before them lie


class AttendingKV(Protocol):
    """K and V of all layers: the one thing that the decoder asks of memory."""

    def attend(
        self, layer: int, query: Array, key: Array, value: Array, addresses: Addresses, window: int | None
    ) -> Array:
        """Write this step's K and V of one layer, then attend: [num_tokens, num_heads, head_size].

        `query [num_tokens, num_heads, head_size]`, `key, value [num_tokens, num_kv_heads, head_size]`; a query sees
        the last `window` keys up to its own (None: all of them).
        """


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """`x` over its root mean square, times `weight`; last axis, in float32 (Zhang & Sennrich 2019)."""
    wide = x.astype(np.float32, copy=False)
    mean_square = (wide * wide).sum(axis=-1, keepdims=True) / x.shape[-1]  # half the calls of xp.mean
    return (wide / xp.sqrt(mean_square + np.float32(eps))).astype(x.dtype, copy=False) * weight


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """RoPE: turn pair i of each head, (x[i], x[i + head_size // 2]), by its token's angle (Su et al. 2021).

    `x [num_tokens, heads, head_size]`; `cos` and `sin [num_tokens, 1, head_size]` of minus the angle for the first
    half and of the angle for the second, so that one expression serves both. Hugging Face's pairing; Meta's own files
    pair neighbours, which conversion to Hugging Face permutes away.
    """
    half = x.shape[-1] // 2
    partner = xp.concatenate([x[..., half:], x[..., :half]], axis=-1)  # [num_tokens, heads, head_size]
    return x * cos + partner * sin


def gated(gate_up: Array) -> Array:
    """silu(gate) · up, where `gate_up [num_tokens, 2 * intermediate_size]` holds both side by side."""
    size = gate_up.shape[1] // 2
    gate, up = gate_up[:, :size], gate_up[:, size:]  # [num_tokens, intermediate_size] each
    with np.errstate(over="ignore"):  # exp(-x) = inf is right: x / inf is 0
        return gate / (1 + xp.exp(-gate)) * up


def linear(x: Array, weight: Array) -> Array:
    """`x [rows, in]` times `weight [out, in]`: [rows, out]. A model may be given a faster one."""
    return x @ weight.T


def rope_frequencies(config: ModelConfig) -> np.ndarray:
    """Radians that each pair of a head turns by from one position to the next: [head_size // 2] float64.

    theta^(-2i / head_size) (Su et al. 2021).
    """
    exponents = np.arange(0, config.head_size, 2) / config.head_size  # [head_size // 2]
    frequencies: np.ndarray = config.rope_theta**-exponents  # [head_size // 2]
    return frequencies


@dataclass(slots=True)
class Layer:
    """One layer's weights, [out, in] as in the file. What reads the same input is joined: four products."""

    attention_norm: Array  # [hidden_size]
    qkv: Array  # [(num_heads + 2 * num_kv_heads) * head_size, hidden_size]
    output: Array  # [hidden_size, num_heads * head_size]
    mlp_norm: Array  # [hidden_size]
    gate_up: Array  # [2 * intermediate_size, hidden_size]
    down: Array  # [hidden_size, intermediate_size]


class Llama:
    """A decoder with its weights on the device.

    `weights` holds arrays under Hugging Face's names. They are copied, one layer at a time, so with a mapping that
    reads from disk there is never a second model.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, np.ndarray],
        dtype: str = "float32",
        linear: Callable[[Array, Array], Array] = linear,
    ) -> None:
        self.config, self.linear = config, linear
        require_one_of(("float16", "float32"), dtype=dtype)
        self.dtype = np.dtype(dtype)
        self.embedding = self.take(weights, "model.embed_tokens.weight")  # [vocab_size, hidden_size]
        self.layers = [self.read_layer(weights, f"model.layers.{index}") for index in range(config.num_layers)]
        self.final_norm = self.take(weights, "model.norm.weight")  # [hidden_size]
        tied = config.tie_word_embeddings
        self.head = self.embedding if tied else self.take(weights, "lm_head.weight")  # [vocab_size, hidden_size]
        frequencies = xp.asarray(self.frequencies(), dtype=np.float32)  # [head_size // 2]
        self._turns = xp.concatenate([-frequencies, frequencies])  # [head_size], as `rotate` wants them

    def take(self, weights: Mapping[str, np.ndarray], *names: str) -> Array:
        """The named weights, joined along their first axis, on the device and in the model's dtype."""
        return xp.concatenate([xp.asarray(weights[name]) for name in names], dtype=self.dtype)

    def read_layer(self, weights: Mapping[str, np.ndarray], at: str) -> Any:
        """The layer whose names begin with `at`."""
        return Layer(
            attention_norm=self.take(weights, f"{at}.input_layernorm.weight"),
            qkv=self.take(weights, *(f"{at}.self_attn.{name}_proj.weight" for name in "qkv")),
            output=self.take(weights, f"{at}.self_attn.o_proj.weight"),
            mlp_norm=self.take(weights, f"{at}.post_attention_layernorm.weight"),
            gate_up=self.take(weights, f"{at}.mlp.gate_proj.weight", f"{at}.mlp.up_proj.weight"),
            down=self.take(weights, f"{at}.mlp.down_proj.weight"),
        )

    def frequencies(self) -> np.ndarray:
        """RoPE's frequencies: [head_size // 2]."""
        return rope_frequencies(self.config)

    def forward(self, inputs: StepInputs, kv: AttendingKV) -> Array:
        """One step: write the new tokens' K and V, and give logits [num_rows, vocab_size], float32.

        Nothing is checked: the inputs' maker stands for them.
        """
        config, eps, num_tokens = self.config, self.config.rms_norm_eps, len(inputs.token_ids)
        angles = inputs.positions.astype(np.float32)[:, None, None] * self._turns  # [num_tokens, 1, head_size]
        cos = xp.cos(angles).astype(self.dtype, copy=False)  # [num_tokens, 1, head_size]
        sin = xp.sin(angles).astype(self.dtype, copy=False)  # [num_tokens, 1, head_size]

        x = self.embedding[inputs.token_ids]  # [num_tokens, hidden_size]
        for index, layer in enumerate(self.layers):
            h = rms_norm(x, layer.attention_norm, eps)  # [num_tokens, hidden_size]
            qk, value = self.project(layer, h)  # [num_tokens, num_heads + num_kv_heads and num_kv_heads, head_size]
            qk = rotate(qk, cos, sin)  # [num_tokens, num_heads + num_kv_heads, head_size]
            query = xp.ascontiguousarray(qk[:, : config.num_heads])  # [num_tokens, num_heads, head_size]
            key = qk[:, config.num_heads :]  # [num_tokens, num_kv_heads, head_size]
            window = config.sliding_windows[index]
            mixed = kv.attend(index, query, key, value, inputs.addresses, window)  # the query's shape
            x = x + self.linear(mixed.reshape(num_tokens, -1), layer.output)  # [num_tokens, hidden_size]

            h = rms_norm(x, layer.mlp_norm, eps)  # [num_tokens, hidden_size]
            gate_up = self.linear(h, layer.gate_up)  # [num_tokens, 2 * intermediate_size]
            x = x + self.linear(gated(gate_up), layer.down)  # [num_tokens, hidden_size]

        x = rms_norm(x[inputs.logits_rows], self.final_norm, eps)  # [num_rows, hidden_size]
        return self.linear(x, self.head).astype(np.float32, copy=False)  # [num_rows, vocab_size]

    def project(self, layer: Any, h: Array) -> tuple[Array, Array]:
        """From `h [num_tokens, hidden_size]`: queries and keys before RoPE, side by side, and values."""
        qkv = self.linear(h, layer.qkv)  # [num_tokens, (num_heads + 2 * num_kv_heads) * head_size]
        qkv = qkv.reshape(len(h), -1, self.config.head_size)  # [num_tokens, num_heads + 2 * num_kv_heads, head_size]
        num_qk = self.config.num_heads + self.config.num_kv_heads  # the heads that RoPE turns
        return qkv[:, :num_qk], qkv[:, num_qk:]
