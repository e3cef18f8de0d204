"""config.json in all its spellings, and what is refused."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest

from paged_ref.interop.hf_config import HFConfig, config_from_hf
from paged_ref.interop.rope import RopeScaling

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4,
    "original_max_position_embeddings": 8192,
}
SCALING = RopeScaling("llama3", 8.0, 8192, slow=1.0, fast=4.0)
LONGROPE = {"rope_type": "longrope", "short_factor": [1, 1, 1, 1], "long_factor": [1, 2, 3, 4]}
GEMMA3 = {"model_type": "gemma3_text", "hidden_activation": "gelu_pytorch_tanh"}
LLAMA3_EQUAL = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


def test_llama() -> None:
    assert config_from_hf(LLAMA) == HFConfig(
        vocab_size=100,
        hidden_size=64,
        intermediate_size=128,
        num_layers=4,
        num_heads=8,
        num_kv_heads=2,
        head_size=8,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        rope_scaling=None,
        tie_word_embeddings=False,
        sliding_windows=(None, None, None, None),
        bos_token_id=1,
        eos_token_ids=(2,),
        model_type="llama",
    )


def test_left_out_keys_take_hugging_faces_defaults() -> None:
    hf = {key: value for key, value in LLAMA.items() if key not in ("num_key_value_heads", "rms_norm_eps")}
    config = config_from_hf(hf)
    assert (config.num_kv_heads, config.rms_norm_eps) == (8, 1e-6)


@pytest.mark.parametrize(
    ("keys", "theta", "scaling"),
    [
        ({"rope_theta": 500000.0}, 500000.0, None),
        ({"rope_theta": 500000, "rope_scaling": None}, 500000.0, None),
        ({"rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", **LLAMA3}}, 500000.0, SCALING),
        ({"rope_theta": 500000.0, "rope_scaling": {"type": "llama3", **LLAMA3}}, 500000.0, SCALING),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, 1e6, None),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e6, **LLAMA3}}, 1e6, SCALING),
    ],
)
def test_rope_in_old_and_new_words(keys: dict[str, Any], theta: float, scaling: RopeScaling | None) -> None:
    config = config_from_hf({**LLAMA, **keys})
    assert (config.rope_theta, config.rope_scaling) == (theta, scaling)


@pytest.mark.parametrize(
    ("keys", "context"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, 1024),
        ({"rope_scaling": {"type": "dynamic", "factor": 1.5}}, 768),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}}, 2048),
        ({"rope_scaling": {"rope_type": "yarn", "original_max_position_embeddings": 128}}, 512),
        ({"rope_scaling": {**LONGROPE, "original_max_position_embeddings": 64}}, 512),
        ({"rope_scaling": {"rope_type": "llama3", **LLAMA3}}, 512),
        ({**GEMMA3, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}, 512),
        ({"rope_scaling": {"type": "linear", "factor": 1e12}}, 2**31 - 1),
    ],
)
def test_the_context_is_the_one_after_stretching(keys: dict[str, Any], context: int) -> None:
    assert config_from_hf({**LLAMA, **keys}).max_position_embeddings == context


def test_yarn_and_longrope_make_queries_and_keys_larger() -> None:
    def magnitude(**rope: Any) -> float:
        scaling = config_from_hf(
            {**LLAMA, "rope_scaling": {"original_max_position_embeddings": 64, **rope}}
        ).rope_scaling
        assert scaling is not None
        return scaling.magnitude

    assert magnitude(rope_type="yarn") == pytest.approx(1 + 0.1 * math.log(8))
    assert magnitude(rope_type="yarn", mscale=0.5, mscale_all_dim=1.0) == pytest.approx(1.10397 / 1.20794, rel=1e-5)
    assert magnitude(rope_type="yarn", attention_factor=1.5) == 1.5
    assert magnitude(**LONGROPE) == pytest.approx(math.sqrt(1.5))  # sqrt(1 + log 8 / log 64)
    assert magnitude(**LONGROPE, factor=1.0) == 1.0


@pytest.mark.parametrize("kind", ["su", "yarn", "longrope"])
def test_early_phi3_files_call_longrope_otherwise(kind: str) -> None:
    rope = {**LONGROPE, "rope_type": None, "type": kind}
    del rope["rope_type"]
    config = config_from_hf(
        {**LLAMA, "model_type": "phi3", "original_max_position_embeddings": 64, "rope_scaling": rope}
    )
    assert config.rope_scaling is not None
    assert (config.rope_scaling.kind, config.rope_scaling.original) == ("longrope", 64)


def test_gemma_has_a_scaled_embedding_and_two_bases() -> None:
    config = config_from_hf({**LLAMA, **GEMMA3, "head_dim": None, "query_pre_attn_scalar": 32})
    assert (config.embedding_scale, config.query_scale, config.tie_word_embeddings) == (8.0, 0.5, True)
    assert (config.rope_theta, config.local_rope_theta) == (1e6, 1e4)
    assert config.sliding_windows == (4096, 4096, 4096, 4096)  # the sixth layer would see everything
    ropes = {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5.0}, "sliding_attention": None}
    nested = config_from_hf({**LLAMA, **GEMMA3, "rope_parameters": ropes})
    assert (nested.rope_theta, nested.local_rope_theta) == (5.0, 1e4)
    assert config_from_hf({**LLAMA, **GEMMA3, "model_type": "gemma2"}).sliding_windows == (4096, None) * 2


@pytest.mark.parametrize(
    ("keys", "windows"),
    [
        ({"model_type": "llama", "sliding_window": 16}, (None,) * 4),
        ({"model_type": "mistral", "sliding_window": 16}, (16,) * 4),
        ({"model_type": "mistral", "sliding_window": None}, (None,) * 4),
        ({"model_type": "mistral"}, (4096,) * 4),  # the key is left out
        ({"model_type": "qwen2", "sliding_window": 16, "use_sliding_window": False}, (None,) * 4),
        (
            {"model_type": "qwen2", "sliding_window": 16, "use_sliding_window": True, "max_window_layers": 3},
            (None, None, None, 16),
        ),
        (
            {
                "model_type": "qwen3",
                "sliding_window": 16,
                "use_sliding_window": True,
                "max_window_layers": 0,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
            },
            (16, None, 16, None),
        ),
    ],
)
def test_sliding_windows_by_layer(keys: dict[str, Any], windows: tuple[int | None, ...]) -> None:
    assert config_from_hf({**LLAMA, **keys}).sliding_windows == windows


def test_the_siblings_differ_by_a_flag() -> None:
    qwen2 = config_from_hf({**LLAMA, "model_type": "qwen2"})
    qwen3 = config_from_hf({**LLAMA, "model_type": "qwen3", "head_dim": 16})
    assert (qwen2.qkv_bias, qwen2.qk_norm, qwen2.head_size) == (True, None, 8)
    assert (qwen3.qkv_bias, qwen3.qk_norm, qwen3.head_size) == (False, "head", 16)


@pytest.mark.parametrize(("eos", "ids"), [(None, ()), (0, (0,)), ([2, 7], (2, 7))])
def test_eos_is_null_or_one_or_many(eos: Any, ids: tuple[int, ...]) -> None:
    assert config_from_hf({**LLAMA, "eos_token_id": eos}).eos_token_ids == ids


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"model_type": "bert"},
            "model_type is 'bert'; known are llama, mistral, qwen2, qwen3, phi3, olmo2, gemma2, gemma3_text, gpt2",
        ),
        ({"model_type": None}, "model_type is None; known are llama, mistral,"),
        ({"vocab_size": None}, "vocab_size is missing"),
        ({"hidden_size": "64"}, "hidden_size is '64'; an integer of at least 1 is needed"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0; an integer of at least 1 is needed"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0; an integer of at least 1 is needed"),
        ({"num_attention_heads": 7}, "hidden_size is 64; without head_dim a multiple of the 7"),
        ({"num_key_value_heads": 3}, "num_heads is 8; a multiple of the 3 KV heads is needed"),
        ({"head_dim": 7}, "head_size is 7; RoPE turns pairs, so an even number is needed"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps is -1.0; a number above 0 is needed"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; for a llama, known are silu, swish"),
        (
            {"model_type": "mistral", "attention_bias": True},
            "attention_bias is True; a mistral has no such bias (known",
        ),
        ({"model_type": "qwen3", "mlp_bias": True}, "mlp_bias is True; a qwen3 has no such bias (known for llama)"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}; not supported"),
        ({"rope_scaling": {"type": "linear"}}, "factor is missing"),
        ({**GEMMA3, "use_bidirectional_attention": True}, "use_bidirectional_attention is True; not supported"),
        ({**GEMMA3, "attn_logit_softcapping": 5.0}, "attn_logit_softcapping is 5.0; a gemma3_text has no such cap"),
        ({**GEMMA3, "hidden_activation": "gelu"}, "hidden_activation is 'gelu'; for a gemma3_text, known are gelu_py"),
        ({**GEMMA3, "sliding_window": None}, "sliding_window is missing"),
        ({**GEMMA3, "rope_parameters": {"full_attention": 3}}, "full_attention in rope_parameters is 3; an object"),
        (
            {**GEMMA3, "rope_parameters": {"sliding_attention": {"rope_type": "yarn"}}},
            "rope_type of sliding_attention is 'yarn'; known is default",
        ),
        ({"model_type": "gpt2"}, "n_layer is missing"),
        (
            {"model_type": "gpt2", "n_layer": 2, "n_embd": 9, "n_head": 2},
            "n_embd is 9; without head_dim a multiple of the 2",
        ),
        ({"model_type": "gpt2", "scale_attn_weights": False}, "scale_attn_weights is False; not supported"),
        (
            {"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True},
            "scale_attn_by_inverse_layer_idx is True; not",
        ),
        ({"model_type": "gpt2", "activation_function": "relu"}, "activation_function is 'relu'; for a gpt2, known are"),
        (
            {"rope_parameters": {"rope_type": "mrope"}},
            "rope_type in rope_parameters is 'mrope'; known are default, linear",
        ),
        ({"rope_scaling": {"rope_type": ["yarn"]}}, "rope_type in rope_scaling is ['yarn']; known are"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}, "rope_theta": 1.0},
            "rope_theta is 1.0; with yarn, more",
        ),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "head_dim": 2}, "head_dim is 2; dynamic RoPE needs"),
        ({"rope_scaling": {**LONGROPE, "short_factor": [1.0]}}, "short_factor is [1.0]; a list of 4 numbers is needed"),
        ({"rope_scaling": {**LONGROPE, "long_factor": [1, 2, 3, 0]}}, "long_factor is 0; a number above 0 is needed"),
        (
            {"rope_scaling": {**LONGROPE, "original_max_position_embeddings": 1}},
            "original_max_position_embeddings is 1;",
        ),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor is missing"),
        ({"rope_scaling": "llama3"}, "rope_scaling is 'llama3'; an object is needed"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is not 1"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'; true or false is needed"),
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'; a token id or a list of them is needed"),
        (
            {"model_type": "mistral", "sliding_window": 0},
            "sliding_window is 0; an integer of at least 1 is needed",
        ),
        (
            {
                "model_type": "qwen2",
                "use_sliding_window": True,
                "sliding_window": 4,
                "layer_types": ["chunked_attention"] * 4,
            },
            "layer_types holds 'chunked_attention'; known are full_attention, sliding_attention",
        ),
        (
            {
                "model_type": "qwen2",
                "use_sliding_window": True,
                "sliding_window": 4,
                "layer_types": ["full_attention"],
            },
            "layer_types is ['full_attention']; a list of 4 kinds is needed",
        ),
        *(
            ({"model_type": "qwen3", "use_sliding_window": True, "sliding_window": 4, "layer_types": wrong}, message)
            for wrong, message in [
                (5, "layer_types is 5; a list of 4 kinds is needed"),
                ([["full_attention"]] * 4, "layer_types holds ['full_attention']; known are"),
                ([{}] * 4, "layer_types holds {}; known are"),
            ]
        ),
        (
            {"num_hidden_layers": 10**400},
            "num_hidden_layers is 100000000000000000...0000000000000000000; an integer of at most",
        ),
        ({"rope_theta": float("inf")}, "rope_theta is inf; a number of 1e-12 to 1e+12 is needed"),
        ({"rope_theta": 1e-320}, "rope_theta is 1e-320; a number of 1e-12 to 1e+12 is needed"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "beta_fast": 1e-320}},
            "beta_fast is 1e-320; a number of 1e-12 to 1e+12 is needed",
        ),
        (
            {"rms_norm_eps": 10**400},
            "rms_norm_eps is 100000000000000000...0000000000000000000; a number",
        ),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan; a number above 0 is needed"),
        (
            {"rope_scaling": LLAMA3_EQUAL},
            "low_freq_factor in rope_scaling is 4.0; less than the high_freq_factor of 4.0",
        ),
        ({"model_type": ["llama"]}, "model_type is ['llama']; known are"),
        ({"eos_token_id": [0, 1, 2, 3, 4, 5, 6, 7, -1]}, "eos_token_id is [0, 1, 2, 3, 4, 5, ...]; a token id"),
    ],
)
def test_what_cannot_be_is_refused_by_name(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        config_from_hf({**LLAMA, **keys})
