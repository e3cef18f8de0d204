"""Drawing tokens, against probabilities worked out by hand, and the bounds of SamplingParams."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from paged_ref.core.engine.sampling import RequestError, SamplingParams, apply_logits_hook, draw, random_generator

PROBABILITY = np.array([0.05, 0.4, 0.15, 0.1, 0.3])
LOGITS = np.log(PROBABILITY).astype(np.float32)


def frequencies(params: SamplingParams, draws: int = 20_000) -> np.ndarray:
    rng = np.random.default_rng(1)
    counts = Counter(draw(LOGITS, params, rng) for _ in range(draws))
    return np.array([counts[i] / draws for i in range(len(LOGITS))])


def test_greedy_takes_the_likeliest_and_no_random_number() -> None:
    rng = np.random.default_rng(0)
    state = rng.bit_generator.state
    assert draw(LOGITS, SamplingParams(), rng) == 1
    assert rng.bit_generator.state == state


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, PROBABILITY),
        ({"top_k": 2}, [0, 4 / 7, 0, 0, 3 / 7]),
        ({"top_k": 99}, PROBABILITY),
        ({"top_p": 0.6}, [0, 4 / 7, 0, 0, 3 / 7]),
        ({"top_p": 0.01}, [0, 1, 0, 0, 0]),
        ({"top_p": 1.0}, PROBABILITY),
        ({"top_k": 3, "top_p": 0.5}, [0, 4 / 7, 0, 0, 3 / 7]),
        ({"temperature": 0.5}, PROBABILITY**2 / (PROBABILITY**2).sum()),
    ],
)
def test_the_drawn_frequencies_are_the_probabilities(options: dict[str, Any], expected: Any) -> None:
    params = SamplingParams(**{"temperature": 1.0, **options})
    np.testing.assert_allclose(frequencies(params), expected, atol=0.015)


def test_each_sample_has_its_own_stream() -> None:
    params = SamplingParams(temperature=1.0, seed=5, n=3)
    for i in range(3):
        alone = SamplingParams(temperature=1.0, seed=5 + i)
        assert random_generator(params, i).random() == random_generator(alone, 0).random()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "max_tokens is 0; at least 1"),
        ({"max_tokens": -3}, "max_tokens is -3; at least 1"),
        ({"temperature": -0.1}, "temperature is -0.1; at least 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": 0}, "top_k is 0; at least 1"),
        ({"top_p": 0.0}, "top_p is 0.0; above 0 and at most 1"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"n": 0}, "n is 0; at least 1"),
        ({"seed": -1}, "seed is -1; at least 0"),
        ({"stop": ["a", ""]}, "stop holds an empty string"),
        ({"stop": ""}, "stop holds an empty string"),
    ],
)
def test_params_out_of_bounds(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingParams(**options)


def test_a_hook_gets_a_copy_and_its_answer_is_used() -> None:
    def only_the_last(tokens: object, logits: np.ndarray) -> np.ndarray:
        logits[:-1] = -np.inf
        return logits

    before = LOGITS.copy()
    params = SamplingParams(logits_hook=only_the_last)
    assert draw(apply_logits_hook(LOGITS, [1, 2], params), params, np.random.default_rng(0)) == 4
    np.testing.assert_array_equal(LOGITS, before)


def test_a_hook_that_answers_in_another_shape_is_refused() -> None:
    params = SamplingParams(logits_hook=lambda tokens, logits: logits[:2])
    with pytest.raises(RequestError) as caught:
        apply_logits_hook(LOGITS, [], params)
    assert str(caught.value.__cause__) == "logits_hook returned shape [2]; [5] is needed"
