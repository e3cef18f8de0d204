"""The decoder against one in float64 without a cache, written here, and against a published text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.model_backends import of_models
from support.plain_decoder import plain_logits
from support.stepping import Stepper, logits_of

from paged_ref.core.device import Array, to_host, xp
from paged_ref.core.model.config import ModelConfig
from paged_ref.core.model.llama import Llama, linear, rope_frequencies
from paged_ref.core.model.loading import load
from paged_ref.core.model.tokenizer import TextStream
from paged_ref.interop.architectures import random_weights

BACKENDS = of_models("reference", "cpu", "cuda")

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
CONFIGS = {
    "llama": LLAMA,
    "tied": replace(LLAMA, tie_word_embeddings=True, rope_theta=500.0),
    "one-kv-head": replace(LLAMA, num_kv_heads=1),
    "windows": replace(LLAMA, sliding_windows=(5, None, 1)),
}
SEQUENCES = [[int(t) for t in np.random.default_rng(n).integers(50, size=n)] for n in (19, 1, 7)]


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


def test_logits_rows_choose_the_rows() -> None:
    model = Llama(LLAMA, random_weights(LLAMA))
    stepper = Stepper(model, 1, 4, layout="contiguous")
    inputs = stepper.inputs([[1, 2, 3]])
    whole = to_host(model.forward(inputs, stepper.kv))
    chosen = to_host(model.forward(replace(inputs, logits_rows=xp.asarray([2, 0, 0])), stepper.kv))
    assert (whole.shape, chosen.shape) == ((3, 50), (3, 50))
    np.testing.assert_allclose(chosen, whole[[2, 0, 0]], rtol=0, atol=1e-5)


def test_the_model_writes_its_tokens_and_nothing_else() -> None:
    model = Llama(LLAMA, random_weights(LLAMA))
    stepper = Stepper(model, 2, 4)
    stepper.step([[1, 2, 3], []])
    before = to_host(stepper.kv.device).copy()
    stepper.step([[], [4]])
    after, (block,) = to_host(stepper.kv.device), stepper.tables[1]
    assert not np.isnan(after[:, :, block, 0]).any()
    after[:, :, block, 0] = np.nan
    np.testing.assert_array_equal(after, before)


def test_products_from_another_room_take_the_place_of_array_code() -> None:
    called = []

    def watched(x: Array, weight: Array) -> Array:
        called.append(weight.shape)
        return linear(x, weight)

    weights = random_weights(LLAMA)
    want = logits_of(Llama(LLAMA, weights), SEQUENCES)
    for a, b in zip(logits_of(Llama(LLAMA, weights, linear=watched), SEQUENCES), want, strict=True):
        np.testing.assert_array_equal(a, b)
    assert len(called) == 4 * LLAMA.num_layers + 1


def test_frequencies_are_powers_of_theta() -> None:
    config = replace(LLAMA, head_size=64, rope_theta=500000.0)
    np.testing.assert_allclose(rope_frequencies(config), [500000.0 ** (-2 * i / 64) for i in range(32)], rtol=1e-6)


def test_float16_stays_near_float32() -> None:
    weights = random_weights(LLAMA)
    want = logits_of(Llama(LLAMA, weights), SEQUENCES)
    for a, b in zip(logits_of(Llama(LLAMA, weights, "float16"), SEQUENCES), want, strict=True):
        assert a.dtype == np.float32
        np.testing.assert_allclose(a, b, rtol=0, atol=0.05)


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(ValueError, match="dtype is 'float64'; known are float16, float32"):
        Llama(LLAMA, random_weights(LLAMA), "float64")


def test_the_model_keeps_its_own_copy_of_the_weights() -> None:
    weights = random_weights(LLAMA)
    model = Llama(LLAMA, weights)
    want = logits_of(model, [[1, 2]])[0]
    for array in weights.values():
        array[:] = np.nan
    np.testing.assert_array_equal(logits_of(model, [[1, 2]])[0], want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["paged", "contiguous"])
def test_stories260k_tells_the_published_story(stories260k: Path, layout: str, backend: str) -> None:
    checkpoint = load(stories260k)
    stepper = Stepper(
        Llama(checkpoint.config, checkpoint.weights), 1, 200, layout=layout, block_size=16, backend=backend
    )
    ids = checkpoint.tokenizer.encode("")
    assert ids == [checkpoint.config.bos_token_id]
    stream, pieces = TextStream(checkpoint.tokenizer, ids), []
    for _ in range(200):
        logits = stepper.step([ids[-1:]])[0]
        ids.append(int(logits[-1].argmax()))
        pieces.append(stream.push(ids[-1]))
    expected = (stories260k / "expected_greedy_200.txt").read_text(encoding="utf-8")
    assert checkpoint.tokenizer.decode(ids) == expected
    assert "".join(pieces) + stream.flush() == expected
