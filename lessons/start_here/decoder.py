"""The parts of a small decoder that paging never touches: weights, norms, RoPE, MLP. NumPy, float32.

This is an ordinary Llama, as many programs have one. The step files, step0_concat.py to step5_pool.py, say where
K and V lie and how attention finds them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from paged_ref.interop.checkpoints import load


class Decoder:
    """Weights, and what happens before and after attention."""

    def __init__(self, directory: str | Path = "tiny") -> None:
        """`directory` is "tiny" (embedded) or a Hugging Face directory. ValueError unless it is a plain Llama."""
        checkpoint = load(directory)
        self.config = checkpoint.config
        if self.config.model_type != "llama" or self.config.rope_scaling:
            raise ValueError(f"{directory} is a {self.config.model_type}; this decoder is a Llama without RoPE scaling")
        self.tokenizer = checkpoint.tokenizer
        self.weights = {name: np.array(array, dtype=np.float32) for name, array in checkpoint.weights.items()}

    def embed(self, token_ids: list[int]) -> np.ndarray:
        """[num_tokens, hidden_size]"""
        return self.weights["model.embed_tokens.weight"][token_ids]

    def project(self, layer: int, x: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Query [num_tokens, num_heads, head_size], key and value [num_tokens, num_kv_heads, head_size]."""
        h = self._norm(x, f"model.layers.{layer}.input_layernorm")
        query, key, value = (
            (h @ self.weights[f"model.layers.{layer}.self_attn.{name}_proj.weight"].T).reshape(
                len(x), -1, self.config.head_size
            )
            for name in "qkv"
        )
        return self._rope(query, positions), self._rope(key, positions), value

    def finish(self, layer: int, x: np.ndarray, mixed: np.ndarray) -> np.ndarray:
        """The rest of the layer: `mixed` is what attention gave, [num_tokens, num_heads, head_size]."""
        at = f"model.layers.{layer}"
        x = x + mixed.reshape(len(x), -1) @ self.weights[f"{at}.self_attn.o_proj.weight"].T
        h = self._norm(x, f"{at}.post_attention_layernorm")
        gate = h @ self.weights[f"{at}.mlp.gate_proj.weight"].T
        up = h @ self.weights[f"{at}.mlp.up_proj.weight"].T
        return x + (gate / (1 + np.exp(-gate)) * up) @ self.weights[f"{at}.mlp.down_proj.weight"].T

    def logits(self, x: np.ndarray) -> np.ndarray:
        """[num_tokens, vocab_size]"""
        tied = self.config.tie_word_embeddings
        head = self.weights["model.embed_tokens.weight" if tied else "lm_head.weight"]
        return self._norm(x, "model.norm") @ head.T

    def _norm(self, x: np.ndarray, name: str) -> np.ndarray:
        mean_square = (x * x).mean(axis=-1, keepdims=True)
        return x / np.sqrt(mean_square + np.float32(self.config.rms_norm_eps)) * self.weights[f"{name}.weight"]

    def _rope(self, x: np.ndarray, positions: np.ndarray) -> np.ndarray:
        half = self.config.head_size // 2
        frequencies = self.config.rope_theta ** (-np.arange(half) / half)
        angles = np.asarray(positions)[:, None, None] * frequencies  # [num_tokens, 1, half]
        cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        first, second = x[..., :half], x[..., half:]
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
