"""All weights of a decoder in one flat array, so that an optimizer is a few lines over one array."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from ..core.device import Array, to_host, xp
from ..core.model.config import ModelConfig
from ..interop.hf_config import HFConfig


@dataclass(frozen=True, slots=True)
class LayerViews:
    """One layer's weights, or their gradients: views of the flat array, [out, in]. Matrices of one input are joined."""

    qkv: Array  # [(num_heads + 2 * num_kv_heads) * head_size, hidden_size]
    output: Array  # [hidden_size, num_heads * head_size]
    gate_up: Array  # [2 * intermediate_size, hidden_size]
    down: Array  # [hidden_size, intermediate_size]
    attention_norm: Array  # [hidden_size]
    mlp_norm: Array  # [hidden_size]


class Parameters:
    """The weights of a Llama with tied embeddings, or their gradients.

    `flat[:num_in_matrices]` are the matrices, the embedding first; the norms follow.
    """

    def __init__(self, config: ModelConfig, dtype: DTypeLike = np.float32) -> None:
        """All zero. Raises ValueError for a model that is not such a Llama."""
        if isinstance(config, HFConfig) and (config.model_type != "llama" or config.rope_scaling is not None):
            raise ValueError(f"model_type is {config.model_type}; training knows llama, without rope_scaling")
        if not config.tie_word_embeddings:
            raise ValueError("tie_word_embeddings is false; training knows tied embeddings")
        self.config = config
        shapes = _shapes(config)
        ends = np.cumsum([np.prod(shape) for shape in shapes.values()])
        self.flat = xp.zeros(int(ends[-1]), dtype=dtype)  # [number of weights]
        self.num_in_matrices = int(sum(np.prod(shape) for shape in shapes.values() if len(shape) == 2))
        views = {
            key: self.flat[end - np.prod(shape) : end].reshape(shape)
            for (key, shape), end in zip(shapes.items(), map(int, ends), strict=True)
        }
        self.embedding = views[-1, "embedding"]  # [vocab_size, hidden_size]; the head as well
        self.final_norm = views[-1, "final_norm"]  # [hidden_size]
        self.layers = [
            LayerViews(**{field.name: views[layer, field.name] for field in fields(LayerViews)})
            for layer in range(config.num_layers)
        ]

    def initialize(self, seed: int) -> None:
        """Draw from a normal distribution with deviation 0.02. Matrices that write into the residual get smaller values
        the deeper the model is (GPT-2)."""
        rng = np.random.default_rng(seed)
        drawn = rng.standard_normal(self.num_in_matrices, dtype=np.float32)
        self.flat[: self.num_in_matrices] = xp.asarray(np.float32(0.02) * drawn)
        self.flat[self.num_in_matrices :] = 1
        for layer in self.layers:
            for matrix in (layer.output, layer.down):
                matrix /= (2 * self.config.num_layers) ** 0.5

    def by_name(self) -> dict[str, Array]:
        """Views under Hugging Face's names."""
        config = self.config
        q_size, kv_size = config.num_heads * config.head_size, config.num_kv_heads * config.head_size
        names = {"model.embed_tokens.weight": self.embedding, "model.norm.weight": self.final_norm}
        for index, layer in enumerate(self.layers):
            at = f"model.layers.{index}"
            names |= {
                f"{at}.self_attn.q_proj.weight": layer.qkv[:q_size],
                f"{at}.self_attn.k_proj.weight": layer.qkv[q_size : q_size + kv_size],
                f"{at}.self_attn.v_proj.weight": layer.qkv[q_size + kv_size :],
                f"{at}.self_attn.o_proj.weight": layer.output,
                f"{at}.mlp.gate_proj.weight": layer.gate_up[: config.intermediate_size],
                f"{at}.mlp.up_proj.weight": layer.gate_up[config.intermediate_size :],
                f"{at}.mlp.down_proj.weight": layer.down,
                f"{at}.input_layernorm.weight": layer.attention_norm,
                f"{at}.post_attention_layernorm.weight": layer.mlp_norm,
            }
        return names

    def export(self, dtype: DTypeLike) -> dict[str, np.ndarray]:
        """Copies on the host under Hugging Face's names. Raises ValueError where a weight does not fit the dtype."""
        with np.errstate(over="ignore"):  # looked at below
            arrays = {name: to_host(view).astype(dtype) for name, view in self.by_name().items()}
        for name, array in arrays.items():
            require_numbers(f"{name} in {np.dtype(dtype).name}", array)
        return arrays

    def fill(self, weights: Mapping[str, Any]) -> None:
        """Copy the values from arrays under Hugging Face's names."""
        for name, view in self.by_name().items():
            view[...] = xp.asarray(weights[name])


def require_numbers(name: str, array: np.ndarray) -> None:
    """Raise ValueError where `array` holds NaN or inf."""
    wrong = array.size - int(np.isfinite(array).sum())
    if wrong:
        raise ValueError(f"{name} has {wrong} of {array.size} numbers that are NaN or inf; they are not written")


def _shapes(config: ModelConfig) -> dict[tuple[int, str], tuple[int, ...]]:
    """The shape of each weight by (layer, name), in the order of the flat array; layer -1 is outside of all layers."""
    hidden_size, intermediate_size = config.hidden_size, config.intermediate_size
    matrices = {
        "qkv": ((config.num_heads + 2 * config.num_kv_heads) * config.head_size, hidden_size),
        "output": (hidden_size, config.num_heads * config.head_size),
        "gate_up": (2 * intermediate_size, hidden_size),
        "down": (hidden_size, intermediate_size),
    }
    norms = {"attention_norm": (hidden_size,), "mlp_norm": (hidden_size,)}
    shapes: dict[tuple[int, str], tuple[int, ...]] = {(-1, "embedding"): (config.vocab_size, hidden_size)}
    for layer in range(config.num_layers):
        shapes |= {(layer, name): shape for name, shape in matrices.items()}
    for layer in range(config.num_layers):
        shapes |= {(layer, name): shape for name, shape in norms.items()}
    shapes[-1, "final_norm"] = (hidden_size,)
    return shapes
