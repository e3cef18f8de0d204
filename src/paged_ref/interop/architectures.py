"""Decoders that differ from the core's Llama by a line or two: Qwen2, Qwen3, Mistral, Llama 3.1's RoPE.

Mistral is the core's Llama with sliding windows, which are fields of every config.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..core.device import Array, xp
from ..core.model.config import ModelConfig
from ..core.model.llama import Layer, Llama, linear, rms_norm
from .hf_config import HFConfig


@dataclass(slots=True)
class QwenLayer(Layer):
    """A layer with what Qwen2 and Qwen3 add."""

    qkv_bias: Array | None = None  # [num_heads + 2 * num_kv_heads, head_size]
    qk_norm: Array | None = None  # [num_heads + num_kv_heads, head_size] the weights of the norm of each head


class Decoder(Llama):
    """A Llama whose config may name what Qwen2, Qwen3 and Llama 3.1 do otherwise."""

    config: HFConfig

    def read_layer(self, weights: Mapping[str, np.ndarray], at: str) -> QwenLayer:
        config = self.config
        layer = Llama.read_layer(self, weights, at)
        plain = {name: getattr(layer, name) for name in Layer.__slots__}
        bias = norm = None
        if config.attention_bias:
            bias = self.take(weights, *(f"{at}.self_attn.{name}_proj.bias" for name in "qkv"))
            bias = bias.reshape(-1, config.head_size)
        if config.qk_norm:
            q_norm, k_norm = (self.take(weights, f"{at}.self_attn.{name}_norm.weight") for name in "qk")
            norm = xp.stack([q_norm] * config.num_heads + [k_norm] * config.num_kv_heads)
        return QwenLayer(**plain, qkv_bias=bias, qk_norm=norm)

    def project(self, layer: Any, h: Array) -> tuple[Array, Array]:
        qk, value = Llama.project(self, layer, h)  # [num_tokens, num_heads + num_kv_heads, head_size] and so on
        if layer.qkv_bias is not None:
            qk, value = qk + layer.qkv_bias[: qk.shape[1]], value + layer.qkv_bias[qk.shape[1] :]
        if layer.qk_norm is not None:
            qk = rms_norm(qk, layer.qk_norm, self.config.rms_norm_eps)
        return qk, value

    def frequencies(self) -> np.ndarray:
        """RoPE's, and with Llama 3.1's scaling: waves longer than the context that the model was first trained on are
        stretched by `factor`, short ones are kept, and between lies a ramp (Grattafiori et al. 2024)."""
        frequencies, scaling = Llama.frequencies(self), self.config.rope_scaling
        if scaling is None:
            return frequencies
        turns = scaling.original_max_position_embeddings * frequencies / (2 * np.pi)  # in the first context
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        kept = np.clip((turns - low) / (high - low), 0, 1)  # 1: turns often, unchanged; 0: stretched
        scaled: np.ndarray = kept * frequencies + (1 - kept) * frequencies / scaling.factor
        return scaled


def build_model(
    config: ModelConfig,
    weights: Mapping[str, np.ndarray],
    dtype: str = "float32",
    linear: Callable[[Array, Array], Array] = linear,
) -> Llama:
    """The decoder of this config: the core's Llama where that is enough."""
    needs_more = isinstance(config, HFConfig) and (config.attention_bias or config.qk_norm or config.rope_scaling)
    return (Decoder if needs_more else Llama)(config, weights, dtype, linear)


def weight_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that a checkpoint of `config` must hold, under Hugging Face's names, [out, in]."""
    layer, hidden_size = _layer_shapes(config), config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden_size)}
    for index in range(config.num_layers):
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    shapes["model.norm.weight"] = (hidden_size,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden_size)
    return shapes


def num_weights(config: ModelConfig) -> int:
    """The numbers in all these tensors, counted without listing the layers."""
    tables = (1 if config.tie_word_embeddings else 2) * config.vocab_size
    return config.num_layers * sum(map(math.prod, _layer_shapes(config).values())) + (tables + 1) * config.hidden_size


def _layer_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    hidden_size, intermediate_size = config.hidden_size, config.intermediate_size
    q_size, kv_size = config.num_heads * config.head_size, config.num_kv_heads * config.head_size
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden_size,),
        "self_attn.q_proj.weight": (q_size, hidden_size),
        "self_attn.k_proj.weight": (kv_size, hidden_size),
        "self_attn.v_proj.weight": (kv_size, hidden_size),
        "self_attn.o_proj.weight": (hidden_size, q_size),
        "post_attention_layernorm.weight": (hidden_size,),
        "mlp.gate_proj.weight": (intermediate_size, hidden_size),
        "mlp.up_proj.weight": (intermediate_size, hidden_size),
        "mlp.down_proj.weight": (hidden_size, intermediate_size),
    }
    if isinstance(config, HFConfig) and config.attention_bias:
        layer |= {
            f"self_attn.{name}_proj.bias": (size,) for name, size in zip("qkv", (q_size, kv_size, kv_size), strict=True)
        }
    if isinstance(config, HFConfig) and config.qk_norm:
        layer |= {f"self_attn.{name}_norm.weight": (config.head_size,) for name in "qk"}
    return layer


def random_weights(config: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Weights for benchmarks and tests, float32: they keep activations near size 1, and no two are alike."""
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in weight_shapes(config).items():
        drawn = rng.standard_normal(shape, dtype=np.float32)
        if len(shape) == 2:
            weights[name] = drawn / np.float32(np.sqrt(shape[1]))
        else:
            weights[name] = np.float32(0.1) * drawn + np.float32("norm" in name)
    return weights
