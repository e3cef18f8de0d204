"""The decoder of core/model/llama.py with few calls: for a CPU in compiled_decoder.py, for a GPU here.

On a GPU a small batch is computed faster than the host can launch it, so what counts is the number of launches and the
host's time for each (`paged-ref bench host`). There are nine for a layer of a decode step, ten if sequences are split.
A step with prompts in it makes one more: sequences with many new tokens have an attention kernel of their own. Four
launches are products; the others are one kernel each:

    add and norm, qkv · , RoPE and write of K and V, attention (and the merge of its parts), output ·
    add and norm, gate and up · , gate, down ·
"""

from __future__ import annotations

import numpy as np

from ..core.device import Array, on_gpu, xp
from ..core.model.llama import AttendingKV, Llama, StepInputs
from . import fused, launching
from .kv import TunedKV


def can_fuse(decoder: Llama) -> bool:
    """Whether the decoder differs from Llama only in what FusedDecoder asks it for: turns, projections."""
    return type(decoder).forward is Llama.forward


def with_few_calls(decoder: Llama) -> Llama:
    """A decoder with the same weights and fewer calls, where there is one for the decoder and the machine; else the
    decoder itself."""
    if can_fuse(decoder) and launching.unavailable() is None:
        return FusedDecoder(decoder)
    if not on_gpu:
        from .compiled_decoder import CompiledDecoder, can_compile  # here: it loads llvmlite

        if can_compile(decoder):
            return CompiledDecoder(decoder)
    return decoder


class FusedDecoder(Llama):
    """Another decoder's weights, and the same tokens. The other one's step must be Llama's (`can_fuse`)."""

    def __init__(self, decoder: Llama) -> None:
        vars(self).update(vars(decoder))  # all that Llama.__init__ made
        self.decoder = decoder  # of a kind that turns and projects in its own way

    def forward(self, inputs: StepInputs, kv: AttendingKV) -> Array:
        """As Llama.forward: logits [num_rows, vocab_size], float32. The shapes are there."""
        config, eps = self.config, self.config.rms_norm_eps
        num_tokens, where = len(inputs.token_ids), inputs.addresses
        cos, sin = self.decoder.turns(inputs.positions)  # [num_tokens, 1, head_size] each
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
