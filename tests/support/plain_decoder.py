"""The decoder by its definition, in float64: no cache, one token and one head at a time, and what each family adds."""

from __future__ import annotations

import math

import numpy as np

from paged_ref.core.model.config import ModelConfig
from paged_ref.interop.hf_config import HFConfig, Llama3RopeScaling


def llama3_frequency(frequency: float, scaling: Llama3RopeScaling) -> float:
    """Meta's rule by wavelength, one frequency at a time."""
    wavelength = 2 * math.pi / frequency
    if wavelength < scaling.original_max_position_embeddings / scaling.high_freq_factor:
        return frequency
    if wavelength > scaling.original_max_position_embeddings / scaling.low_freq_factor:
        return frequency / scaling.factor
    smooth = (scaling.original_max_position_embeddings / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    return (1 - smooth) * frequency / scaling.factor + smooth * frequency


def plain_logits(config: ModelConfig, weights: dict[str, np.ndarray], tokens: list[int]) -> np.ndarray:
    """[len(tokens), vocab_size] in float64: no cache, one token and one head at a time."""
    w = {name: array.astype(np.float64) for name, array in weights.items()}
    size, group = config.head_size, config.num_heads // config.num_kv_heads
    more = config if isinstance(config, HFConfig) else None  # what the families add to a Llama

    def norm(vector: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return np.asarray(vector / math.sqrt(float(vector @ vector) / len(vector) + config.rms_norm_eps) * weight)

    def turned(head: np.ndarray, position: int) -> np.ndarray:
        result = head.copy()
        for i in range(size // 2):
            frequency = config.rope_theta ** (-2 * i / size)
            if more and more.rope_scaling is not None:
                frequency = llama3_frequency(frequency, more.rope_scaling)
            pair = complex(head[i], head[i + size // 2]) * complex(
                math.cos(position * frequency), math.sin(position * frequency)
            )
            result[i], result[i + size // 2] = pair.real, pair.imag
        return result

    def heads(x: np.ndarray, layer: str, name: str, position: int) -> list[np.ndarray]:
        flat = w[f"{layer}.self_attn.{name}_proj.weight"] @ x
        if more and more.attention_bias:
            flat = flat + w[f"{layer}.self_attn.{name}_proj.bias"]
        parts = list(flat.reshape(-1, size))
        if name == "v":
            return parts
        if more and more.qk_norm:
            parts = [norm(part, w[f"{layer}.self_attn.{name}_norm.weight"]) for part in parts]
        return [turned(part, position) for part in parts]

    xs = [w["model.embed_tokens.weight"][token] for token in tokens]
    for index in range(config.num_layers):
        layer = f"model.layers.{index}"
        normed = [norm(x, w[f"{layer}.input_layernorm.weight"]) for x in xs]
        q, k, v = ([heads(x, layer, name, p) for p, x in enumerate(normed)] for name in "qkv")
        window = config.sliding_windows[index] or len(tokens)
        for p in range(len(tokens)):
            mixed = []
            for h in range(config.num_heads):
                seen = range(max(0, p - window + 1), p + 1)
                scores = np.array([q[p][h] @ k[j][h // group] for j in seen]) / math.sqrt(size)
                shares = np.exp(scores - scores.max())
                mixed.append(sum(a * v[j][h // group] for a, j in zip(shares / shares.sum(), seen, strict=True)))
            xs[p] = xs[p] + w[f"{layer}.self_attn.o_proj.weight"] @ np.concatenate(mixed)
            h2 = norm(xs[p], w[f"{layer}.post_attention_layernorm.weight"])
            gate, up = w[f"{layer}.mlp.gate_proj.weight"] @ h2, w[f"{layer}.mlp.up_proj.weight"] @ h2
            xs[p] = xs[p] + w[f"{layer}.mlp.down_proj.weight"] @ (gate / (1 + np.exp(-gate)) * up)
    head = w["model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"]
    return np.stack([head @ norm(x, w["model.norm.weight"]) for x in xs])
