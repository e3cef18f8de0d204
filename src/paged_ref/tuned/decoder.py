"""The decoder of core/model/llama.py with few launches: nine for a layer of a decode step, ten if sequences are split.
A step with prompts in it makes one more: sequences with many new tokens have an attention kernel of their own.

On a GPU a small batch is computed faster than the host can launch it, so what counts is the number of launches and the
host's time for each (`paged-ref bench host`). Four are products; the others are one kernel each:

    add and norm, qkv · , RoPE and write of K and V, attention (and the merge of its parts), output ·
    add and norm, gate and up · , gate, down ·
"""

from __future__ import annotations

import numpy as np

from ..core.device import Array, xp
from ..core.model.llama import AttendingKV, Llama, StepInputs
from . import fused
from .kv import TunedKV


class FusedDecoder(Llama):
    """Another decoder's weights, and the same tokens."""

    def __init__(self, decoder: Llama) -> None:
        vars(self).update(vars(decoder))  # all that Llama.__init__ made
        self.decoder = decoder  # of a kind that projects in its own way

    def forward(self, inputs: StepInputs, kv: AttendingKV) -> Array:
        """As Llama.forward: logits [num_rows, vocab_size], float32. The shapes are there."""
        config, eps = self.config, self.config.rms_norm_eps
        num_tokens, where = len(inputs.token_ids), inputs.addresses
        angles = inputs.positions.astype(np.float32)[:, None, None] * self._turns  # [num_tokens, 1, head_size]
        cos, sin = (turn(angles).astype(self.dtype, copy=False) for turn in (xp.cos, xp.sin))
        norms = [*(layer.attention_norm for layer in self.layers[1:]), self.final_norm]  # after each layer
        x = self.embedding[inputs.token_ids]  # an array of its own, which `add_norm` changes
        h = fused.rms_norm(x, self.layers[0].attention_norm, eps)
        for index, (layer, next_norm) in enumerate(zip(self.layers, norms, strict=True)):
            qk, value = self.decoder.project(layer, h)
            window = config.sliding_windows[index]
            if isinstance(kv, TunedKV) and kv.layers[0][0].dtype == x.dtype:
                mixed = kv.turn_and_attend(index, qk, value, cos, sin, where, window)
            else:
                qk = fused.rotate(qk, cos, sin)
                query = xp.ascontiguousarray(qk[:, : config.num_heads])
                mixed = kv.attend(index, query, qk[:, config.num_heads :], value, where, window)
            h = fused.add_norm(x, self.linear(mixed.reshape(num_tokens, -1), layer.output), layer.mlp_norm, eps)
            h = fused.add_norm(x, self.linear(fused.gated(self.linear(h, layer.gate_up)), layer.down), next_norm, eps)
        return self.linear(h[inputs.logits_rows], self.head).astype(np.float32, copy=False)
