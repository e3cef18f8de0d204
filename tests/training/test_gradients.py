"""Every gradient written by hand, against finite differences in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from support import small

from paged_ref.core.device import Array, to_host, xp
from paged_ref.core.model.llama import rotate
from paged_ref.training import backward
from paged_ref.training.activations import Keep
from paged_ref.training.network import Dropout, PackedBatch, loss_and_gradient, total_loss
from paged_ref.training.parameters import Parameters

STEP = 1e-6
CLOSE = 1e-7  # of the largest; the differences themselves are good to about 1e-9


def draw(*shape: int, seed: int = 0) -> Array:
    return xp.asarray(np.random.default_rng([seed, *shape]).standard_normal(shape))


def differences(loss: Callable[[], float], x: Array) -> np.ndarray:
    """The slope of `loss` by each element of `x`, which it reads. The shape of `x`, which must be contiguous."""
    flat, slopes = x.reshape(-1), np.empty(x.size)
    for index in range(x.size):
        before = float(flat[index])
        flat[index] = before + STEP
        above = loss()
        flat[index] = before - STEP
        slopes[index] = (above - loss()) / (2 * STEP)
        flat[index] = before
    return slopes.reshape(x.shape)


def assert_close(gradient: Array, wanted: np.ndarray) -> None:
    assert np.abs(wanted).max() > 1e-3, "a gradient this small would agree by accident"
    np.testing.assert_allclose(to_host(gradient), wanted, rtol=0, atol=CLOSE * np.abs(wanted).max())


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So small that the short sequences here take several of each."""
    for name, size in {"QUERY_CHUNK": 3, "ROWS": 2, "LOGITS": 100, "SCORES": 200}.items():
        monkeypatch.setattr(backward, name, size)


def test_rms_norm() -> None:
    x, weight, dy = draw(5, 6), draw(6), draw(5, 6, seed=1)

    def loss() -> float:
        return float((backward.rms_norm(x, weight, 1e-2)[0] * dy).sum())

    inverse = backward.rms_norm(x, weight, 1e-2)[1]
    dx, dweight = backward.rms_norm_backward(dy, x, inverse, weight)
    assert_close(dx, differences(loss, x))
    assert_close(dweight, differences(loss, weight))


@pytest.mark.usefixtures("small_chunks")
def test_swiglu() -> None:
    gate_up, dy = draw(5, 12), draw(5, 6, seed=1)
    dgate_up, y = backward.swiglu_backward(dy, gate_up)
    assert_close(dgate_up, differences(lambda: float((backward.swiglu(gate_up) * dy).sum()), gate_up))
    np.testing.assert_array_equal(to_host(y), to_host(backward.swiglu(gate_up)))


@pytest.mark.usefixtures("small_chunks")
def test_rope_turns_as_the_engine_does_and_back() -> None:
    x, angles = draw(5, 3, 8), draw(5, 1, 4)
    angles = xp.concatenate([-angles, angles], axis=-1)
    turned = x.copy()
    backward.rope(turned, xp.cos(angles), xp.sin(angles))
    np.testing.assert_array_equal(to_host(turned), to_host(rotate(x, xp.cos(angles), xp.sin(angles))))
    backward.rope(turned, xp.cos(angles), -xp.sin(angles))
    np.testing.assert_allclose(to_host(turned), to_host(x), atol=1e-14)


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize("lengths", [(7,), (4, 4, 4), (3, 1, 8, 8)])
@pytest.mark.usefixtures("small_chunks")
def test_attention(num_heads: int, num_kv_heads: int, lengths: tuple[int, ...]) -> None:
    qkv = draw(sum(lengths), num_heads + 2 * num_kv_heads, 2)
    dy = draw(sum(lengths), num_heads, 2, seed=1)

    def loss() -> float:
        return float((backward.causal_attention(qkv, lengths, num_heads, num_kv_heads)[0] * dy).sum())

    mixed, lse = backward.causal_attention(qkv, lengths, num_heads, num_kv_heads)
    dqkv = backward.causal_attention_backward(dy, qkv, mixed, lse, lengths, num_heads, num_kv_heads)
    assert_close(dqkv, differences(loss, qkv))


def test_scores_far_from_zero_overflow_nothing() -> None:
    qkv = 1e3 * draw(6, 3, 2)
    mixed, lse = backward.causal_attention(qkv, [6], 1, 1)
    dqkv = backward.causal_attention_backward(draw(6, 1, 2), qkv, mixed, lse, [6], 1, 1)
    assert bool(xp.isfinite(mixed).all() and xp.isfinite(lse).all() and xp.isfinite(dqkv).all())


@pytest.mark.usefixtures("small_chunks")
def test_cross_entropy() -> None:
    h, head, targets = draw(6, 4), draw(5, 4), xp.asarray([0, 4, 2, 2, 1, 3])

    def loss() -> float:
        return backward.cross_entropy(h, head, targets, 0.25)[0]

    _, dh, dhead = backward.cross_entropy(h, head, targets, 0.25)
    assert_close(dh, differences(loss, h))
    assert_close(dhead, differences(loss, head))


@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_all_weights_of_a_model(rate: float) -> None:
    """Each weight array along a direction in which all of its elements move."""
    config = small.config()
    weights, gradient, unused = (small.weights(config, np.float64), *(Parameters(config, np.float64) for _ in "ab"))
    batch, dropout = small.batch(config), Dropout(rate, [5])
    loss_and_gradient(weights, gradient, batch, Keep(), dropout)
    gradients = gradient.by_name()
    assert sum(its.size for its in gradients.values()) == gradient.flat.size
    for name, weight in weights.by_name().items():
        direction, before, found = draw(*weight.shape), weight.copy(), []
        for step in (STEP, -STEP):
            weight[...] = before + step * direction
            found.append(loss_and_gradient(weights, unused, batch, Keep(), dropout))
        weight[...] = before
        slope = (found[0] - found[1]) / (2 * STEP)
        assert abs(slope) > 1e-3, "a slope this small would agree by accident"
        assert float((gradients[name] * direction).sum()) == pytest.approx(slope, rel=1e-6), name


def test_the_loss_alone_is_the_same_and_parts_of_a_batch_add_up() -> None:
    config = small.config()
    weights, gradient, summed = (small.weights(config, np.float64), *(Parameters(config, np.float64) for _ in "ab"))
    rng = np.random.default_rng(3)
    sequences = [rng.integers(config.vocab_size, size=size) for size in (5, 8, 2)]
    num_tokens = sum(len(ids) - 1 for ids in sequences)
    loss = loss_and_gradient(weights, gradient, PackedBatch.of(sequences), Keep())
    assert loss == pytest.approx(total_loss(weights, PackedBatch.of(sequences)) / num_tokens, rel=1e-12)
    parts = [
        loss_and_gradient(weights, summed, PackedBatch.of([ids]), Keep(), None, 1 / num_tokens) for ids in sequences
    ]
    assert sum(parts) == pytest.approx(loss, rel=1e-12)
    np.testing.assert_allclose(to_host(summed.flat), to_host(gradient.flat), rtol=0, atol=1e-14)


def test_dropout_zeroes_its_share_and_keeps_the_mean() -> None:
    x: Any = xp.ones((200, 100), dtype=np.float32)
    dropped = Dropout(0.25, [1, 2])(x.copy(), 3)
    assert float((dropped == 0).mean()) == pytest.approx(0.25, abs=0.01)
    assert float(dropped.mean()) == pytest.approx(1, abs=0.01)
    np.testing.assert_array_equal(to_host(dropped), to_host(Dropout(0.25, [1, 2])(x.copy(), 3)))
    assert bool((dropped != Dropout(0.25, [1, 2])(x.copy(), 4)).any())
    assert bool((Dropout(0.0, [1])(x.copy(), 3) == 1).all())
