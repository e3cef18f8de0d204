"""Which part of a model each rank holds, as in Megatron-LM (Shoeybi et al. 2019).

The products that read the hidden state are split by their outputs: heads of q, k and v, columns of gate and up. The two
that make it are split by their inputs, so each rank has a part of every sum, and one all-reduce adds the parts: two in
a layer. The head is split by tokens, and its logits are gathered on rank 0. Norms and the embedding are on every rank.
"""

from __future__ import annotations

from collections import UserDict
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from ..core.checks import plural
from ..core.device import Array
from ..core.model.config import ModelConfig
from ..core.model.llama import Llama
from .group import Group

# By the end of a tensor's name: the axis that is split, and what of it goes together.
QUERY, KV, INNER, TOKENS = "num_heads", "num_kv_heads", "intermediate_size", "vocab_size"
SPLIT = {
    **{f"self_attn.q_proj.{kind}": (0, QUERY) for kind in ("weight", "bias")},
    **{f"self_attn.{name}_proj.{kind}": (0, KV) for name in "kv" for kind in ("weight", "bias")},
    "self_attn.o_proj.weight": (1, QUERY),
    **{f"mlp.{name}_proj.{kind}": (0, INNER) for name in ("gate", "up") for kind in ("weight", "bias")},
    "mlp.down_proj.weight": (1, INNER),
    "lm_head.weight": (0, TOKENS),
}


def part_of(total: int, rank: int, size: int) -> range:
    """The part of `total` things that a rank holds. Fewer things than ranks: each rank holds one, and shares it."""
    if total < size and size % total == 0:
        return range(rank * total // size, rank * total // size + 1)
    return range(total * rank // size, total * (rank + 1) // size)


def heads_of_ranks(config: ModelConfig, size: int) -> list[tuple[tuple[int, int], ...]]:
    """The query heads of each rank, from the first up to the one after the last; and the KV heads."""
    parts = [[part_of(total, i, size) for i in range(size)] for total in (config.num_heads, config.num_kv_heads)]
    return [tuple((part.start, part.stop) for part in each) for each in parts]


class Part(UserDict[str, np.ndarray]):
    """The weights of one rank, cut out of `weights` when they are asked for; `config` is that of the rank's part, but
    for the vocabulary. Raises ValueError, with the numbers of ranks that do, where they do not divide the heads."""

    def __init__(self, config: ModelConfig, weights: Mapping[str, np.ndarray], rank: int, size: int) -> None:
        heads, kv_heads = config.num_heads, config.num_kv_heads
        known = [n for n in range(1, heads + 1) if heads % n == 0 and (kv_heads % n == 0 or n % kv_heads == 0)]
        if size not in known:
            both = f"{plural(heads, 'head')} and {plural(kv_heads, 'KV head')}"
            raise ValueError(f"{size} ranks cannot share {both}; {str(known)[1:-1]} can")
        if getattr(config, "qk_norm", None) == "whole":
            raise ValueError(f"{size} ranks cannot share a model that has a norm over all heads together")
        parts = {name: part_of(getattr(config, name), rank, size) for name in (QUERY, KV, INNER, TOKENS)}
        unit = {QUERY: config.head_size, KV: config.head_size}  # rows of a head
        self.rows = {name: slice(p.start * unit.get(name, 1), p.stop * unit.get(name, 1)) for name, p in parts.items()}
        self.config = replace(config, **{name: len(parts[name]) for name in (QUERY, KV, INNER)})  # type: ignore[arg-type]
        self.data = weights  # type: ignore[assignment]  # read only

    def __getitem__(self, name: str) -> np.ndarray:
        whole = self.data[name]
        for end, (axis, what) in SPLIT.items():
            if name.endswith(end):
                return whole[self.rows[what]] if axis == 0 else whole[:, self.rows[what]]
        return whole


def split_products(decoder: Llama, group: Group) -> None:
    """Make a decoder that has the weights of a Part compute the hidden states of the whole model, and on rank 0 the
    logits: to its product of `x [rows, in]` and `weight [out, in]` comes what the other ranks have of it."""
    linear, tokens = decoder.linear, part_of(decoder.config.vocab_size, group.rank, group.size)
    if decoder.head is decoder.embedding:  # tied: the rows of this rank, in the same memory
        decoder.head = decoder.embedding[tokens.start : tokens.stop]
    summed = {id(weight) for layer in decoder.layers for weight in (layer.output, layer.down)}

    def product(x: Array, weight: Array) -> Array:
        y = linear(x, weight)  # [rows, out]
        if id(weight) in summed:
            return group.sum(y)
        return group.gather(y) if weight is decoder.head else y

    decoder.linear = product
