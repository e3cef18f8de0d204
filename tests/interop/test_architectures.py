"""What Qwen2, Qwen3, Mistral and Llama 3.1 add, against the decoder by its definition; shapes and random weights."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from support.model_backends import of_models
from support.plain_decoder import llama3_frequency, plain_logits
from support.stepping import logits_of

from paged_ref.core.model.llama import Llama
from paged_ref.interop.architectures import Decoder, build_model, random_weights, weight_shapes
from paged_ref.interop.hf_config import HFConfig, Llama3RopeScaling

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
SCALING = Llama3RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
CONFIGS = {
    "llama": LLAMA,
    "llama3-rope-tied": replace(LLAMA, rope_scaling=SCALING, tie_word_embeddings=True, rope_theta=500.0),
    "mistral": replace(LLAMA, sliding_windows=(5, 5, 5), model_type="mistral"),
    "qwen2": replace(LLAMA, attention_bias=True, sliding_windows=(None, 4, 1), model_type="qwen2"),
    "qwen3": replace(LLAMA, qk_norm=True, head_size=10, model_type="qwen3"),
}
SEQUENCES = [[int(t) for t in np.random.default_rng(n).integers(50, size=n)] for n in (19, 1, 7)]


def test_a_llama_is_the_cores_and_the_others_are_decoders() -> None:
    kinds = {name: type(build_model(config, random_weights(config))) for name, config in CONFIGS.items()}
    assert kinds == {"llama": Llama, "llama3-rope-tied": Decoder, "mistral": Llama, "qwen2": Decoder, "qwen3": Decoder}


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
    weights = random_weights(config, seed=3)
    answers = logits_of(build_model(config, weights), SEQUENCES, chunk=chunk, layout=layout, backend=backend)
    for tokens, logits in zip(SEQUENCES, answers, strict=True):
        assert logits.dtype == np.float32
        np.testing.assert_allclose(logits, plain_logits(config, weights, tokens), rtol=0, atol=2e-5)


def test_llama3_frequencies_follow_the_rule_by_wavelength() -> None:
    config = HFConfig(
        vocab_size=8,
        hidden_size=64,
        intermediate_size=8,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_size=64,
        max_position_embeddings=131072,
        rope_theta=500000.0,
    )
    scaling = Llama3RopeScaling(8.0, 1.0, 4.0, 8192)
    plain = [500000.0 ** (-2 * i / 64) for i in range(32)]
    np.testing.assert_allclose(build_model(config, random_weights(config)).frequencies(), plain, rtol=1e-6)
    scaled = replace(config, rope_scaling=scaling)
    want = [llama3_frequency(frequency, scaling) for frequency in plain]
    np.testing.assert_allclose(build_model(scaled, random_weights(scaled)).frequencies(), want, rtol=1e-6)
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
