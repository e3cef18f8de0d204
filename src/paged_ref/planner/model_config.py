"""A decoder in numbers, from the words of a config.json of any architecture: what matters for memory and time.

Read are grouped queries, MLA's latent (DeepSeek-V2, §2.1), windows by layer, experts, and layers that share K and V or
have none. Layers that keep a state of fixed size (Mamba, linear attention) have no K and V here. The parameters are
counted from the sizes; norms and biases of a family that is not known here are left out of the count.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

MOST = 2**31  # of any size in a config

# What config.json calls a size: the first name that is there.
NAMES = {
    "num_layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "hidden_size": ("hidden_size", "n_embd", "d_model"),
    "num_heads": ("num_attention_heads", "n_head", "n_heads"),
    "num_kv_heads": ("num_key_value_heads", "num_kv_heads", "n_head_kv", "multi_query_group_num"),
    "head_size": ("head_dim", "kv_channels", "attention_head_dim"),
    "intermediate_size": ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size"),
    "vocab_size": ("vocab_size", "padded_vocab_size"),
    "max_context": ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"),
    "num_experts": ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"),
    "experts_of_token": ("num_experts_per_tok", "experts_per_token", "moe_topk", "moe_k"),
    "expert_size": ("moe_intermediate_size", "expert_hidden_dim", "intermediate_size"),
}
TIED = ("gemma", "cohere", "opt", "gpt2", "bloom", "falcon")  # where the key is left out
UNGATED = ("opt", "gpt2", "gpt_neox", "gptj", "gpt_bigcode", "falcon", "bloom", "mpt", "phi", "starcoder2", "nemotron")
PERIODS = {"gemma2": 2, "gemma3": 6, "cohere2": 4, "gpt_oss": 2, "llama4": 4}  # of these layers one sees everything
FULL, WINDOWED = ("full_attention", "attention", "global"), ("sliding_attention", "chunked_attention", "local")
BITS = {"fp8": 8, "mxfp4": 4, "nvfp4": 4, "awq": 4, "gptq": 4}  # of weights, by quant_method


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One decoder, and in how many bits its weights and its K and V are kept."""

    name: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int  # between which GPUs can split K and V; MLA's latent is one
    head_size: int  # numbers of a key
    vocab_size: int
    max_context: int  # tokens, prompt and output together
    num_kv_layers: int  # that keep K and V of their own
    kv_numbers: int  # that such a layer keeps of a token: K and V of all heads, or MLA's latent
    pair_operations: int  # for a query and a key that it sees, over all layers
    num_parameters: int = 0
    num_looked_up: int = 0  # of these, in tables of which a step reads one row for each token, and multiplies none
    num_routed: int = 0  # of these, in experts of which a token uses a share
    routed_share: float = 1.0
    window: int | None = None  # tokens that a windowed layer sees
    num_windowed_layers: int = 0  # of num_kv_layers
    kv_share: float = 1.0  # of the K and V that is kept and read, where windowed layers drop what left the window
    kv_bytes_by_hand: int | None = None  # of a token, in all layers, in place of the product
    weight_bits: int = 16
    kv_bits: int = 16
    hub: str = ""  # the name on the Hugging Face hub, or the directory
    source: str = ""  # of the numbers, with its date

    @property
    def weight_bytes(self) -> int:
        return self.num_parameters * self.weight_bits // 8

    @property
    def num_active(self) -> int:
        """Parameters that a token meets."""
        return self.num_parameters - round(self.num_routed * (1 - self.routed_share))

    @property
    def num_arrays(self) -> int:
        """In which the K and V of a token lie: K and V of each layer; MLA has one array a layer."""
        is_latent = self.num_kv_heads and self.kv_numbers != 2 * self.num_kv_heads * self.head_size
        return self.num_kv_layers if is_latent else 2 * self.num_kv_layers

    @property
    def full_kv_bytes(self) -> int:
        """K and V of one token, over all layers (Kwon et al. 2023, §3), before a window drops any."""
        if self.kv_bytes_by_hand is not None:
            return self.kv_bytes_by_hand
        return self.num_kv_layers * self.kv_numbers * self.kv_bits // 8

    @property
    def kv_bytes_per_token(self) -> int:
        """The same of what is kept: a mean over the tokens of running sequences where layers have windows."""
        return max(1, round(self.full_kv_bytes * self.kv_share))

    @property
    def kv_arithmetic(self) -> str:
        """full_kv_bytes as a product that can be checked by hand."""
        if self.kv_bytes_by_hand is not None:
            return f"{self.full_kv_bytes:,} bytes, as given"
        size = f"{self.kv_bits // 8} {'byte' if self.kv_bits == 8 else 'bytes'} = {self.full_kv_bytes:,} bytes"
        if self.num_arrays == 2 * self.num_kv_layers:
            heads = f"{self.num_kv_layers} layers x {self.num_kv_heads} KV heads x {self.head_size}"
            return f"2 (K and V) x {heads} x {size}"
        return f"{self.num_kv_layers} layers x {self.kv_numbers} of the latent x {size}"

    def kept(self, length: int) -> int:
        """Bytes of K and V of a sequence of `length` tokens, without what has left the windows."""
        if self.window is None or not self.num_kv_layers:
            return self.full_kv_bytes * length
        windowed = self.full_kv_bytes * self.num_windowed_layers // self.num_kv_layers
        return (self.full_kv_bytes - windowed) * length + windowed * min(length, self.window)


def spec_of_config(config: Mapping[str, Any], name: str) -> ModelSpec:
    """A model in numbers. Raises ValueError that names the key: missing, or of the wrong kind."""
    text = config.get("text_config")
    config = {**config, **text} if isinstance(text, Mapping) else config  # of a model that sees pictures, too
    family = str(config.get("model_type", ""))
    num_layers, hidden, heads = (_size(config, key) for key in ("num_layers", "hidden_size", "num_heads"))
    multi_query = config.get("multi_query") is True and not config.get("new_decoder_architecture")
    kv_heads = 1 if multi_query else _size(config, "num_kv_heads", heads)
    if _name_of(config, "head_size") is None and hidden % heads:
        raise ValueError(f"hidden_size is {hidden}; without head_dim a multiple of the {heads} heads is needed")
    head = _size(config, "head_size", hidden // heads)
    kv_numbers, pair = 2 * kv_heads * head, 4 * heads * head
    if config.get("kv_lora_rank") is not None:  # MLA: a step multiplies with the latent itself
        latent, rope = _integer(config, "kv_lora_rank"), _integer(config, "qk_rope_head_dim")
        kv_heads, head, kv_numbers = 1, latent + rope, latent + rope
        pair = 2 * heads * (2 * latent + rope)
    kinds = _kinds_of_layers(config, family, num_layers)
    spec = ModelSpec(
        name=name,
        num_layers=num_layers,
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_size=head,
        vocab_size=_size(config, "vocab_size"),
        max_context=_size(config, "max_context"),
        num_kv_layers=_own_layers(config, sum(kind is not None for kind in kinds)),
        kv_numbers=kv_numbers,
        pair_operations=pair * sum(kind is not None for kind in kinds),
        window=max((kind for kind in kinds if kind), default=None),
        num_windowed_layers=sum(bool(kind) for kind in kinds[: _own_layers(config, len(kinds))]),
        weight_bits=_weight_bits(config),
    )
    return _with_parameters(spec, config, family)


# --- layers --------------------------------------------------------------------------------------------


def _kinds_of_layers(config: Mapping[str, Any], family: str, num_layers: int) -> list[int | None]:
    """For each layer its window, 0 where it sees everything, None where it has no K and V."""
    window = _window(config, family)
    names = config.get("layer_types")
    pattern = config.get("hybrid_override_pattern")  # Nemotron-H: a letter for each layer, * for attention
    if names is not None:
        if not isinstance(names, list) or len(names) != num_layers:
            raise ValueError(f"layer_types has to be a list of {num_layers} kinds, one for each layer")
        return [0 if kind in FULL else (window or 0) if kind in WINDOWED else None for kind in names]
    if isinstance(pattern, str):
        return [0 if letter == "*" else None for letter in pattern]
    if config.get("full_attention_interval") is not None:  # Qwen3-Next: the others are linear attention
        period = _integer(config, "full_attention_interval")
        return [None if (layer + 1) % period else 0 for layer in range(num_layers)]
    if config.get("attn_layer_period") is not None:  # Jamba: the others are Mamba
        period, offset = _integer(config, "attn_layer_period"), _integer(config, "attn_layer_offset", 0, least=0)
        return [0 if layer % period == offset else None for layer in range(num_layers)]
    if window is None:
        return [0] * num_layers
    known = next((period for start, period in PERIODS.items() if family.startswith(start)), None)
    period = _integer(config, "sliding_window_pattern", known or num_layers + 1)
    first = _integer(config, "max_window_layers", 0, least=0) if family.startswith("qwen2") else 0
    return [window if layer >= first and (layer + 1) % period else 0 for layer in range(num_layers)]


def _window(config: Mapping[str, Any], family: str) -> int | None:
    key = "attention_chunk_size" if config.get("attention_chunk_size") is not None else "sliding_window"
    if config.get(key) is None or (config.get("use_sliding_window") is False) or family in ("llama", "mixtral"):
        return None
    if family.startswith("qwen") and not config.get("use_sliding_window"):
        return None
    return _integer(config, key)


def _own_layers(config: Mapping[str, Any], num_layers: int) -> int:
    """Of the layers with K and V, those that do not use the K and V of an earlier layer."""
    if config.get("use_cla"):  # Hunyuan: each so many layers share
        return -(-num_layers // _integer(config, "cla_share_factor"))
    shared = _integer(config, "num_kv_shared_layers", 0, least=0)  # Gemma 3n: the last ones
    if shared >= num_layers:
        raise ValueError(f"num_kv_shared_layers is {shared}; fewer than the {num_layers} layers are needed")
    return num_layers - shared


# --- parameters ----------------------------------------------------------------------------------------


def _with_parameters(spec: ModelSpec, config: Mapping[str, Any], family: str) -> ModelSpec:
    """`spec` with its parameters counted."""
    hidden, embedding = spec.hidden_size, spec.vocab_size * spec.hidden_size
    tied = config.get("tie_word_embeddings", family.startswith(TIED))
    each = _attention(spec, config, family) + _norms(spec, family)
    gated = 2 if family in UNGATED else 3
    default = 4 * hidden if _name_of(config, "expert_size") is None else None
    dense_size = _integer(config, "intermediate_size_mlp", _size(config, "intermediate_size", default or 1))
    dense = gated * hidden * dense_size + (dense_size + hidden if family in ("opt", "gpt2") else 0)
    sparse = _sparse_layers(config, spec.num_layers)
    expert = shared = router = 0
    num_experts, used = 1, 1
    if sparse:
        num_experts, used = _size(config, "num_experts"), _size(config, "experts_of_token")
        if used > num_experts:
            raise ValueError(f"a token uses {used} of {num_experts} experts; at most all of them are possible")
        size = _size(config, "expert_size")
        expert = 3 * hidden * size + (2 * size + hidden if family == "gpt_oss" else 0)
        shared = 3 * hidden * _shared_size(config, family, size)
        router = hidden * num_experts + (num_experts if family in ("gpt_oss", "deepseek_v3", "kimi_k2") else 0)
        router += hidden if config.get("shared_expert_intermediate_size") else 0  # Qwen2-MoE: a gate
    routed = sparse * num_experts * expert
    layers = spec.num_layers * each + (spec.num_layers - sparse) * dense + sparse * (shared + router) + routed
    positions = (spec.max_context + 2) * hidden if family == "opt" else 0
    looked_up = positions + (0 if tied else embedding)
    final_norm = 2 * hidden if family == "opt" else hidden
    return replace(
        spec,
        num_parameters=layers + final_norm + embedding + looked_up,
        num_looked_up=looked_up,
        num_routed=routed,
        routed_share=used / num_experts,
    )


def _attention(spec: ModelSpec, config: Mapping[str, Any], family: str) -> int:
    """Parameters of one layer's attention."""
    hidden, heads = spec.hidden_size, spec.num_heads
    if config.get("kv_lora_rank") is not None:
        latent, rope = _integer(config, "kv_lora_rank"), _integer(config, "qk_rope_head_dim")
        nope, value = _integer(config, "qk_nope_head_dim"), _integer(config, "v_head_dim")
        kv = hidden * (latent + rope) + latent + latent * heads * (nope + value)
        if config.get("q_lora_rank") is None:
            query = hidden * heads * (nope + rope)
        else:
            rank = _integer(config, "q_lora_rank")
            query = hidden * rank + rank + rank * heads * (nope + rope)
        return kv + query + heads * value * hidden
    q_size, kv_size = heads * spec.head_size, spec.num_kv_heads * spec.head_size
    biases = 0
    if family == "gpt_oss":
        biases = q_size + 2 * kv_size + hidden + heads  # and the sinks
    elif family == "opt":
        biases = q_size + 2 * kv_size + hidden
    elif family.startswith("qwen2") or config.get("attention_bias"):
        biases = q_size + 2 * kv_size
    return 2 * hidden * (q_size + kv_size) + biases


def _norms(spec: ModelSpec, family: str) -> int:
    """Parameters of one layer's norms."""
    norms = (4 if family.startswith(("gemma2", "gemma3")) else 2) * spec.hidden_size
    norms *= 2 if family == "opt" else 1  # with a bias
    return norms + (2 * spec.head_size if family.startswith(("qwen3", "gemma3")) else 0)  # of q and k


def _sparse_layers(config: Mapping[str, Any], num_layers: int) -> int:
    """Layers whose feed-forward part is made of experts."""
    if _name_of(config, "num_experts") is None or _size(config, "num_experts") == 1:
        return 0
    dense = config.get("mlp_only_layers") or []
    first = _integer(config, "first_k_dense_replace", 0, least=0)
    step = next((key for key in ("decoder_sparse_step", "interleave_moe_layer_step") if config.get(key)), "")
    every = _integer(config, step) if step else 1
    return sum(layer >= first and not (layer + 1) % every and layer not in dense for layer in range(num_layers))


def _shared_size(config: Mapping[str, Any], family: str, expert_size: int) -> int:
    """The width of the experts that every token uses."""
    if config.get("shared_expert_intermediate_size"):
        return _integer(config, "shared_expert_intermediate_size")
    key = next((key for key in ("n_shared_experts", "num_shared_experts") if config.get(key)), "")
    number = _integer(config, key) if key else int(family.startswith("llama4"))
    return number * expert_size


def _weight_bits(config: Mapping[str, Any]) -> int:
    """Of the published weights. Some layers of a quantized model keep 16 bits, which is not counted."""
    quantized = config.get("quantization_config")
    if not isinstance(quantized, Mapping):
        return 16
    bits = quantized.get("bits", BITS.get(str(quantized.get("quant_method")), 16))
    return bits if bits in (2, 3, 4, 8, 16, 32) else 16


# --- values --------------------------------------------------------------------------------------------


def _name_of(config: Mapping[str, Any], key: str) -> str | None:
    return next((name for name in NAMES[key] if config.get(name) is not None), None)


def _size(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """The size under the first of its NAMES."""
    name = _name_of(config, key)
    if name is None and default is None:
        raise ValueError(f"{NAMES[key][0]} is missing (other names: {', '.join(NAMES[key][1:])})")
    return _integer(config, name or NAMES[key][0], default)


def _integer(config: Mapping[str, Any], key: str, default: int | None = None, least: int = 1) -> int:
    value = default if config.get(key) is None else config[key]
    if value is None:
        raise ValueError(f"{key} is missing")
    if type(value) is not int or not least <= value <= MOST:
        raise ValueError(f"{key} is {str(value)[:40]}; an integer of {least} to {MOST} is needed")
    return value
