"""What the tensors of each architecture are called in its files, and which of them are joined there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .architectures import Shapes, layer_tensors, outer_shapes
from .hf_config import HFConfig

COMPUTED = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")  # in old files: RoPE's frequencies, GPT-2's masks
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
# Names in the file, behind `layers.N.`, and the parts by Llama's names that lie there one after another.
JOINED: dict[str, dict[str, tuple[str, ...]]] = {
    "phi3": {"self_attn.qkv_proj": QKV, "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj")},
    "gpt2": {
        "attn.c_attn": QKV, "attn.c_proj": ("self_attn.o_proj",), "ln_1": ("input_layernorm",),
        "mlp.c_fc": ("mlp.up_proj",), "mlp.c_proj": ("mlp.down_proj",), "ln_2": ("post_attention_layernorm",),
    },
}  # fmt: skip
OUTER = {"gpt2": {"embed_tokens": "wte", "position_embeddings": "wpe", "norm": "ln_f"}}  # by Llama's names
PREFIXES = {"gpt2": "transformer."}  # of all names but the head's; else "model."
LAYERS = {"gpt2": "h."}  # else "layers."
TRANSPOSED = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")  # GPT-2's matrices are [in, out]


class StoredWeights(Mapping[str, np.ndarray]):
    """Tensors by Llama's names, read each time they are asked for: what `read` makes of the `places` of each."""

    def __init__(self, places: dict[str, Any], read: Callable[[Any], np.ndarray]) -> None:
        self.places, self.read = places, read

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, name: str) -> np.ndarray:
        return self.read(self.places[name])


@dataclass(slots=True)
class StoredTensor:
    """A tensor as a file has it."""

    shape: tuple[int, ...]
    transposed: bool = False
    parts: dict[str, int] = field(default_factory=dict)  # Llama's names of what is joined in it, and their rows


def require_tensors(where: object, wanted: Shapes, found: Shapes, model_type: str) -> None:
    """Raise ValueError unless a checkpoint has just the tensors that its config wants, each in its shape."""
    for name, shape in wanted.items():
        if name not in found:
            raise ValueError(f"{where} has no tensor {name}; the config wants one of shape {list(shape)}")
        if found[name] != shape:
            raise ValueError(f"{where}: {name} has shape {list(found[name])}; the config wants {list(shape)}")
    for name in found:
        if name not in wanted:
            raise ValueError(f"{where} has a tensor {name}; a {model_type} model has no place for it")


def table_name(config: HFConfig) -> str:
    """The embedding, without the prefix."""
    return OUTER.get(config.model_type, {}).get("embed_tokens", "embed_tokens") + ".weight"


def name_prefix(config: HFConfig, names: Iterable[str]) -> str:
    """What stands before the names in this file. Files of a base model, without a head, leave it out."""
    layers = LAYERS.get(config.model_type, "layers.")
    return "" if any(name.startswith(layers) for name in names) else PREFIXES.get(config.model_type, "model.")


def stored_tensors(config: HFConfig) -> dict[str, StoredTensor]:
    """Every tensor that a checkpoint of `config` must hold, by its name without the prefix."""
    family, stored = config.model_type, {}
    outer = OUTER.get(family, {})
    for name, shape in outer_shapes(config).items():
        base, _, kind = name.removeprefix("model.").rpartition(".")
        stored[f"{outer.get(base, base)}.{kind}"] = StoredTensor(shape, parts={name: shape[0]})
    joined = {part: whole for whole, parts in JOINED.get(family, {}).items() for part in parts}
    tensors: Shapes = {}
    for of_field in layer_tensors(config).values():
        tensors |= of_field
    for index in range(config.num_layers):
        for name, shape in tensors.items():
            base, _, kind = name.rpartition(".")
            whole = joined.get(base, base)
            at = f"{LAYERS.get(family, 'layers.')}{index}.{whole}.{kind}"
            tensor = stored.setdefault(at, StoredTensor((0, *shape[1:]), len(shape) == 2 and whole in TRANSPOSED))
            tensor.shape = (tensor.shape[0] + shape[0], *shape[1:])
            tensor.parts[f"model.layers.{index}.{name}"] = shape[0]
    for tensor in stored.values():
        if tensor.transposed:
            tensor.shape = tensor.shape[::-1]
    return stored
