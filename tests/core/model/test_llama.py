"""The decoder against one in float64 without a cache, written here, and against a published text."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.stepping import Stepper, logits_of

from paged_ref.core.device import to_host, xp
from paged_ref.core.model.config import Llama3RopeScaling, ModelConfig
from paged_ref.core.model.llama import Llama, StepInputs, rope_frequencies
from paged_ref.interop.architectures import random_weights, weight_shapes
from paged_ref.interop.checkpoints import load
from paged_ref.kernels import backends

BACKENDS = [
    pytest.param(name, marks=pytest.mark.gpu) if name.startswith("cuda") else name
    for name in ("reference", "cpu", "cuda")
    if name in backends()
]

LLAMA = ModelConfig(
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
    "one-kv-head": replace(LLAMA, num_kv_heads=1),
    "mistral": replace(LLAMA, sliding_windows=(5, 5, 5)),
    "qwen2": replace(LLAMA, attention_bias=True, sliding_windows=(None, 4, 1)),
    "qwen3": replace(LLAMA, qk_norm=True, head_size=10),
}
SEQUENCES = [[int(t) for t in np.random.default_rng(n).integers(50, size=n)] for n in (19, 1, 7)]


def llama3_frequency(frequency: float, scaling: Llama3RopeScaling) -> float:
    """Meta's rule by wavelength, one frequency at a time."""
    wavelength = 2 * math.pi / frequency
    if wavelength < scaling.original_max_position_embeddings / scaling.high_freq_factor:
        return frequency
    if wavelength > scaling.original_max_position_embeddings / scaling.low_freq_factor:
        return frequency / scaling.factor
    smooth = (scaling.original_max_position_embeddings / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    return (1 - smooth) * frequency / scaling.factor + smooth * frequency


def plain_logits(config: ModelConfig, weights: dict[str, np.ndarray], tokens: list[int]) -> np.ndarray:
    """[len(tokens), vocab_size] in float64: no cache, one token and one head at a time."""
    w = {name: array.astype(np.float64) for name, array in weights.items()}
    size, group = config.head_size, config.num_heads // config.num_kv_heads

    def norm(vector: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return np.asarray(vector / math.sqrt(float(vector @ vector) / len(vector) + config.rms_norm_eps) * weight)

    def turned(head: np.ndarray, position: int) -> np.ndarray:
        result = head.copy()
        for i in range(size // 2):
            frequency = config.rope_theta ** (-2 * i / size)
            if config.rope_scaling is not None:
                frequency = llama3_frequency(frequency, config.rope_scaling)
            pair = complex(head[i], head[i + size // 2]) * complex(
                math.cos(position * frequency), math.sin(position * frequency)
            )
            result[i], result[i + size // 2] = pair.real, pair.imag
        return result

    def heads(x: np.ndarray, layer: str, name: str, position: int) -> list[np.ndarray]:
        flat = w[f"{layer}.self_attn.{name}_proj.weight"] @ x
        if config.attention_bias:
            flat = flat + w[f"{layer}.self_attn.{name}_proj.bias"]
        parts = list(flat.reshape(-1, size))
        if name == "v":
            return parts
        if config.qk_norm:
            parts = [norm(part, w[f"{layer}.self_attn.{name}_norm.weight"]) for part in parts]
        return [turned(part, position) for part in parts]

    xs = [w["model.embed_tokens.weight"][token] for token in tokens]
    for index in range(config.num_layers):
        layer = f"model.layers.{index}"
        normed = [norm(x, w[f"{layer}.input_layernorm.weight"]) for x in xs]
        q, k, v = ([heads(x, layer, name, p) for p, x in enumerate(normed)] for name in "qkv")
        window = config.sliding_windows[index] or len(tokens)
        for p in range(len(tokens)):
            mixed = []
            for h in range(config.num_heads):
                seen = range(max(0, p - window + 1), p + 1)
                scores = np.array([q[p][h] @ k[j][h // group] for j in seen]) / math.sqrt(size)
                shares = np.exp(scores - scores.max())
                mixed.append(sum(a * v[j][h // group] for a, j in zip(shares / shares.sum(), seen, strict=True)))
            xs[p] = xs[p] + w[f"{layer}.self_attn.o_proj.weight"] @ np.concatenate(mixed)
            h2 = norm(xs[p], w[f"{layer}.post_attention_layernorm.weight"])
            gate, up = w[f"{layer}.mlp.gate_proj.weight"] @ h2, w[f"{layer}.mlp.up_proj.weight"] @ h2
            xs[p] = xs[p] + w[f"{layer}.mlp.down_proj.weight"] @ (gate / (1 + np.exp(-gate)) * up)
    head = w["model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"]
    return np.stack([head @ norm(x, w["model.norm.weight"]) for x in xs])


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
    answers = logits_of(Llama(config, weights), SEQUENCES, chunk=chunk, layout=layout, backend=backend)
    for tokens, logits in zip(SEQUENCES, answers, strict=True):
        assert logits.dtype == np.float32
        np.testing.assert_allclose(logits, plain_logits(config, weights, tokens), rtol=0, atol=2e-5)


@pytest.mark.parametrize("size", [1, 3, 16, 64])
def test_the_block_size_changes_nothing(size: int) -> None:
    model = Llama(LLAMA, random_weights(LLAMA))
    want = logits_of(model, SEQUENCES, layout="contiguous")
    for a, b in zip(logits_of(model, SEQUENCES, block_size=size), want, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


def test_logits_rows_choose_the_rows_and_a_negative_slot_writes_nothing() -> None:
    model = Llama(LLAMA, random_weights(LLAMA))
    stepper = Stepper(model, 1, 4, layout="contiguous")
    whole = stepper.step([[1, 2, 3]])[0]
    inputs = StepInputs(
        token_ids=xp.asarray([3]),
        positions=xp.asarray([2]),
        slot_mapping=xp.asarray([-1]),
        seq_lens=xp.asarray([3]),
        query_start_loc=xp.asarray([0, 1]),
        logits_rows=xp.asarray([0, 0]),
        starts=xp.asarray([0]),
    )
    before = [to_host(cache).copy() for pair in stepper.kv for cache in pair]
    logits = to_host(model.forward(inputs, stepper.kv, stepper.attend))
    assert logits.shape == (2, 50)
    np.testing.assert_allclose(logits, whole[[2, 2]], rtol=0, atol=1e-5)
    for was, now in zip(before, (cache for pair in stepper.kv for cache in pair), strict=True):
        np.testing.assert_array_equal(was, to_host(now))


def test_float16_stays_near_float32() -> None:
    weights = random_weights(LLAMA)
    want = logits_of(Llama(LLAMA, weights), SEQUENCES)
    for a, b in zip(logits_of(Llama(LLAMA, weights, "float16"), SEQUENCES), want, strict=True):
        assert a.dtype == np.float32
        np.testing.assert_allclose(a, b, rtol=0, atol=0.05)


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(ValueError, match="dtype is float64; known are float16, float32"):
        Llama(LLAMA, random_weights(LLAMA), np.float64)


def test_the_model_keeps_its_own_copy_of_the_weights() -> None:
    weights = random_weights(LLAMA)
    model = Llama(LLAMA, weights)
    want = logits_of(model, [[1, 2]])[0]
    for array in weights.values():
        array[:] = np.nan
    np.testing.assert_array_equal(logits_of(model, [[1, 2]])[0], want)


def test_llama3_frequencies_follow_the_rule_by_wavelength() -> None:
    config = ModelConfig(
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
    np.testing.assert_allclose(to_host(rope_frequencies(config)), plain, rtol=1e-6)
    want = [llama3_frequency(frequency, scaling) for frequency in plain]
    np.testing.assert_allclose(to_host(rope_frequencies(replace(config, rope_scaling=scaling))), want, rtol=1e-6)
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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["paged", "contiguous"])
def test_stories260k_tells_the_published_story(stories260k: Path, layout: str, backend: str) -> None:
    checkpoint = load(stories260k)
    stepper = Stepper(
        Llama(checkpoint.config, checkpoint.weights), 1, 200, layout=layout, block_size=16, backend=backend
    )
    ids = checkpoint.tokenizer.encode("")
    assert ids == [checkpoint.config.bos_token_id]
    stream, pieces = checkpoint.tokenizer.stream(ids), []
    for _ in range(200):
        logits = stepper.step([ids[-1:]])[0]
        ids.append(int(logits[-1].argmax()))
        pieces.append(stream.push(ids[-1]))
    expected = (stories260k / "expected_greedy_200.txt").read_text(encoding="utf-8")
    assert checkpoint.tokenizer.decode(ids) == expected
    assert "".join(pieces) + stream.flush() == expected
