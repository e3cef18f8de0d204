"""A model in one GGUF file, as llama.cpp has them: config, weights and tokenizer. Needs the package `gguf`.

Weights that are quantized there become float32, each time they are asked for. Known are the architectures that GGUF
calls llama (Llama, Mistral, SmolLM and their kind), qwen2 and qwen3.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from ..core.model.loading import Checkpoint
from ..core.model.tokenizer import Tokenizer
from ..extras.memory_limit import require_memory
from .architectures import num_weights, weight_shapes
from .hf_config import HFConfig, config_from_hf
from .hf_tokenizer import HFTokenizer, MissingTokenizer, read_tokenizer
from .rope import RopeScaling
from .tensor_names import StoredWeights, require_tensors

ARCHITECTURES = ("llama", "qwen2", "qwen3")
SIZES = {  # config.json's keys, and GGUF's behind the name of the architecture
    "hidden_size": "embedding_length", "intermediate_size": "feed_forward_length", "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count", "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length", "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon", "rope_theta": "rope.freq_base",
}  # fmt: skip
OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
LAYER = {  # Llama's names behind `model.layers.N.`, and GGUF's behind `blk.N.`
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
REFUSED = {"expert_count": 0, "attention.sliding_window": 0, "rope.scale_linear": 1.0}  # and what means their absence
ROPE_FACTORS = "rope_freqs.weight"  # Llama 3's scaling, as a divisor for each pair
CHAT_TEMPLATE = "tokenizer.chat_template"  # the default one; others have their name behind it
ROLES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
CONTROL, USER_DEFINED = 3, 4  # types of tokens that are never split
DIGITS, WORDS = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
# How a text is cut before byte pairs are joined, by GGUF's name.
CUTS: dict[str, list[Any]] = {"default": [WORDS], "gpt-2": [WORDS], "smollm": [DIGITS, WORDS]}
_PATTERN = (  # of Llama 3 and Qwen 2, which differ in how many digits stand together
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
for _name, _digits in (("llama-bpe", "{1,3}"), ("qwen2", "")):
    _cut = pre_tokenizers.Split(tokenizers.Regex(_PATTERN.format(digits=_digits)), "isolated")
    CUTS[_name] = [_cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]


def read_tensor(stored: tuple[Any, int]) -> np.ndarray:
    """float32, from a tensor and, where its rows are permuted, the number of its heads, else 0."""
    from gguf.quants import dequantize

    tensor, heads = stored
    numbers: np.ndarray = dequantize(tensor.data, tensor.tensor_type).reshape(shape_of(tensor))
    if not heads:
        return numbers
    # llama.cpp turns neighbours, as Meta's files do: row 2i + j of a head is row i + j * head_size // 2 here.
    pairs = numbers.reshape(heads, -1, 2, *numbers.shape[1:])
    return pairs.swapaxes(1, 2).reshape(numbers.shape)


def shape_of(tensor: Any) -> tuple[int, ...]:
    """GGUF names the last axis first."""
    return tuple(int(size) for size in reversed(tensor.shape))


def load_gguf(path: Path) -> Checkpoint:
    """Read a GGUF file. A tokenizer.json beside it is taken before the tokenizer inside; without either, prompts are
    token ids. Raises ValueError, in one sentence."""
    reader = _open(path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    config = _config(reader, tensors)
    require_memory("a model of this size", 2 * num_weights(config), device=True)
    beside = path.with_name("tokenizer.json")
    tokenizer = read_tokenizer(beside) if beside.exists() else _tokenizer(reader, path)
    if isinstance(tokenizer, HFTokenizer):
        tokenizer.chat_templates = {**_chat_templates(reader), **tokenizer.chat_templates}
    return Checkpoint(config, _find_weights(config, tensors), tokenizer)


def _open(path: Path) -> Any:
    try:
        from gguf import GGUFReader
    except ImportError:
        raise ValueError("a GGUF file needs the package gguf: pip install gguf") from None
    try:
        return GGUFReader(path)
    except Exception as error:  # whatever the package trips over
        raise ValueError(f"this is not a whole GGUF file: {str(error) or type(error).__name__}") from None


def _value(reader: Any, key: str, default: Any = None) -> Any:
    field = reader.get_field(key)
    return default if field is None else field.contents()


def _config(reader: Any, tensors: Mapping[str, Any]) -> HFConfig:
    family = _value(reader, "general.architecture")
    if family not in ARCHITECTURES:
        raise ValueError(f"general.architecture is {family!r}; known are {', '.join(ARCHITECTURES)}")
    hf = {key: _value(reader, f"{family}.{name}") for key, name in SIZES.items()}
    if "token_embd.weight" not in tensors:
        raise ValueError("the file has no tensor token_embd.weight")
    hf |= {"model_type": family, "vocab_size": shape_of(tensors["token_embd.weight"])[0]}
    bos, *ends = (_value(reader, f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "eot"))
    hf |= {"bos_token_id": bos, "eos_token_id": [end for end in ends if end is not None]}  # eot: of a chat's turn
    hf["tie_word_embeddings"] = "output.weight" not in tensors
    for key, absent in REFUSED.items():
        if _value(reader, f"{family}.{key}", absent) != absent:
            raise ValueError(f"{family}.{key} is {_value(reader, f'{family}.{key}')}; not supported")
    kind = _value(reader, f"{family}.rope.scaling.type", "none")
    if kind == "linear":
        hf["rope_scaling"] = {"rope_type": kind, "factor": _value(reader, f"{family}.rope.scaling.factor")}
    elif kind != "none":
        raise ValueError(f"{family}.rope.scaling.type is {kind!r}; known are none, linear")
    config = config_from_hf(hf)
    turned = _value(reader, f"{family}.rope.dimension_count", config.head_size)
    if turned != config.head_size:
        raise ValueError(
            f"{family}.rope.dimension_count is {turned}; RoPE on a part of a head of {config.head_size} is not "
            "supported"
        )
    if ROPE_FACTORS in tensors:
        factors = tuple(map(float, tensors[ROPE_FACTORS].data))
        if len(factors) != config.head_size // 2:
            raise ValueError(f"{ROPE_FACTORS} has {len(factors)} numbers, not one for each pair of a head")
        scaling = RopeScaling("longrope", 1.0, 1, short_factors=factors, long_factors=factors)
        config = replace(config, rope_scaling=scaling)
    return config


@cache
def _known_format(tensor_type: Any) -> bool:
    from gguf.constants import GGML_QUANT_SIZES
    from gguf.quants import dequantize

    try:
        dequantize(np.zeros(GGML_QUANT_SIZES[tensor_type][1], dtype=np.uint8), tensor_type)  # one block
    except NotImplementedError:
        return False
    return True


def _find_weights(config: HFConfig, tensors: Mapping[str, Any]) -> StoredWeights:
    """All tensors of the config, and none left over."""
    shapes, stored, heads = weight_shapes(config), dict[str, str](), dict[str, int]()
    for name in shapes:
        base, _, kind = name.rpartition(".")
        index, _, part = base.removeprefix("model.layers.").partition(".")
        stored[name] = f"{OUTER[base]}.{kind}" if base in OUTER else f"blk.{index}.{LAYER[part]}.{kind}"
        if config.model_type == "llama" and part in ("self_attn.q_proj", "self_attn.k_proj"):
            heads[name] = config.num_heads if "q_proj" in part else config.num_kv_heads
    wanted = {stored[name]: shape for name, shape in shapes.items()}
    found = {name: shape_of(tensor) for name, tensor in tensors.items() if name != ROPE_FACTORS}
    require_tensors("the file", wanted, found, config.model_type)
    for name in wanted:
        if not _known_format(tensors[name].tensor_type):
            format_name = tensors[name].tensor_type.name
            raise ValueError(f"{name} is in {format_name}, which the package gguf does not decode")
    return StoredWeights({name: (tensors[stored[name]], heads.get(name, 0)) for name in shapes}, read_tensor)


def _chat_templates(reader: Any) -> dict[str, str]:
    """By name, as tokenizer_config.json would have them."""
    found = {}
    for key in reader.fields:
        if key == CHAT_TEMPLATE or key.startswith(f"{CHAT_TEMPLATE}."):
            template = _value(reader, key)
            if not isinstance(template, str):
                raise ValueError(f"{key} is {reprlib.repr(template)}; a text is needed")
            found[key.removeprefix(CHAT_TEMPLATE).removeprefix(".") or "default"] = template
    return found


def _tokenizer(reader: Any, path: Path) -> Tokenizer:
    """Byte pairs whose cut is known (CUTS); of other kinds, none."""
    cut = _value(reader, "tokenizer.ggml.pre", "default")
    if _value(reader, "tokenizer.ggml.model") != "gpt2" or cut not in CUTS:
        return MissingTokenizer(path.parent)
    texts = _value(reader, "tokenizer.ggml.tokens")
    for key in ("tokens", "merges"):
        found = _value(reader, f"tokenizer.ggml.{key}")
        if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
            raise ValueError(f"tokenizer.ggml.{key} is {reprlib.repr(found)}; a list of texts is needed")
    try:
        merges = [tuple(merge.split(" ")) for merge in _value(reader, "tokenizer.ggml.merges")]
        inner = tokenizers.Tokenizer(models.BPE({text: i for i, text in enumerate(texts)}, merges))
        kinds = _value(reader, "tokenizer.ggml.token_type", [])
        for text, kind in zip(texts, kinds, strict=False):
            if kind in (CONTROL, USER_DEFINED):
                inner.add_tokens([tokenizers.AddedToken(text, normalized=False, special=kind == CONTROL)])
        ids = {role: _value(reader, f"tokenizer.ggml.{key}_token_id") for role, key in ROLES.items()}
        special = {role: texts[token_id] for role, token_id in ids.items() if token_id is not None}
        if "bos_token" in special and _value(reader, "tokenizer.ggml.add_bos_token", cut == "llama-bpe"):
            bos = special["bos_token"]
            pair = [(bos, ids["bos_token"])]
            inner.post_processor = processors.TemplateProcessing([bos, "$A"], special_tokens=pair)
    except Exception as error:  # whatever of it is missing, and what the library raises: Exception itself
        raise ValueError(f"the tokenizer is not whole: {str(error).partition(chr(10))[0]}") from None
    inner.pre_tokenizer = pre_tokenizers.Sequence(CUTS[cut])
    inner.decoder = decoders.ByteLevel()
    return HFTokenizer(inner, path, special, {})
