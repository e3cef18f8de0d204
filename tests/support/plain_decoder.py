"""The decoder by its definition, in float64: no cache, one token and one head at a time, and what each family adds."""

from __future__ import annotations

import math

import numpy as np

from paged_ref.core.model.config import ModelConfig
from paged_ref.interop.hf_config import HFConfig
from paged_ref.interop.rope import RopeScaling


def llama3_frequency(frequency: float, scaling: RopeScaling) -> float:
    """Meta's rule by wavelength, one frequency at a time."""
    wavelength = 2 * math.pi / frequency
    if wavelength < scaling.original / scaling.fast:
        return frequency
    if wavelength > scaling.original / scaling.slow:
        return frequency / scaling.factor
    smooth = (scaling.original / wavelength - scaling.slow) / (scaling.fast - scaling.slow)
    return (1 - smooth) * frequency / scaling.factor + smooth * frequency


def plain_logits(config: ModelConfig, weights: dict[str, np.ndarray], tokens: list[int]) -> np.ndarray:
    """[len(tokens), vocab_size] in float64: no cache, one token and one head at a time."""
    w = {name: array.astype(np.float64) for name, array in weights.items()}
    size, group = config.head_size, config.num_heads // config.num_kv_heads
    # what the families add to a Llama
    more = config if isinstance(config, HFConfig) else HFConfig(*(getattr(config, f) for f in ModelConfig.__slots__))

    def norm(vector: np.ndarray, name: str) -> np.ndarray:
        """Where there is no such norm, the vector."""
        if f"{name}.weight" not in w:
            return vector
        if more.layer_norm:
            vector = vector - vector.mean()
        vector = vector / math.sqrt(float(vector @ vector) / len(vector) + config.rms_norm_eps)
        return np.asarray(vector * (w[f"{name}.weight"] + more.norm_offset) + w.get(f"{name}.bias", 0))

    def product(vector: np.ndarray, name: str) -> np.ndarray:
        return np.asarray(w[f"{name}.weight"] @ vector + w.get(f"{name}.bias", 0))

    def act(value: np.ndarray) -> np.ndarray:
        if more.activation == "silu":
            return np.asarray(value / (1 + np.exp(-value)))
        return np.asarray(value / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (value + 0.044715 * value**3))))

    def turned(head: np.ndarray, position: int, windowed: bool) -> np.ndarray:
        result = head.copy()
        local = windowed and more.local_rope_theta
        for i in range(0 if more.learned_positions else size // 2):
            frequency = (local or config.rope_theta) ** (-2 * i / size)
            if more.rope_scaling is not None and not local:
                frequency = llama3_frequency(frequency, more.rope_scaling)
            pair = complex(head[i], head[i + size // 2]) * complex(
                math.cos(position * frequency), math.sin(position * frequency)
            )
            result[i], result[i + size // 2] = pair.real, pair.imag
        return result

    def heads(x: np.ndarray, index: int, name: str, position: int) -> list[np.ndarray]:
        layer = f"model.layers.{index}.self_attn"
        flat = product(x, f"{layer}.{name}_proj")
        if name != "v" and more.qk_norm == "whole":
            flat = norm(flat, f"{layer}.{name}_norm")
        parts = list(flat.reshape(-1, size))
        if name == "v":
            return parts
        if more.qk_norm == "head":
            parts = [norm(part, f"{layer}.{name}_norm") for part in parts]
        return [turned(part, position, config.sliding_windows[index] is not None) for part in parts]

    def capped(score: np.ndarray, cap: float | None) -> np.ndarray:
        return score if cap is None else np.asarray(cap * np.tanh(score / cap))

    xs = [w["model.embed_tokens.weight"][token] * more.embedding_scale for token in tokens]
    if more.learned_positions:
        xs = [x + place for x, place in zip(xs, w["model.position_embeddings.weight"][: len(xs)], strict=True)]
    first, middle = "input_layernorm", {"before": "post_attention_layernorm", "around": "pre_feedforward_layernorm"}
    for index in range(config.num_layers):
        layer = f"model.layers.{index}"
        normed = xs if more.norms == "after" else [norm(x, f"{layer}.{first}") for x in xs]
        q, k, v = ([heads(x, index, name, p) for p, x in enumerate(normed)] for name in "qkv")
        window = config.sliding_windows[index] or len(tokens)
        for p in range(len(tokens)):
            mixed = []
            for h in range(config.num_heads):
                seen = range(max(0, p - window + 1), p + 1)
                scores = np.array([q[p][h] @ k[j][h // group] for j in seen]) * more.query_scale / math.sqrt(size)
                scores = capped(scores, more.attention_softcap)
                shares = np.exp(scores - scores.max())
                mixed.append(sum(a * v[j][h // group] for a, j in zip(shares / shares.sum(), seen, strict=True)))
            out = product(np.concatenate(mixed), f"{layer}.self_attn.o_proj")
            xs[p] = xs[p] + (out if more.norms == "before" else norm(out, f"{layer}.post_attention_layernorm"))
            h2 = xs[p] if more.norms == "after" else norm(xs[p], f"{layer}.{middle[more.norms]}")
            up = product(h2, f"{layer}.mlp.up_proj")
            inner = act(product(h2, f"{layer}.mlp.gate_proj")) * up if more.gated else act(up)
            xs[p] = xs[p] + norm(product(inner, f"{layer}.mlp.down_proj"), f"{layer}.post_feedforward_layernorm")
    head = w["model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"]
    return capped(np.stack([head @ norm(x, "model.norm") for x in xs]), more.logits_softcap)
