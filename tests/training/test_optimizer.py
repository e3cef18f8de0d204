"""The optimizers against their formulas, written out for one weight at a time."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest

from paged_ref.core.device import to_host, xp
from paged_ref.training.optimizer import MUON_RATE, AdamW, Muon, clip, learning_rate, orthogonal


def test_adamw_is_its_formula() -> None:
    rng = np.random.default_rng(0)
    start, gradients = rng.standard_normal(7), rng.standard_normal((5, 7))
    weights, gradient = xp.asarray(start.copy()), xp.zeros(7)
    optimizer = AdamW(weights, gradient, 0.1)
    for count, drawn in enumerate(gradients, start=1):
        gradient[:] = xp.asarray(drawn)
        optimizer.step(0.01 * count, count)
    for index, wanted in enumerate(start):
        mean = square = 0.0
        for count, its in enumerate(gradients[:, index], start=1):
            mean, square = 0.9 * mean + 0.1 * its, 0.99 * square + 0.01 * its * its
            step = mean / (1 - 0.9**count) / (math.sqrt(square / (1 - 0.99**count)) + 1e-8)
            wanted = wanted * (1 - 0.01 * count * 0.1) - 0.01 * count * step
        assert float(weights[index]) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("shape", [(6, 6), (12, 5), (5, 12)])
def test_orthogonal_keeps_the_directions_and_evens_out_their_sizes(shape: tuple[int, int]) -> None:
    matrix = np.random.default_rng(1).standard_normal(shape)
    u, _, vt = np.linalg.svd(matrix, full_matrices=False)
    found = u.T @ to_host(orthogonal(xp.asarray(matrix))) @ vt.T  # diagonal, if the directions are the same
    sizes = np.diag(found)
    np.testing.assert_allclose(found, np.diag(sizes), atol=1e-9)
    assert 0.5 < sizes.min() <= sizes.max() < 1.3


def test_muon_moves_by_an_orthogonal_matrix_and_decays() -> None:
    rng = np.random.default_rng(2)
    start, drawn = rng.standard_normal((8, 4)), rng.standard_normal((8, 4))
    weight, gradient = xp.asarray(start.copy()), xp.asarray(drawn.copy())
    Muon([weight], [gradient], 0.1).step(0.01, 1)
    rate = 0.01 * MUON_RATE
    moved = (start * (1 - rate * 0.1) - to_host(weight)) / (rate * math.sqrt(2))
    np.testing.assert_allclose(moved, to_host(orthogonal(xp.asarray(drawn))), atol=1e-6)


def test_the_rate_goes_up_in_a_line_and_down_as_a_cosine() -> None:
    rates = [learning_rate(step, 100, 10, 2.0) for step in range(100)]
    np.testing.assert_allclose(rates[:10], np.arange(1, 11) / 5)
    assert rates[9] == rates[10] == 2.0
    assert rates[55] == pytest.approx(1.0)
    assert all(before > after for before, after in pairwise(rates[10:]))
    assert 0 < rates[-1] < 0.01
    assert learning_rate(0, 1, 0, 2.0) == 2.0


def test_clip_shortens_what_is_too_long_and_nothing_else() -> None:
    gradient = xp.asarray([3.0, 4.0])
    assert clip(gradient, 6) == 5
    assert to_host(gradient).tolist() == [3, 4]
    assert clip(gradient, 1) == 5
    np.testing.assert_allclose(to_host(gradient), [0.6, 0.8])
