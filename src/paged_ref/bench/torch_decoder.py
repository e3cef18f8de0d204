"""The opponent of training: the same Llama in torch, on a page, and one step of it with AdamW."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, embedding, linear, rms_norm, scaled_dot_product_attention, silu

from ..core.model.config import ModelConfig
from ..core.model.llama import rope_frequencies
from ..training.optimizer import BETA1, BETA2, EPSILON
from ..training.parameters import Parameters


class TorchDecoder(nn.Module):  # type: ignore[misc]  # torch has no types here
    """A Llama with the weights of `Parameters`: tied embeddings, and matrices of one input joined."""

    def __init__(self, weights: Parameters) -> None:
        super().__init__()
        self.config = weights.config
        self.weights = nn.ParameterDict(
            {"embedding": _copy(weights.embedding), "final_norm": _copy(weights.final_norm)}
        )
        for index, layer in enumerate(weights.layers):
            for name in layer.__slots__:
                self.weights[f"{name}_{index}"] = _copy(getattr(layer, name))

    def forward(self, ids: Tensor) -> Tensor:
        """From token ids [num_seqs, length] to logits [num_seqs, length, vocab_size]."""
        config, weights = self.config, self.weights
        hidden, eps = (config.hidden_size,), config.rms_norm_eps
        cos, sin = _turns(config, ids.shape[1])
        x = embedding(ids, weights["embedding"])
        for i in range(config.num_layers):
            h = rms_norm(x, hidden, weights[f"attention_norm_{i}"], eps)
            qkv = linear(h, weights[f"qkv_{i}"]).unflatten(-1, (-1, config.head_size)).transpose(1, 2)
            q, k, v = qkv.split((config.num_heads, config.num_kv_heads, config.num_kv_heads), dim=1)
            q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
            mixed = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            x = x + linear(mixed.transpose(1, 2).flatten(2), weights[f"output_{i}"])
            h = rms_norm(x, hidden, weights[f"mlp_norm_{i}"], eps)
            gate, up = linear(h, weights[f"gate_up_{i}"]).chunk(2, dim=-1)
            x = x + linear(silu(gate) * up, weights[f"down_{i}"])
        return linear(rms_norm(x, hidden, weights["final_norm"], eps), weights["embedding"])


def training_step(model: TorchDecoder, tokens: np.ndarray, rate: float, weight_decay: float) -> Callable[[], float]:
    """A step on `tokens [num_seqs, length + 1]`: forwards, backwards, AdamW. It returns the loss before the step."""
    ids = torch.from_numpy(tokens)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim == 2], "weight_decay": weight_decay},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, rate, (BETA1, BETA2), EPSILON)

    def step() -> float:
        optimizer.zero_grad()
        loss = cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


def _copy(array: np.ndarray) -> nn.Parameter:
    return nn.Parameter(torch.tensor(array))


def _turns(config: ModelConfig, length: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine of each position's angles: [length, head_size], of minus the angle for the first half."""
    angles = np.arange(length)[:, None] * np.concatenate([-rope_frequencies(config), rope_frequencies(config)])
    return torch.tensor(np.cos(angles), dtype=torch.float32), torch.tensor(np.sin(angles), dtype=torch.float32)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + torch.roll(x, x.shape[-1] // 2, -1) * sin
