"""What Qwen2, Qwen3, Mistral and Llama 3.1 add, against the decoder by its definition; shapes and random weights."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from support.model_backends import of_models
from support.plain_decoder import llama3_frequency, plain_logits
from support.stepping import logits_of

from paged_ref.core.device import to_host, xp
from paged_ref.core.model.llama import Llama
from paged_ref.interop.architectures import Decoder, attention_variants, build_model, random_weights, weight_shapes
from paged_ref.interop.hf_config import HFConfig
from paged_ref.interop.rope import Rope, RopeScaling
from paged_ref.tuned.decoder import can_fuse

BACKENDS = of_models("reference", "cpu", "cuda")
LLAMA = HFConfig(
    vocab_size=50,
    hidden_size=24,
    intermediate_size=40,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_size=6,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
)
SCALING = RopeScaling("llama3", factor=8.0, original=32, slow=1.0, fast=4.0)
GEMMA = replace(
    LLAMA, norms="around", norm_offset=1.0, activation="gelu", embedding_scale=3.0, query_scale=1.4,
    tie_word_embeddings=True, sliding_windows=(4, 4, None),
)  # fmt: skip
CONFIGS = {
    "llama": LLAMA,
    "llama3-rope-tied": replace(LLAMA, rope_scaling=SCALING, tie_word_embeddings=True, rope_theta=500.0),
    "mistral": replace(LLAMA, sliding_windows=(5, 5, 5), model_type="mistral"),
    "qwen2": replace(LLAMA, qkv_bias=True, sliding_windows=(None, 4, 1), model_type="qwen2"),
    "qwen3": replace(LLAMA, qk_norm="head", head_size=10, model_type="qwen3"),
    "llama-biases": replace(LLAMA, qkv_bias=True, output_bias=True, mlp_bias=True),
    "gemma2": replace(
        GEMMA, attention_softcap=1.5, logits_softcap=2.0, qkv_bias=True, output_bias=True, model_type="gemma2"
    ),
    "gemma3": replace(GEMMA, qk_norm="head", local_rope_theta=50.0, rope_scaling=SCALING, model_type="gemma3_text"),
    "olmo2": replace(LLAMA, norms="after", qk_norm="whole", model_type="olmo2"),
    "gpt2": replace(
        LLAMA, num_kv_heads=4, learned_positions=True, layer_norm=True, gated=False, activation="gelu", qkv_bias=True,
        output_bias=True, mlp_bias=True, tie_word_embeddings=True, model_type="gpt2",
    ),
}  # fmt: skip
SEQUENCES = [[int(t) for t in np.random.default_rng(n).integers(50, size=n)] for n in (19, 1, 7)]


def test_a_llama_is_the_cores_and_the_others_are_decoders() -> None:
    kinds = {name: type(build_model(config, random_weights(config))) for name, config in CONFIGS.items()}
    assert [name for name, kind in kinds.items() if kind is Llama] == ["llama", "mistral"]
    assert [name for name, kind in kinds.items() if kind is Decoder] == ["llama3-rope-tied", "qwen2", "qwen3"]
    for name, kind in kinds.items():
        fuses = can_fuse(build_model(CONFIGS[name], random_weights(CONFIGS[name])))
        assert fuses == (kind in (Llama, Decoder)), "only a step like Llama's can be fused"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("chunk", [None, 3, 1])
@pytest.mark.parametrize("layout", ["paged", "contiguous"])
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_agree_with_a_decoder_that_keeps_no_cache(
    name: str, layout: str, chunk: int | None, backend: str
) -> None:
    config = CONFIGS[name]
    if backend == "cuda" and any(config.sliding_windows):
        pytest.skip("the teaching kernels have no sliding window")
    variants = attention_variants(config)
    if backend in ("cpu", "cuda") and any(variants):
        pytest.skip("the teaching kernels have no softcap")
    weights = random_weights(config, seed=3)
    how: dict[str, Any] = {"chunk": chunk, "layout": layout, "backend": backend, "variants": variants}
    answers = logits_of(build_model(config, weights), SEQUENCES, **how)
    for tokens, logits in zip(SEQUENCES, answers, strict=True):
        assert logits.dtype == np.float32
        np.testing.assert_allclose(logits, plain_logits(config, weights, tokens), rtol=0, atol=2e-5)


def test_llama3_frequencies_follow_the_rule_by_wavelength() -> None:
    scaling = RopeScaling("llama3", 8.0, 8192, slow=1.0, fast=4.0)
    plain = [500000.0 ** (-2 * i / 64) for i in range(32)]
    np.testing.assert_allclose(Rope(500000.0, 64, None, 1).frequencies, plain, rtol=1e-6)
    want = [llama3_frequency(frequency, scaling) for frequency in plain]
    np.testing.assert_allclose(Rope(500000.0, 64, scaling, 1).frequencies, want, rtol=1e-6)
    kept = sum(a == b for a, b in zip(plain, want, strict=True))
    stretched = sum(math.isclose(a, 8 * b) for a, b in zip(plain, want, strict=True))
    assert kept > 0
    assert stretched > 0
    assert kept + stretched < 32, "the case has no frequency on the ramp"


def test_random_weights_have_the_shapes_of_a_checkpoint() -> None:
    for config in CONFIGS.values():
        weights = random_weights(config, seed=1)
        assert {name: array.shape for name, array in weights.items()} == weight_shapes(config)
        again = random_weights(config, seed=1)
        assert all(np.array_equal(weights[name], again[name]) for name in weights)


def test_learned_positions_end_with_the_context() -> None:
    config = CONFIGS["gpt2"]
    build_model(config, random_weights(config), longest=64)
    with pytest.raises(ValueError, match="max_model_len is 65; a gpt2 model has vectors for the 64 positions"):
        build_model(config, random_weights(config), longest=65)


ROPES = {
    "linear": RopeScaling("linear", 4.0, 8),
    "dynamic": RopeScaling("dynamic", 4.0, 8),
    "yarn": RopeScaling("yarn", 4.0, 8, magnitude=1.2),
    "longrope": RopeScaling("longrope", 4.0, 8, 1.1, short_factors=(1.0, 1.1, 1.2), long_factors=(1.0, 2.0, 5.0)),
}


@pytest.mark.parametrize("kind", ROPES)
def test_chunks_change_no_logits_beyond_the_first_context(kind: str) -> None:
    config = replace(LLAMA, rope_scaling=ROPES[kind])
    model = build_model(config, random_weights(config, seed=3))
    for whole, parts in zip(logits_of(model, SEQUENCES), logits_of(model, SEQUENCES, chunk=3), strict=True):
        np.testing.assert_allclose(whole, parts, rtol=0, atol=2e-5)


def test_scaled_frequencies() -> None:
    plain = Rope(100.0, 6, None, 64).frequencies
    np.testing.assert_allclose(Rope(100.0, 6, ROPES["linear"], 64).frequencies, plain / 4)
    np.testing.assert_allclose(Rope(100.0, 6, ROPES["longrope"], 8).frequencies, plain / (1, 1.1, 1.2))
    np.testing.assert_allclose(Rope(100.0, 6, ROPES["longrope"], 9).frequencies, plain / (1, 2, 5))
    # Of the three pairs, 32 turns in 8 tokens are beyond the first, and one turn lies between the first and the second.
    np.testing.assert_allclose(Rope(100.0, 6, ROPES["yarn"], 64).frequencies, plain / (1, 4, 4))
    cos, _ = Rope(100.0, 6, ROPES["dynamic"], 64).turns(xp.array([3, 15]), np.dtype(np.float32))
    theta = 100.0 * (4 * 16 / 8 - 3) ** (6 / 4)  # at position 15 the sequence has 16 tokens, twice the first context
    want = [np.cos(3 * plain), np.cos(15 * theta ** -(np.arange(3) / 3))]
    np.testing.assert_allclose(to_host(cos)[:, 0, :3], want, rtol=1e-5)
