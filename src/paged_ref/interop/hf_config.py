"""Hugging Face's config.json in the core's words: dialects, defaults, and refusals by name."""

from __future__ import annotations

import reprlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..core.model.config import ModelConfig
from ..extras.memory_limit import require_memory

LAYER_BYTES = 1 << 16  # that a layer takes here at least: the names, shapes and arrays of its tensors
MOST = 2**31 - 1  # of any size in a config
MISTRAL_WINDOW = 4096  # of a Mistral whose config has no key `sliding_window`, as transformers has
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True, slots=True)
class Llama3RopeScaling:
    """How Llama 3.1 stretches RoPE beyond its first training context (Grattafiori et al. 2024)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, slots=True)
class HFConfig(ModelConfig):
    """A ModelConfig, and what makes its architecture another one than the core's Llama (architectures.py)."""

    model_type: str = "llama"
    rope_scaling: Llama3RopeScaling | None = None
    attention_bias: bool = False  # Qwen2: a bias on q, k and v
    qk_norm: bool = False  # Qwen3: RMSNorm on each head of q and k


def config_from_hf(hf: Mapping[str, Any]) -> HFConfig:
    """The config in the words of config.json, old or as transformers 5 writes it (`rope_parameters`).

    Raises ValueError that names the key: missing, of the wrong kind, or a feature that is not supported.
    """
    model_type = hf.get("model_type")
    if model_type not in ARCHITECTURES:
        raise ValueError(f"model_type is {reprlib.repr(model_type)}; known are {', '.join(ARCHITECTURES)}")
    _refuse_unsupported(hf)
    num_layers = _integer(hf, "num_hidden_layers")
    require_memory(f"num_hidden_layers is {num_layers}, which", LAYER_BYTES * num_layers)
    hidden_size, num_heads = _integer(hf, "hidden_size"), _integer(hf, "num_attention_heads")
    if hf.get("head_dim") is None and hidden_size % num_heads:
        raise ValueError(
            f"hidden_size is {hidden_size}; without head_dim a multiple of the {num_heads} "
            "num_attention_heads is needed"
        )
    rope_theta, rope_scaling = _rope(hf)
    return HFConfig(
        vocab_size=_integer(hf, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=_integer(hf, "intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=_integer(hf, "num_key_value_heads", default=num_heads),
        head_size=_integer(hf, "head_dim", default=hidden_size // num_heads),
        max_position_embeddings=_integer(hf, "max_position_embeddings"),
        rms_norm_eps=_number(hf, "rms_norm_eps", default=1e-6),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        tie_word_embeddings=_flag(hf, "tie_word_embeddings"),
        attention_bias=model_type == "qwen2",
        qk_norm=model_type == "qwen3",
        sliding_windows=_sliding_windows(hf, model_type, num_layers),
        bos_token_id=next(iter(token_ids(hf, "bos_token_id")), None),
        eos_token_ids=token_ids(hf, "eos_token_id"),
        model_type=model_type,
    )


def token_ids(hf: Mapping[str, Any], key: str) -> tuple[int, ...]:
    """The token ids under `key`, which Hugging Face writes as null, one int, or a list of them."""
    value = hf.get(key)
    values = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(v) is int and v >= 0 for v in values):
        raise ValueError(f"{key} is {reprlib.repr(value)}; a token id or a list of them is needed")
    return tuple(values)


def _refuse_unsupported(hf: Mapping[str, Any]) -> None:
    """A feature that is not there is refused by name, since weights alone would run and give nonsense."""
    if hf.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act is {reprlib.repr(hf['hidden_act'])}; known is silu")
    for key in ("attention_bias", "mlp_bias"):
        if hf.get(key):
            raise ValueError(f"{key} is {reprlib.repr(hf[key])}; not supported (Qwen2's bias on q, k and v is)")
    if hf.get("quantization_config"):
        raise ValueError("quantization_config is set; quantized weights are not supported")


def _rope(hf: Mapping[str, Any]) -> tuple[float, Llama3RopeScaling | None]:
    """theta and scaling, from `rope_parameters` (transformers 5) or from `rope_theta` and `rope_scaling`."""
    key = "rope_parameters" if hf.get("rope_parameters") is not None else "rope_scaling"
    rope = hf.get(key) or {}
    if not isinstance(rope, Mapping):
        raise ValueError(f"{key} is {reprlib.repr(rope)}; an object is needed")
    theta = _number({**hf, **rope}, "rope_theta", default=10000.0)
    if _number({**hf, **rope}, "partial_rotary_factor", default=1.0) != 1.0:
        raise ValueError("partial_rotary_factor is not 1; RoPE on a part of a head is not supported")
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type == "default":
        return theta, None
    if rope_type != "llama3":
        raise ValueError(f"rope_type in {key} is {reprlib.repr(rope_type)}; known are default, llama3")
    low, high = (_number(rope, f"{which}_freq_factor") for which in ("low", "high"))
    if low >= high:
        raise ValueError(f"low_freq_factor in {key} is {low}; less than the high_freq_factor of {high} is needed")
    return theta, Llama3RopeScaling(
        factor=_number(rope, "factor"),
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_position_embeddings=_integer(rope, "original_max_position_embeddings"),
    )


def _sliding_windows(hf: Mapping[str, Any], model_type: str, num_layers: int) -> tuple[int | None, ...]:
    """Mistral: the same window in every layer. Qwen: only where use_sliding_window says so, and by layer."""
    if model_type == "mistral":
        hf = {"sliding_window": MISTRAL_WINDOW, **hf}
    if model_type == "llama" or hf.get("sliding_window") is None:
        return ()
    if model_type != "mistral" and not _flag(hf, "use_sliding_window"):
        return ()
    window = _integer(hf, "sliding_window")
    if model_type == "mistral":
        return (window,) * num_layers
    layer_types = hf.get("layer_types")
    if layer_types is None:  # before transformers 4.53: the first layers see everything
        first = _integer(hf, "max_window_layers", least=0)
        return tuple(window if layer >= first else None for layer in range(num_layers))
    known = {"full_attention": None, "sliding_attention": window}
    if not isinstance(layer_types, list) or len(layer_types) != num_layers:
        raise ValueError(f"layer_types is {reprlib.repr(layer_types)}; a list of {num_layers} kinds is needed")
    unknown = [kind for kind in layer_types if not isinstance(kind, str) or kind not in known]
    if unknown:
        raise ValueError(f"layer_types holds {reprlib.repr(unknown[0])}; known are {', '.join(known)}")
    return tuple(known[kind] for kind in layer_types)


def _integer(hf: Mapping[str, Any], key: str, default: int | None = None, least: int = 1) -> int:
    value = default if hf.get(key) is None else hf[key]
    if value is None:
        raise ValueError(f"{key} is missing")
    if type(value) is not int or not least <= value <= MOST:
        allowed = f"at least {least}" if type(value) is not int or value < least else f"at most {MOST}"
        raise ValueError(f"{key} is {reprlib.repr(value)}; an integer of {allowed} is needed")
    return value


def _number(hf: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = default if hf.get(key) is None else hf[key]
    if value is None:
        raise ValueError(f"{key} is missing")
    if type(value) not in (int, float) or not 0 < value <= sys.float_info.max:
        raise ValueError(f"{key} is {reprlib.repr(value)}; a number above 0 is needed")
    return float(value)


def _flag(hf: Mapping[str, Any], key: str) -> bool:
    value = hf.get(key)
    if value is not None and type(value) is not bool:
        raise ValueError(f"{key} is {reprlib.repr(value)}; true or false is needed")
    return bool(value)
