"""The compiled step of small models gives the core decoder's numbers. A row's bits depend on nothing but the row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from support.stepping import Stepper, logits_of

from paged_ref import LLM
from paged_ref.core.device import on_gpu
from paged_ref.core.model.config import ModelConfig
from paged_ref.core.model.llama import Llama
from paged_ref.core.model.llama import linear as plain_linear
from paged_ref.interop.architectures import build_model, random_weights
from paged_ref.interop.hf_config import HFConfig
from paged_ref.tuned import compiled_decoder, threads
from paged_ref.tuned.compiled_decoder import CompiledDecoder, can_compile
from paged_ref.tuned.linear import linear

pytestmark = pytest.mark.skipif(on_gpu, reason="a GPU is in use")
CONFIG = ModelConfig(
    vocab_size=50, hidden_size=48, intermediate_size=112, num_layers=2, num_heads=4, num_kv_heads=2, head_size=16,
    max_position_embeddings=128, sliding_windows=(None, 5),
)  # fmt: skip
RNG = np.random.default_rng(0)
SEQUENCES = [RNG.integers(0, 50, size=length).tolist() for length in (40, 1, 7, 33)]


def decoders(config: ModelConfig = CONFIG) -> tuple[Llama, CompiledDecoder]:
    """The core's, and the compiled one with the same weights."""
    plain, other = (Llama(config, random_weights(config), "float32", linear) for _ in range(2))
    assert can_compile(other)
    return plain, CompiledDecoder(other)


@pytest.fixture(params=[1, 3])
def num_threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setattr(compiled_decoder, "PARALLEL", 0)  # a small step, too
    monkeypatch.setattr(compiled_decoder, "num_threads", lambda: request.param)
    monkeypatch.setattr(threads, "num_threads", lambda: request.param)
    threads._pool.cache_clear()
    yield request.param
    threads._pool.cache_clear()


@pytest.mark.parametrize("chunk", [1, 7, None])
def test_the_logits_are_the_core_decoders(num_threads: int, chunk: int | None) -> None:
    plain, compiled = decoders()
    for got, want in zip(
        logits_of(compiled, SEQUENCES, chunk=chunk), logits_of(plain, SEQUENCES, chunk=chunk), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_a_row_has_the_same_bits_in_any_company_and_any_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled_decoder, "LARGE", 0)  # steps of one or two tokens have a loop of their own
    _, compiled = decoders()
    together = logits_of(compiled, SEQUENCES, chunk=9, backend="cpu-simd")  # at most 32 rows, and so the loop's logits
    for sequence, rows in zip(SEQUENCES, together, strict=True):
        for chunk in (1, 4, 32):
            (alone,) = logits_of(compiled, [sequence], chunk=chunk, backend="cpu-simd")
            np.testing.assert_array_equal(alone, rows)


def test_the_number_of_threads_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    _, compiled = decoders()
    alone = logits_of(compiled, SEQUENCES)
    monkeypatch.setattr(compiled_decoder, "PARALLEL", 0)
    monkeypatch.setattr(compiled_decoder, "num_threads", lambda: 2)
    for shared, rows in zip(logits_of(compiled, SEQUENCES), alone, strict=True):
        np.testing.assert_array_equal(shared, rows)


def test_gates_of_any_size_and_nan_stay_in_their_row() -> None:
    plain, compiled = decoders()
    for model in (plain, compiled):
        model.embedding[3] *= 1e4  # far beyond what e**x can be
        model.embedding[4, 5] = np.nan
        model.layers[0].gate_up[:112] *= 100
    got, want = (np.concatenate(Stepper(model, 3, 4).step([[3], [4], [5]])) for model in (compiled, plain))
    assert np.isnan(got[1]).all()
    np.testing.assert_allclose(got[[0, 2]], want[[0, 2]], rtol=1e-4, atol=1e-4)


def test_weights_keep_their_values_and_can_be_changed_in_place() -> None:
    plain, compiled = decoders()
    for before, after in zip(plain.layers, compiled.layers, strict=True):
        for name in before.__slots__:
            np.testing.assert_array_equal(getattr(after, name), getattr(before, name))
    first = compiled.layers[0]
    places = [getattr(layer, name).ctypes.data for layer in compiled.layers for name in layer.__slots__]
    assert places == sorted(places)  # a step reads them in this order
    assert all(place % 64 == 0 for place in places)
    for model in (plain, compiled):
        model.layers[0].qkv *= 2
        model.final_norm[3] = 5
    assert first is compiled.layers[0]
    got, want = (np.concatenate(Stepper(model, 1, 8).step([[3, 4, 5]])) for model in (compiled, plain))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_a_product_that_is_set_later_is_used() -> None:
    plain, compiled = decoders()
    shapes = []

    def counting(x: Any, weight: Any) -> Any:
        shapes.append(weight.shape)
        return plain_linear(x, weight)

    plain.linear = compiled.linear = counting
    got, want = (Stepper(model, 1, 4).step([[3, 4]]) for model in (compiled, plain))
    np.testing.assert_array_equal(got, want)
    assert len(shapes) == 2 * (2 * 4 + 1)


def test_what_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    def can(config: ModelConfig = CONFIG, dtype: str = "float32", product: Any = linear) -> bool:
        return can_compile(build_model(config, random_weights(config), dtype, product))

    assert can()
    assert not can(dtype="float16")
    assert not can(product=plain_linear)
    assert not can(replace(CONFIG, hidden_size=40))  # no whole vectors
    fields = {name: getattr(CONFIG, name) for name in CONFIG.__slots__}
    assert not can(HFConfig(**fields, qkv_bias=True))
    assert isinstance(LLM("tiny").engine.model, CompiledDecoder)
    largest = 2 * CONFIG.intermediate_size * CONFIG.hidden_size
    monkeypatch.setattr(compiled_decoder, "MOST", largest)
    assert can()
    monkeypatch.setattr(compiled_decoder, "MOST", largest - 1)  # threads share the products with a larger matrix
    assert not can()


def test_without_a_compiler_the_core_decoder_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMBA_DISABLE_JIT", "1")
    assert type(LLM("tiny", backend="reference").engine.model) is Llama
