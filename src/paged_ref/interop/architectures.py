"""Decoders that differ from the core's Llama: the fields of HFConfig that say how.

Mistral is the core's Llama with sliding windows, which are fields of every config. (A layer with a window reads the
last tokens only; the K and V before them stay in the cache, since one block table serves all layers.) `Decoder` keeps
Llama's step and changes what happens to queries and keys (Qwen, and RoPE's scalings); `GeneralDecoder` has a step of
its own, in which every piece is a field of the config (Gemma, OLMo 2, GPT-2, biases).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..core.device import Array, xp
from ..core.model.config import ModelConfig
from ..core.model.llama import AttendingKV, Llama, StepInputs, gated, linear, rms_norm, rotate
from ..extras.variants import Variant
from .hf_config import HFConfig
from .rope import Rope

Shapes = dict[str, tuple[int, ...]]  # of tensors, by name
# Where the norms of each half of a layer stand, and Hugging Face's names of them.
NORMS = {
    "before": {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"},
    "after": {"attention_end_norm": "post_attention_layernorm", "mlp_end_norm": "post_feedforward_layernorm"},
    "around": {
        "attention_norm": "input_layernorm", "attention_end_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm", "mlp_end_norm": "post_feedforward_layernorm",
    },
}  # fmt: skip


@dataclass(slots=True)
class DecoderLayer:
    """One layer's weights, [out, in]; None: the architecture has none. What reads the same input is joined."""

    qkv: Array  # [(num_heads + 2 * num_kv_heads) * head_size, hidden_size]
    output: Array  # [hidden_size, num_heads * head_size]
    gate_up: Array  # [2 * intermediate_size, hidden_size]; without a gate [intermediate_size, hidden_size]
    down: Array  # [hidden_size, intermediate_size]
    qkv_bias: Array | None = None  # [(num_heads + 2 * num_kv_heads) * head_size]
    output_bias: Array | None = None  # [hidden_size]
    gate_up_bias: Array | None = None  # as long as gate_up
    down_bias: Array | None = None  # [hidden_size]
    qk_norm: Array | None = None  # [num_heads + num_kv_heads, head_size] weights of the norms of q and k
    attention_norm: Array | None = None  # [hidden_size], as all that follow
    attention_norm_bias: Array | None = None
    attention_end_norm: Array | None = None
    mlp_norm: Array | None = None
    mlp_norm_bias: Array | None = None
    mlp_end_norm: Array | None = None


class Decoder(Llama):
    """A Llama that may have biases and norms on queries, keys and values, and any RoPE."""

    config: HFConfig

    def __init__(
        self,
        config: HFConfig,
        weights: Mapping[str, np.ndarray],
        dtype: str = "float32",
        linear: Callable[[Array, Array], Array] = linear,
        longest: int | None = None,
    ) -> None:
        """`longest`: tokens of the longest sequence that there will be (default: the context of the config)."""
        super().__init__(config, weights, dtype, linear)
        longest = longest or config.max_position_embeddings
        self.rope = Rope(config.rope_theta, config.head_size, config.rope_scaling, longest)

    def turns(self, positions: Array) -> tuple[Array, Array]:
        return self.rope.turns(positions, self.dtype)

    def read_layer(self, weights: Mapping[str, np.ndarray], at: str) -> DecoderLayer:
        config = self.config
        fields = {
            field: self.take(weights, *(f"{at}.{name}" for name in tensors))
            for field, tensors in layer_tensors(config).items()
        }
        for field, weight in fields.items():
            if field.endswith("norm"):
                weight += self.dtype.type(config.norm_offset)
        if config.qk_norm:
            q_norm, k_norm = (fields.pop(field).reshape(-1, config.head_size) for field in ("q_norm", "k_norm"))
            if config.qk_norm == "head":  # one head's weights for all
                q_norm, k_norm = xp.repeat(q_norm, config.num_heads, 0), xp.repeat(k_norm, config.num_kv_heads, 0)
            fields["qk_norm"] = xp.concatenate([q_norm, k_norm])
        if "qkv_bias" in fields:
            fields["qkv_bias"] = fields["qkv_bias"].reshape(-1, config.head_size)
        if config.query_scale != 1:  # RoPE and products keep it, so the weights hold it
            queries = (
                fields["qk_norm"][: config.num_heads]
                if config.qk_norm
                else fields["qkv"][: config.num_heads * config.head_size]
            )
            queries *= self.dtype.type(config.query_scale)
            if "qkv_bias" in fields and not config.qk_norm:
                fields["qkv_bias"][: config.num_heads] *= self.dtype.type(config.query_scale)
        return DecoderLayer(**fields)

    def project(self, layer: Any, h: Array) -> tuple[Array, Array]:
        qk, value = Llama.project(self, layer, h)  # [num_tokens, num_heads + num_kv_heads, head_size] and so on
        if layer.qkv_bias is not None:
            qk, value = qk + layer.qkv_bias[: qk.shape[1]], value + layer.qkv_bias[qk.shape[1] :]
        if self.config.qk_norm == "whole":
            heads = self.config.num_heads
            parts = (qk[:, :heads], layer.qk_norm[:heads]), (qk[:, heads:], layer.qk_norm[heads:])
            qk = xp.concatenate([_norm_of_all_heads(x, weight, self.config.rms_norm_eps) for x, weight in parts], 1)
        elif layer.qk_norm is not None:
            qk = rms_norm(qk, layer.qk_norm, self.config.rms_norm_eps)
        return qk, value


class GeneralDecoder(Decoder):
    """A decoder of the fields of its config. The step of Llama, with every piece that a family changes."""

    def __init__(self, config: HFConfig, weights: Mapping[str, np.ndarray], *options: Any) -> None:
        """The arguments of Decoder."""
        super().__init__(config, weights, *options)
        self.final_norm += self.dtype.type(config.norm_offset)
        self.final_norm_bias = self.take(weights, "model.norm.bias") if config.layer_norm else None
        # [max_position_embeddings, hidden_size]
        self.places = self.take(weights, "model.position_embeddings.weight") if config.learned_positions else None
        theta, size = config.local_rope_theta, config.head_size
        local = self.rope if theta is None else Rope(theta, size, None, config.max_position_embeddings)
        # Of each layer
        self.ropes = [self.rope if window is None else local for window in config.sliding_windows]

    def forward(self, inputs: StepInputs, kv: AttendingKV) -> Array:
        """As Llama.forward: logits [num_rows, vocab_size], float32. `x` and `h` are [num_tokens, hidden_size]."""
        config = self.config
        turns = {rope: rope.turns(inputs.positions, self.dtype) for rope in set(self.ropes)}
        x = self.embedding[inputs.token_ids] * self.dtype.type(config.embedding_scale)
        if self.places is not None:
            x = x + self.places[inputs.positions]
        for index, layer in enumerate(self.layers):
            h = self.norm(x, layer.attention_norm, layer.attention_norm_bias)
            mixed = self.attention(index, h, turns[self.ropes[index]], inputs, kv)
            x = x + self.norm(mixed, layer.attention_end_norm)
            h = self.norm(x, layer.mlp_norm, layer.mlp_norm_bias)
            x = x + self.norm(self.mlp(layer, h), layer.mlp_end_norm)
        x = self.norm(x[inputs.logits_rows], self.final_norm, self.final_norm_bias)  # [num_rows, hidden_size]
        logits = self.linear(x, self.head).astype(np.float32, copy=False)  # [num_rows, vocab_size]
        cap = config.logits_softcap
        return logits if cap is None else np.float32(cap) * xp.tanh(logits / np.float32(cap))

    def attention(self, index: int, h: Array, turn: tuple[Array, Array], inputs: StepInputs, kv: AttendingKV) -> Array:
        """The attention half of layer `index`: [num_tokens, hidden_size]. `turn`: cos and sin of its RoPE."""
        layer, num_heads = self.layers[index], self.config.num_heads
        qk, value = self.project(layer, h)  # [num_tokens, num_heads + num_kv_heads and num_kv_heads, head_size]
        if not self.config.learned_positions:
            qk = rotate(qk, *turn)
        query = xp.ascontiguousarray(qk[:, :num_heads])
        window = self.config.sliding_windows[index]
        mixed = kv.attend(index, query, qk[:, num_heads:], value, inputs.addresses, window)
        return self.affine(mixed.reshape(len(h), -1), layer.output, layer.output_bias)

    def mlp(self, layer: Any, h: Array) -> Array:
        """The other half: [num_tokens, hidden_size]."""
        inner = self.affine(h, layer.gate_up, layer.gate_up_bias)
        if self.config.activation == "silu":
            inner = gated(inner)
        elif self.config.gated:
            size = inner.shape[1] // 2
            inner = gelu(inner[:, :size]) * inner[:, size:]
        else:
            inner = gelu(inner)
        return self.affine(inner, layer.down, layer.down_bias)

    def affine(self, x: Array, weight: Array, bias: Array | None) -> Array:
        y = self.linear(x, weight)
        return y if bias is None else y + bias

    def norm(self, x: Array, weight: Array | None, bias: Array | None = None) -> Array:
        """`x` where there is no norm."""
        if weight is None:
            return x
        if bias is None:
            return rms_norm(x, weight, self.config.rms_norm_eps)
        return layer_norm(x, weight, bias, self.config.rms_norm_eps)


def layer_norm(x: Array, weight: Array, bias: Array, eps: float) -> Array:
    """`x` less its mean, over its deviation, times `weight`, plus `bias`; last axis, in float32 (Ba et al. 2016)."""
    wide = x.astype(np.float32, copy=False)
    wide = wide - wide.mean(axis=-1, keepdims=True)
    deviation = xp.sqrt((wide * wide).mean(axis=-1, keepdims=True) + np.float32(eps))
    return (wide / deviation).astype(x.dtype, copy=False) * weight + bias


def gelu(x: Array) -> Array:
    """x times the normal distribution's share below x, by its approximation with tanh (Hendrycks and Gimpel 2016)."""
    root = x.dtype.type(math.sqrt(2 / math.pi))
    return x.dtype.type(0.5) * x * (1 + xp.tanh(root * (x + x.dtype.type(0.044715) * x * x * x)))


def _norm_of_all_heads(x: Array, weight: Array, eps: float) -> Array:
    """rms_norm over all heads of a token together: `x [num_tokens, heads, head_size]`, `weight [heads, head_size]`."""
    return rms_norm(x.reshape(len(x), -1), weight.reshape(-1), eps).reshape(x.shape)


def build_model(
    config: ModelConfig,
    weights: Mapping[str, np.ndarray],
    dtype: str = "float32",
    linear: Callable[[Array, Array], Array] = linear,
    longest: int | None = None,
) -> Llama:
    """The decoder of this config, for sequences of at most `longest` tokens (default: its context). The core's Llama
    where that is enough. Raises ValueError where the learned positions end before `longest`."""
    if not isinstance(config, HFConfig) or not config.variations:
        return Llama(config, weights, dtype, linear)
    context = config.max_position_embeddings
    if config.learned_positions and (longest or 0) > context:
        raise ValueError(
            f"max_model_len is {longest}; a {config.model_type} model has vectors for the {context} positions of its "
            "context, and for no other"
        )
    step_is_llamas = config.variations <= {"rope_scaling", "qkv_bias", "qk_norm"}
    return (Decoder if step_is_llamas else GeneralDecoder)(config, weights, dtype, linear, longest)


def attention_variants(config: ModelConfig) -> list[Variant | None]:
    """For each layer, what its attention has beyond the plain one: `variants` of a KVCache."""
    softcap = config.attention_softcap if isinstance(config, HFConfig) else None
    return [None if softcap is None else Variant(softcap=softcap)] * config.num_layers


def layer_tensors(config: ModelConfig) -> dict[str, Shapes]:
    """For each field of a layer: the tensors that are joined in it, by their names behind `model.layers.N.`."""
    more = config if isinstance(config, HFConfig) else HFConfig(*(getattr(config, f) for f in ModelConfig.__slots__))
    hidden, inner = config.hidden_size, config.intermediate_size
    q_size, kv_size = config.num_heads * config.head_size, config.num_kv_heads * config.head_size
    gate = {"mlp.gate_proj": inner} if more.gated else {}
    products = {  # of each: the rows of its tensors, its columns, and whether it has a bias
        "qkv": (
            {"self_attn.q_proj": q_size, "self_attn.k_proj": kv_size, "self_attn.v_proj": kv_size},
            hidden,
            more.qkv_bias,
        ),
        "output": ({"self_attn.o_proj": hidden}, q_size, more.output_bias),
        "gate_up": ({**gate, "mlp.up_proj": inner}, hidden, more.mlp_bias),
        "down": ({"mlp.down_proj": hidden}, inner, more.mlp_bias),
    }
    fields: dict[str, Shapes] = {}
    for field, (rows, columns, biased) in products.items():
        fields[field] = {f"{name}.weight": (size, columns) for name, size in rows.items()}
        if biased:
            fields[f"{field}_bias"] = {f"{name}.bias": (size,) for name, size in rows.items()}
    for field, name in NORMS[more.norms].items():
        fields[field] = {f"{name}.weight": (hidden,)}
        if more.layer_norm:
            fields[f"{field}_bias"] = {f"{name}.bias": (hidden,)}
    if more.qk_norm:
        whole = more.qk_norm == "whole"
        fields["q_norm"] = {"self_attn.q_norm.weight": (q_size if whole else config.head_size,)}
        fields["k_norm"] = {"self_attn.k_norm.weight": (kv_size if whole else config.head_size,)}
    return fields


def outer_shapes(config: ModelConfig) -> Shapes:
    """The tensors outside of the layers."""
    table = (config.vocab_size, config.hidden_size)
    shapes: Shapes = {"model.embed_tokens.weight": table, "model.norm.weight": (config.hidden_size,)}
    if isinstance(config, HFConfig) and config.learned_positions:
        shapes["model.position_embeddings.weight"] = (config.max_position_embeddings, config.hidden_size)
    if isinstance(config, HFConfig) and config.layer_norm:
        shapes["model.norm.bias"] = (config.hidden_size,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = table
    return shapes


def weight_shapes(config: ModelConfig) -> Shapes:
    """Every tensor that a model of `config` reads, under the names of Hugging Face's Llama, [out, in]."""
    shapes = outer_shapes(config)
    for index in range(config.num_layers):
        for tensors in layer_tensors(config).values():
            shapes |= {f"model.layers.{index}.{name}": shape for name, shape in tensors.items()}
    return shapes


def num_weights(config: ModelConfig) -> int:
    """The numbers in all these tensors, counted without listing the layers."""
    layer = [shape for tensors in layer_tensors(config).values() for shape in tensors.values()]
    return config.num_layers * sum(map(math.prod, layer)) + sum(map(math.prod, outer_shapes(config).values()))


def random_weights(config: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Weights for benchmarks and tests, float32: they keep activations near size 1, and no two are alike."""
    rng = np.random.default_rng(seed)
    offset = config.norm_offset if isinstance(config, HFConfig) else 0.0
    weights = {}
    for name, shape in weight_shapes(config).items():
        drawn = rng.standard_normal(shape, dtype=np.float32)
        if len(shape) == 2:
            weights[name] = drawn / np.float32(np.sqrt(shape[1]))
        else:
            weights[name] = np.float32(0.1) * drawn + np.float32(1 - offset if "norm.weight" in name else 0)
    return weights
