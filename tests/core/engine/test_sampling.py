"""Drawing tokens, against probabilities worked out by hand, and what a logits hook may return."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from paged_ref.core.engine.sampling import RequestError, SamplingParams, apply_logits_hook, draw, random_generator
from paged_ref.core.engine.sequence import Sequence

PROBABILITY = np.array([0.05, 0.4, 0.15, 0.1, 0.3])
LOGITS = np.log(PROBABILITY).astype(np.float32)
SEQUENCE = Sequence(7, [1, 2], prompt_len=2, max_len=9)


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


@pytest.mark.parametrize("temperature", [5e-324, 1e-320, 1e-308, 1e-30])
def test_near_temperature_0_the_likeliest_is_drawn(temperature: float) -> None:
    params = SamplingParams(temperature=temperature, seed=0)
    rng = random_generator(params, 0)
    logits = np.array([3.0, -1e30, 80.0, -np.inf, 79.5], np.float32)
    assert {draw(logits, params, rng) for _ in range(20)} == {2}


@pytest.mark.parametrize("options", [{}, {"top_k": 4}, {"top_p": 0.999}])
def test_a_token_with_probability_0_is_never_drawn(options: dict[str, Any]) -> None:
    params = SamplingParams(temperature=1.0, **options)
    rng = np.random.default_rng(0)
    logits = np.array([-np.inf, 1.0, -np.inf, 1.0, -np.inf], np.float32)
    assert {draw(logits, params, rng) for _ in range(50)} == {1, 3}


def test_a_hook_gets_a_copy_and_its_answer_is_used() -> None:
    def only_the_last(tokens: object, logits: np.ndarray) -> np.ndarray:
        logits[:-1] = -np.inf
        return logits

    before = LOGITS.copy()
    params = SamplingParams(logits_hook=only_the_last)
    assert draw(apply_logits_hook(LOGITS, SEQUENCE, params), params, np.random.default_rng(0)) == 4
    np.testing.assert_array_equal(LOGITS, before)


def test_a_hook_that_answers_in_another_shape_is_refused() -> None:
    params = SamplingParams(logits_hook=lambda tokens, logits: logits[:2])
    with pytest.raises(RequestError) as caught:
        apply_logits_hook(LOGITS, SEQUENCE, params)
    assert str(caught.value.__cause__) == "logits_hook returned shape [2]; [5] is needed"


@pytest.mark.parametrize("wrong", [[np.nan, 1, 2, 3, 4], [0, 1, np.inf, 3, 4], [-np.inf] * 5, [0, 1, 2, 3, 10**400]])
def test_a_hook_whose_answer_has_no_largest_number_is_refused(wrong: Any) -> None:
    params = SamplingParams(logits_hook=lambda tokens, logits: wrong)
    with pytest.raises(RequestError) as caught:
        apply_logits_hook(LOGITS, SEQUENCE, params)
    if caught.value.__cause__ is None:
        assert str(caught.value).startswith("sequence 7 cannot go on: its largest logit is ")
        assert str(caught.value).endswith(" after logits_hook")
    else:
        assert str(caught.value.__cause__) == "logits_hook returned object; real numbers are needed"


def test_a_hook_may_forbid_tokens() -> None:
    allowed = np.array([-np.inf, -np.inf, 0.5, -np.inf, -np.inf])
    params = SamplingParams(logits_hook=lambda tokens, logits: logits + allowed)
    assert draw(apply_logits_hook(LOGITS, SEQUENCE, params), params, np.random.default_rng(0)) == 2
