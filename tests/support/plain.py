"""The model once more: float64, no cache; for the oracles of the engine's tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from paged_ref.core.model.config import ModelConfig


class PlainLlama:
    """Logits of a whole sequence, always from its beginning."""

    def __init__(self, config: ModelConfig, weights: Mapping[str, np.ndarray]) -> None:
        self.config = config
        self.w = {name: np.asarray(array, dtype=np.float64) for name, array in weights.items()}

    def logits(self, sequences: Sequence[Sequence[int]]) -> np.ndarray:
        """[sequences, vocab_size]: what comes after each of the sequences, which are equally long."""
        c, w = self.config, self.w
        num, n = len(sequences), len(sequences[0])
        half = c.head_size // 2
        turn = np.exp(1j * np.outer(np.arange(n), c.rope_theta ** (-np.arange(half) / half)))  # [n, half]

        def norm(x: np.ndarray, name: str) -> np.ndarray:
            return np.asarray(x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + c.rms_norm_eps) * w[name])

        def heads(x: np.ndarray, name: str, turned: bool) -> np.ndarray:
            y = (x @ w[name].T).reshape(num, n, -1, c.head_size)
            if turned:
                pairs = (y[..., :half] + 1j * y[..., half:]) * turn[:, None]
                y = np.concatenate([pairs.real, pairs.imag], axis=-1)
            return np.repeat(y, c.num_heads // y.shape[2], axis=2)  # [sequences, n, num_heads, head_size]

        x = w["model.embed_tokens.weight"][np.array(sequences)]  # [sequences, n, hidden_size]
        hidden_keys = np.triu(np.full((n, n), -np.inf), k=1)
        for index in range(c.num_layers):
            at = f"model.layers.{index}"
            h = norm(x, f"{at}.input_layernorm.weight")
            q, k, v = (heads(h, f"{at}.self_attn.{part}_proj.weight", part != "v") for part in "qkv")
            scores = np.einsum("sihd,sjhd->shij", q, k) / np.sqrt(c.head_size) + hidden_keys
            shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
            shares /= shares.sum(axis=-1, keepdims=True)
            x = x + np.einsum("shij,sjhd->sihd", shares, v).reshape(num, n, -1) @ w[f"{at}.self_attn.o_proj.weight"].T
            h = norm(x, f"{at}.post_attention_layernorm.weight")
            gate, up = (h @ w[f"{at}.mlp.{part}_proj.weight"].T for part in ("gate", "up"))
            x = x + (gate / (1 + np.exp(-gate)) * up) @ w[f"{at}.mlp.down_proj.weight"].T
        head = "model.embed_tokens.weight" if c.tie_word_embeddings else "lm_head.weight"
        return np.asarray(norm(x[:, -1], "model.norm.weight") @ w[head].T)
