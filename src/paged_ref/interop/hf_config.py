"""Hugging Face's config.json in the core's words: dialects, defaults, and refusals by name."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from ..core.model.config import ModelConfig
from ..extras.memory_limit import require_memory
from .rope import KINDS, Kind, RopeScaling

LAYER_BYTES = 1 << 16  # that a layer takes here at least: the names, shapes and arrays of its tensors
MOST = 2**31 - 1  # of any size in a config
SMALLEST, LARGEST = 1e-12, 1e12  # of any other number: RoPE multiplies three of them with a position, in float32


@dataclass(frozen=True, slots=True)
class HFConfig(ModelConfig):
    """A ModelConfig, and what makes its architecture another one than the core's Llama (architectures.py)."""

    model_type: str = "llama"
    rope_scaling: RopeScaling | None = None
    local_rope_theta: float | None = None  # Gemma 3: of the layers with a window, which are not scaled
    learned_positions: bool = False  # GPT-2: a vector for each position is added to the embedding; there is no RoPE
    embedding_scale: float = 1.0
    qkv_bias: bool = False
    output_bias: bool = False  # of attention
    mlp_bias: bool = False
    qk_norm: Literal["head", "whole"] | None = None  # RMSNorm on q and k: on each head, or on all heads together
    norms: Literal["before", "after", "around"] = "before"  # where each half of a layer has its norms
    layer_norm: bool = False  # LayerNorm with biases in place of RMSNorm
    norm_offset: float = 0.0  # Gemma: norms multiply by this plus the weight
    activation: Literal["silu", "gelu"] = "silu"  # gelu: with tanh
    gated: bool = True  # False: the MLP has no gate
    query_scale: float = 1.0  # of queries, beside attention's own 1 / sqrt(head_size)
    attention_softcap: float | None = None
    logits_softcap: float | None = None

    @property
    def variations(self) -> set[str]:
        """The names of the fields that are otherwise than in the core's Llama."""
        own = {field.name: field.default for field in fields(self) if field.name not in ModelConfig.__slots__}
        return {name for name, plain in own.items() if getattr(self, name) != plain} - {"model_type"}


GEMMAS = ("gemma2", "gemma3_text")
_GEMMA_PIECES = {"norm_offset": 1.0, "activation": "gelu", "norms": "around"}
ARCHITECTURES: dict[str, dict[str, Any]] = {  # the fields of HFConfig that no key of config.json says
    "llama": {},
    "mistral": {},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": "head"},
    "phi3": {},
    "olmo2": {"norms": "after", "qk_norm": "whole"},
    "gemma2": _GEMMA_PIECES,
    "gemma3_text": {**_GEMMA_PIECES, "qk_norm": "head"},
    "gpt2": {
        "learned_positions": True, "layer_norm": True, "gated": False, "activation": "gelu",
        "qkv_bias": True, "output_bias": True, "mlp_bias": True,
    },
}  # fmt: skip
_GEMMA = {"tie_word_embeddings": True, "head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 4096}
DEFAULTS: dict[str, dict[str, Any]] = {  # of keys that are left out, as transformers has them
    "mistral": {"sliding_window": 4096},
    "phi3": {"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096},
    "olmo2": {"rms_norm_eps": 1e-5},
    "gemma2": {**_GEMMA, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "sliding_window_pattern": 2},
    "gemma3_text": {**_GEMMA, "rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": 6},
    "gpt2": {"tie_word_embeddings": True, "layer_norm_epsilon": 1e-5},
}
_GEMMA_NAMES = {"hidden_act": "hidden_activation"}
NAMES: dict[str, dict[str, str]] = {  # what an architecture calls a key
    "gemma2": _GEMMA_NAMES,
    "gemma3_text": _GEMMA_NAMES,
    "gpt2": {
        "hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions", "intermediate_size": "n_inner",
        "hidden_act": "activation_function", "rms_norm_eps": "layer_norm_epsilon",
    },
}  # fmt: skip
ACTIVATIONS = {"silu": ("silu", "swish"), "gelu": ("gelu_pytorch_tanh", "gelu_new", "gelu_fast")}
# Keys of features that are not there, with the value that means their absence.
REFUSED: dict[str, bool | None] = {
    "use_bidirectional_attention": False, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False,
    "scale_attn_weights": True, "quantization_config": None,
}  # fmt: skip


def config_from_hf(hf: Mapping[str, Any]) -> HFConfig:
    """The config in the words of config.json, old or as transformers 5 writes it (`rope_parameters`).

    Raises ValueError that names the key: missing, of the wrong kind, or a feature that is not supported.
    """
    model_type = hf.get("model_type")
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        raise ValueError(f"model_type is {reprlib.repr(model_type)}; known are {', '.join(ARCHITECTURES)}")
    keys = Keys({**DEFAULTS.get(model_type, {}), **hf}, NAMES.get(model_type, {}))
    pieces = _pieces(keys, model_type)
    num_layers = keys.integer("num_hidden_layers")
    require_memory(f"{keys.name('num_hidden_layers')} is {num_layers}, which", LAYER_BYTES * num_layers)
    hidden_size, num_heads = keys.integer("hidden_size"), keys.integer("num_attention_heads")
    if keys.get("head_dim") is None and hidden_size % num_heads:
        raise ValueError(
            f"{keys.name('hidden_size')} is {hidden_size}; without head_dim a multiple of the {num_heads} "
            f"{keys.name('num_attention_heads')} is needed"
        )
    head_size = keys.integer("head_dim", default=hidden_size // num_heads)
    context = keys.integer("max_position_embeddings")
    if model_type != "gpt2":
        pieces |= _rope(keys, model_type, context, head_size)
        context = _stretched(context, pieces["rope_scaling"], model_type)
    if model_type in GEMMAS:
        pieces["embedding_scale"] = math.sqrt(hidden_size)
        pieces["query_scale"] = math.sqrt(head_size / keys.number("query_pre_attn_scalar"))
    return HFConfig(
        vocab_size=keys.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=keys.integer("intermediate_size", default=4 * hidden_size if model_type == "gpt2" else None),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=keys.integer("num_key_value_heads", default=num_heads),
        head_size=head_size,
        max_position_embeddings=context,
        rms_norm_eps=keys.number("rms_norm_eps", default=1e-6),
        tie_word_embeddings=keys.flag("tie_word_embeddings"),
        sliding_windows=_sliding_windows(keys, model_type, num_layers),
        bos_token_id=next(iter(token_ids(hf, "bos_token_id")), None),
        eos_token_ids=token_ids(hf, "eos_token_id"),
        model_type=model_type,
        **pieces,
    )


def token_ids(hf: Mapping[str, Any], key: str) -> tuple[int, ...]:
    """The token ids under `key`, which Hugging Face writes as null, one int, or a list of them."""
    value = hf.get(key)
    values = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(v) is int and v >= 0 for v in values):
        raise ValueError(f"{key} is {reprlib.repr(value)}; a token id or a list of them is needed")
    return tuple(values)


class Keys:
    """The keys of config.json by Llama's names; messages have the file's own."""

    def __init__(self, hf: Mapping[str, Any], names: Mapping[str, str]) -> None:
        self.hf, self.names = hf, names

    def name(self, key: str) -> str:
        return self.names.get(key, key)

    def get(self, key: str) -> Any:
        return self.hf.get(self.name(key))

    def integer(self, key: str, default: int | None = None, least: int = 1) -> int:
        value = self._value(key, default)
        if type(value) is not int or not least <= value <= MOST:
            allowed = f"at least {least}" if type(value) is not int or value < least else f"at most {MOST}"
            raise ValueError(f"{self.name(key)} is {reprlib.repr(value)}; an integer of {allowed} is needed")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._value(key, default)
        if type(value) not in (int, float) or not SMALLEST <= value <= LARGEST:
            needed = f"of {SMALLEST} to {LARGEST:.0e}" if type(value) in (int, float) and value > 0 else "above 0"
            raise ValueError(f"{self.name(key)} is {reprlib.repr(value)}; a number {needed} is needed")
        return float(value)

    def numbers(self, key: str, count: int) -> tuple[float, ...]:
        values = self._value(key, None)
        if not isinstance(values, list) or len(values) != count:
            raise ValueError(f"{self.name(key)} is {reprlib.repr(values)}; a list of {count} numbers is needed")
        return tuple(Keys({self.name(key): value}, self.names).number(key) for value in values)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self._value(key, default)
        if type(value) is not bool:
            raise ValueError(f"{self.name(key)} is {reprlib.repr(value)}; true or false is needed")
        return value

    def _value(self, key: str, default: Any) -> Any:
        value = default if self.get(key) is None else self.get(key)
        if value is None:
            raise ValueError(f"{self.name(key)} is missing")
        return value


def _pieces(keys: Keys, model_type: str) -> dict[str, Any]:
    """The architecture's own fields, and those that a key turns on. A feature that is not there is refused by name,
    since weights alone would run and give nonsense."""
    pieces = dict(ARCHITECTURES[model_type])
    for key, absent in REFUSED.items():
        if keys.get(key) not in (None, absent):
            raise ValueError(f"{key} is {reprlib.repr(keys.get(key))}; not supported")
    known = ACTIVATIONS[pieces.get("activation", "silu")]
    if keys.get("hidden_act") is not None and keys.get("hidden_act") not in known:
        name, value = keys.name("hidden_act"), reprlib.repr(keys.get("hidden_act"))
        raise ValueError(f"{name} is {value}; for a {model_type}, known are {', '.join(known)}")
    for key, fields_, families in (
        ("attention_bias", ("qkv_bias", "output_bias"), ("llama", "qwen3", "olmo2", *GEMMAS)),
        ("mlp_bias", ("mlp_bias",), ("llama",)),
    ):
        if keys.flag(key):
            if model_type not in families:
                raise ValueError(f"{key} is True; a {model_type} has no such bias (known for {', '.join(families)})")
            pieces |= dict.fromkeys(fields_, True)
    caps = {"attn_logit_softcapping": "attention_softcap", "final_logit_softcapping": "logits_softcap"}
    for key, field in caps.items():
        if keys.get(key) is not None:
            if model_type != "gemma2" and (model_type, key) != ("gemma3_text", "final_logit_softcapping"):
                raise ValueError(f"{key} is {reprlib.repr(keys.get(key))}; a {model_type} has no such cap")
            pieces[field] = keys.number(key)
    return pieces


def _rope(keys: Keys, model_type: str, context: int, head_size: int) -> dict[str, Any]:
    """The fields about RoPE, from `rope_parameters` (transformers 5) or from `rope_theta` and `rope_scaling`."""
    key = "rope_parameters" if keys.get("rope_parameters") is not None else "rope_scaling"
    rope = _mapping(key, keys.get(key))
    local: Mapping[str, Any] = {}
    if model_type == "gemma3_text" and not {"full_attention", "sliding_attention"}.isdisjoint(rope):
        local = _mapping(f"sliding_attention in {key}", rope.get("sliding_attention"))
        rope = _mapping(f"full_attention in {key}", rope.get("full_attention"))
    words = Keys({**keys.hf, **rope}, {})
    if words.number("partial_rotary_factor", default=1.0) != 1.0:
        raise ValueError("partial_rotary_factor is not 1; RoPE on a part of a head is not supported")
    found: dict[str, Any] = {"rope_theta": words.number("rope_theta", default=10000.0), "rope_scaling": None}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if model_type == "phi3" and kind in ("su", "yarn"):  # as early files call it
        kind = "longrope"
    if kind != "default":
        if kind not in KINDS:
            raise ValueError(f"rope_type in {key} is {reprlib.repr(kind)}; known are default, {', '.join(KINDS)}")
        found["rope_scaling"] = _scaling(words, kind, key, context, head_size)
    if model_type == "gemma3_text":
        local_kind = local.get("rope_type", "default")
        if local_kind != "default":
            raise ValueError(f"rope_type of sliding_attention is {reprlib.repr(local_kind)}; known is default")
        theta = local.get("rope_theta", keys.get("rope_local_base_freq"))
        found["local_rope_theta"] = Keys({"rope_local_base_freq": theta}, {}).number("rope_local_base_freq")
    return found


def _mapping(key: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value or {}, Mapping):
        raise ValueError(f"{key} is {reprlib.repr(value)}; an object is needed")
    return value or {}


def _scaling(words: Keys, kind: Kind, key: str, context: int, head_size: int) -> RopeScaling:
    """The scaling of this kind, with transformers' defaults."""
    original = context
    if kind in ("llama3", "yarn", "longrope"):
        original = words.integer("original_max_position_embeddings", default=context, least=2)
    factor = words.number("factor", default=context / original if kind in ("yarn", "longrope") else None)
    if kind == "llama3":
        low, high = (words.number(f"{which}_freq_factor") for which in ("low", "high"))
        if low >= high:
            raise ValueError(f"low_freq_factor in {key} is {low}; less than the high_freq_factor of {high} is needed")
        return RopeScaling(kind, factor, original, slow=low, fast=high)
    if kind == "yarn":
        if words.number("rope_theta", default=10000.0) <= 1:
            raise ValueError(f"rope_theta is {words.get('rope_theta')}; with yarn, more than 1 is needed")
        return RopeScaling(
            kind, factor, original, _yarn_magnitude(words, factor), words.number("beta_slow", default=1.0),
            words.number("beta_fast", default=32.0), words.flag("truncate", default=True),
        )  # fmt: skip
    if kind == "longrope":
        magnitude = math.sqrt(1 + math.log(max(1.0, factor)) / math.log(original))
        return RopeScaling(
            kind, factor, original, words.number("attention_factor", default=magnitude),
            short_factors=words.numbers("short_factor", head_size // 2),
            long_factors=words.numbers("long_factor", head_size // 2),
        )  # fmt: skip
    if kind == "dynamic" and head_size == 2:
        raise ValueError("head_dim is 2; dynamic RoPE needs at least 4")
    return RopeScaling(kind, factor, original)


def _yarn_magnitude(words: Keys, factor: float) -> float:
    """Longer contexts make attention flatter; larger queries and keys sharpen it again (Peng et al. 2023, §3.4)."""

    def grown(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0

    default = grown(1.0)
    if words.get("mscale") and words.get("mscale_all_dim"):
        default = grown(words.number("mscale")) / grown(words.number("mscale_all_dim"))
    return words.number("attention_factor", default=default)


def _stretched(context: int, scaling: RopeScaling | None, model_type: str) -> int:
    """The context that a model is for. Its `max_position_embeddings` is the one before stretching for the older kinds,
    as vLLM reads it; Llama 3.1, longrope and Gemma 3 say the one after."""
    if scaling is None or scaling.kind in ("llama3", "longrope") or model_type == "gemma3_text":
        return context
    return max(context, int(min(MOST, scaling.original * scaling.factor)))


def _sliding_windows(keys: Keys, model_type: str, num_layers: int) -> tuple[int | None, ...]:
    """The same in every layer (Mistral, Phi-3), or by layer (Qwen, where use_sliding_window says so, and Gemma)."""
    if model_type in ("llama", "olmo2", "gpt2") or (keys.get("sliding_window") is None and model_type not in GEMMAS):
        return ()
    if model_type in ("qwen2", "qwen3") and not keys.flag("use_sliding_window"):
        return ()
    window = keys.integer("sliding_window")
    if model_type in ("mistral", "phi3"):
        return (window,) * num_layers
    layer_types = keys.get("layer_types")
    if layer_types is None and model_type in GEMMAS:  # one layer of each `pattern` sees everything
        pattern = keys.integer("sliding_window_pattern")
        return tuple(window if (layer + 1) % pattern else None for layer in range(num_layers))
    if layer_types is None:  # before transformers 4.53: the first layers see everything
        first = keys.integer("max_window_layers", least=0)
        return tuple(window if layer >= first else None for layer in range(num_layers))
    known = {"full_attention": None, "sliding_attention": window}
    if not isinstance(layer_types, list) or len(layer_types) != num_layers:
        raise ValueError(f"layer_types is {reprlib.repr(layer_types)}; a list of {num_layers} kinds is needed")
    unknown = [kind for kind in layer_types if not isinstance(kind, str) or kind not in known]
    if unknown:
        raise ValueError(f"layer_types holds {reprlib.repr(unknown[0])}; known are {', '.join(known)}")
    return tuple(known[kind] for kind in layer_types)
