"""The Llama decoder in array code, and its siblings that differ by a line or two (Qwen2, Qwen3, Mistral).

It sees caches, slots and tables; who decided on them it does not know. In the shapes, `num_tokens` counts
the new tokens of all sequences in a step, packed one sequence after another, so prefill and decode are the
same code. The other names are fields of ModelConfig.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import DTypeLike

from ...kernels import naive_attention, paged_attention, write_kv
from ..device import Array, xp
from .config import ModelConfig


@dataclass(frozen=True, slots=True)
class StepInputs:
    """All that one step needs to know beside the caches. Integer arrays on the model's device."""

    token_ids: Array  # [num_tokens]
    positions: Array  # [num_tokens] place of each token in its sequence
    slot_mapping: Array  # [num_tokens] where its K and V are written; negative: nowhere
    seq_lens: Array  # [num_seqs] keys of each sequence, this step's tokens included
    query_start_loc: Array  # [num_seqs + 1] cumulative counts of new tokens
    logits_rows: Array  # [num_rows] the tokens whose logits are wanted: mostly the last of each sequence
    block_tables: Array | None = None  # [num_seqs, max_blocks] in the paged layout
    starts: Array | None = None  # [num_seqs] first slot of each region in the contiguous layout


class Attend(Protocol):
    """Attention of one layer: the function `attend`, or anything else with its face."""

    def __call__(
        self,
        query: Array,
        key_cache: Array,
        value_cache: Array,
        inputs: StepInputs,
        *,
        sliding_window: int | None,
    ) -> Array: ...


def attend(
    query: Array,
    key_cache: Array,
    value_cache: Array,
    inputs: StepInputs,
    *,
    sliding_window: int | None = None,
    backend: str = "auto",
) -> Array:
    """Attention as `inputs` lay the keys out: through block tables, or in one region for each sequence.

    `query [num_tokens, num_heads, head_size]`, caches `[num_blocks, block_size, num_kv_heads, head_size]`;
    the answer has the query's shape. To choose a backend: `functools.partial(attend, backend="cpu")`.
    """
    if inputs.block_tables is not None:
        return paged_attention(
            query, key_cache, value_cache, inputs.block_tables, inputs.seq_lens, inputs.query_start_loc,
            sliding_window=sliding_window, backend=backend, validate=False,
        )  # fmt: skip
    slots = (
        -1,
        *key_cache.shape[-2:],
    )  # the same memory without blocks: [num_slots, num_kv_heads, head_size]
    return naive_attention(
        query, key_cache.reshape(slots), value_cache.reshape(slots), inputs.starts, inputs.seq_lens,
        inputs.query_start_loc, sliding_window=sliding_window, backend=backend, validate=False,
    )  # fmt: skip


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """`x` over its root mean square, times `weight`; last axis, in float32 (Zhang & Sennrich 2019)."""
    wide = x.astype(np.float32, copy=False)
    mean_square = (wide * wide).sum(axis=-1, keepdims=True) / x.shape[-1]  # half the calls of xp.mean
    return (wide / xp.sqrt(mean_square + np.float32(eps))).astype(x.dtype, copy=False) * weight


def rope_frequencies(config: ModelConfig) -> Array:
    """Radians that each pair of a head turns by from one position to the next: [head_size // 2] float32.

    theta^(-2i / head_size) (Su et al. 2021). With Llama 3.1's scaling, waves longer than the context that
    the model was first trained on are stretched by `factor`, short ones are kept, and between lies a ramp.
    """
    exponents = np.arange(0, config.head_size, 2) / config.head_size  # [head_size // 2]
    frequencies = config.rope_theta**-exponents  # [head_size // 2]
    if (scaling := config.rope_scaling) is not None:
        turns = scaling.original_max_position_embeddings * frequencies / (2 * np.pi)  # in the first context
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        kept = np.clip((turns - low) / (high - low), 0, 1)  # 1: turns often, unchanged; 0: stretched
        frequencies = kept * frequencies + (1 - kept) * frequencies / scaling.factor
    return xp.asarray(frequencies, dtype=np.float32)


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """RoPE: turn pair i of each head, (x[i], x[i + head_size // 2]), by its token's angle.

    `x [num_tokens, heads, head_size]`; `cos` and `sin [num_tokens, 1, head_size]` of minus the angle for the
    first half and of the angle for the second, so that one expression serves both. Hugging Face's pairing;
    Meta's own files pair neighbours, which conversion to Hugging Face permutes away.
    """
    half = x.shape[-1] // 2
    partner = xp.concatenate([x[..., half:], x[..., :half]], axis=-1)  # [num_tokens, heads, head_size]
    return x * cos + partner * sin


def silu(x: Array) -> Array:
    """x · sigmoid(x)."""
    with np.errstate(over="ignore"):  # exp(-x) = inf is right: x / inf is 0
        return x / (1 + xp.exp(-x))


def gated(gate_up: Array) -> Array:
    """silu(gate) · up, where `gate_up [num_tokens, 2 * intermediate_size]` holds both side by side."""
    size = gate_up.shape[1] // 2
    gate, up = gate_up[:, :size], gate_up[:, size:]  # [num_tokens, intermediate_size] each
    return silu(gate) * up


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer's weights, [out, in] as in the file. What reads the same input is joined: four products.

    BLAS multiplies by the transposed view as fast as by a transposed copy (measured with OpenBLAS).
    """

    attention_norm: Array  # [hidden_size]
    qkv: Array  # [(num_heads + 2 * num_kv_heads) * head_size, hidden_size]
    qkv_bias: Array | None  # [(num_heads + 2 * num_kv_heads) * head_size]
    qk_norm: Array | None  # [num_heads + num_kv_heads, head_size]
    output: Array  # [hidden_size, num_heads * head_size]
    mlp_norm: Array  # [hidden_size]
    gate_up: Array  # [2 * intermediate_size, hidden_size]
    down: Array  # [hidden_size, intermediate_size]
    sliding_window: int | None


class Llama:
    """A decoder with its weights on the device.

    `weights` holds arrays under Hugging Face's names, in the shapes of loading.weight_shapes. They are
    copied, one layer at a time, so with a mapping that reads from disk there is never a second model.
    """

    def __init__(self, config: ModelConfig, weights: Mapping[str, np.ndarray], dtype: DTypeLike = np.float32) -> None:
        self.config = config
        self.dtype = np.dtype(dtype)
        if self.dtype.name not in ("float16", "float32"):
            raise ValueError(f"dtype is {self.dtype.name}; known are float16, float32")

        def get(*names: str) -> Array:
            return xp.concatenate([xp.asarray(weights[name], dtype=self.dtype) for name in names])

        def read_layer(index: int) -> Layer:
            at = f"model.layers.{index}"
            qkv = [f"{at}.self_attn.{name}_proj" for name in "qkv"]
            qkv_bias = qk_norm = None
            if config.attention_bias:
                qkv_bias = get(*(f"{name}.bias" for name in qkv))
            if config.qk_norm:
                q_norm, k_norm = (get(f"{at}.self_attn.{name}_norm.weight") for name in "qk")
                qk_norm = xp.stack([q_norm] * config.num_heads + [k_norm] * config.num_kv_heads)
            return Layer(
                attention_norm=get(f"{at}.input_layernorm.weight"),
                qkv=get(*(f"{name}.weight" for name in qkv)),
                qkv_bias=qkv_bias,
                qk_norm=qk_norm,
                output=get(f"{at}.self_attn.o_proj.weight"),
                mlp_norm=get(f"{at}.post_attention_layernorm.weight"),
                gate_up=get(f"{at}.mlp.gate_proj.weight", f"{at}.mlp.up_proj.weight"),
                down=get(f"{at}.mlp.down_proj.weight"),
                sliding_window=config.sliding_windows[index],
            )

        tied = config.tie_word_embeddings
        self.embedding = get("model.embed_tokens.weight")  # [vocab_size, hidden_size]
        self.layers = [read_layer(index) for index in range(config.num_layers)]
        self.final_norm = get("model.norm.weight")  # [hidden_size]
        self.head = self.embedding if tied else get("lm_head.weight")  # [vocab_size, hidden_size]
        frequencies = rope_frequencies(config)  # [head_size // 2]
        self.frequencies = xp.concatenate([-frequencies, frequencies])  # [head_size], as `rotate` wants them

    def forward(self, inputs: StepInputs, kv: Iterable[tuple[Array, Array]], attend: Attend = attend) -> Array:
        """One step: write the new tokens' K and V, and give logits [num_rows, vocab_size], float32.

        `kv` has each layer's (key_cache, value_cache), [num_blocks, block_size, num_kv_heads, head_size].
        Nothing is checked: the inputs' maker stands for them.
        """
        config, eps = self.config, self.config.rms_norm_eps
        num_tokens, num_heads, head_size = inputs.token_ids.shape[0], config.num_heads, config.head_size
        num_qk = num_heads + config.num_kv_heads  # the heads that RoPE turns
        angles = inputs.positions.astype(np.float32)[:, None, None] * self.frequencies
        cos = xp.cos(angles).astype(self.dtype, copy=False)  # [num_tokens, 1, head_size]
        sin = xp.sin(angles).astype(self.dtype, copy=False)  # [num_tokens, 1, head_size]

        x = self.embedding[inputs.token_ids]  # [num_tokens, hidden_size]
        for layer, (key_cache, value_cache) in zip(self.layers, kv, strict=True):
            h = rms_norm(x, layer.attention_norm, eps)  # [num_tokens, hidden_size]
            qkv = h @ layer.qkv.T  # [num_tokens, (num_heads + 2 * num_kv_heads) * head_size]
            if layer.qkv_bias is not None:
                qkv += layer.qkv_bias
            qkv = qkv.reshape(num_tokens, -1, head_size)  # [num_tokens, num_qk + num_kv_heads, head_size]
            qk, value = qkv[:, :num_qk], qkv[:, num_qk:]  # [num_tokens, num_qk and num_kv_heads, head_size]
            if layer.qk_norm is not None:
                qk = rms_norm(qk, layer.qk_norm, eps)  # [num_tokens, num_qk, head_size]
            qk = rotate(qk, cos, sin)  # [num_tokens, num_qk, head_size]
            query = xp.ascontiguousarray(qk[:, :num_heads])  # [num_tokens, num_heads, head_size]
            key = qk[:, num_heads:]  # [num_tokens, num_kv_heads, head_size]
            write_kv(key, value, key_cache, value_cache, inputs.slot_mapping, validate=False)
            mixed = attend(query, key_cache, value_cache, inputs, sliding_window=layer.sliding_window)
            mixed = mixed.reshape(num_tokens, -1)  # [num_tokens, num_heads * head_size]
            x = x + mixed @ layer.output.T  # [num_tokens, hidden_size]

            h = rms_norm(x, layer.mlp_norm, eps)  # [num_tokens, hidden_size]
            gate_up = h @ layer.gate_up.T  # [num_tokens, 2 * intermediate_size]
            x = x + gated(gate_up) @ layer.down.T  # [num_tokens, hidden_size]

        x = rms_norm(x[inputs.logits_rows], self.final_norm, eps)  # [num_rows, hidden_size]
        return (x @ self.head.T).astype(np.float32, copy=False)  # [num_rows, vocab_size]
