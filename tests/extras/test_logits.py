"""How parameters change logits: all together against float64 code, one by one against transformers' processors."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest

from paged_ref.core.device import to_host, xp
from paged_ref.extras import logits as logits_module
from paged_ref.extras.logits import Row, shape_logits
from paged_ref.extras.logprobs import Logprob, token_logprobs
from paged_ref.extras.sampling_params import SamplingParams

VOCAB = 40
STOPS = [0, 3]
BAD_WORDS = [[5], [6, 7], [1, 2, 9]]
PROMPT = [4, 8, 8, 11]
OUTPUTS = [[], [6], [1, 2], [8, 12, 12, 12, 6], [12] * 7]
PARAMS: list[dict[str, Any]] = [
    {},
    {"min_p": 0.2, "temperature": 0.7},
    {"min_p": 0.9},  # greedy: no effect
    {"min_tokens": 3},
    {"repetition_penalty": 1.5},
    {"repetition_penalty": 0.6},
    {"presence_penalty": 1.5},
    {"frequency_penalty": -0.5},
    {"logit_bias": {5: 3.0, 39: -2.5}},
    {"allowed_token_ids": [2, 5, 12, 39]},
    {"bad_words": ["a"]},
    {
        "min_p": 0.05, "temperature": 1.3, "min_tokens": 2, "repetition_penalty": 1.2, "presence_penalty": 0.3,
        "frequency_penalty": 0.7, "logit_bias": {12: 4.0, 6: -1.0}, "allowed_token_ids": range(0, 40, 2),
        "bad_words": ["a"],
    },
]  # fmt: skip


def row(place: int, output: list[int], options: dict[str, Any]) -> Row:
    params = SamplingParams(max_tokens=None, **options)
    words = BAD_WORDS if params.bad_words else []
    allowed = None if params.allowed_token_ids is None else np.array(params.allowed_token_ids)
    return Row(place, params, allowed, np.array(STOPS), words, np.unique(PROMPT), dict(Counter(output)), output)


def by_hand(logits: np.ndarray, output: list[int], o: dict[str, Any]) -> np.ndarray:
    """One row, one token at a time, in float64."""
    x = [float(v) for v in logits]
    for token in range(VOCAB):
        bad = any(word[-1] == token and output[len(output) - len(word) + 1 :] == word[:-1] for word in BAD_WORDS)
        if "allowed_token_ids" in o and token not in o["allowed_token_ids"]:
            x[token] = -math.inf
        if "bad_words" in o and bad:
            x[token] = -math.inf
        if token in STOPS and len(output) < o.get("min_tokens", 0):
            x[token] = -math.inf
        x[token] += o.get("logit_bias", {}).get(token, 0)
        if token in PROMPT or token in output:
            penalty = o.get("repetition_penalty", 1)
            x[token] = x[token] / penalty if x[token] > 0 else x[token] * penalty
        x[token] -= o.get("frequency_penalty", 0) * output.count(token)
        x[token] -= o.get("presence_penalty", 0) if token in output else 0
    if "min_p" in o and "temperature" in o:
        shares = [math.exp((v - max(x)) / o["temperature"]) for v in x]
        x = [v if share >= o["min_p"] else -math.inf for v, share in zip(x, shares, strict=True)]
    return np.array(x)


def random_logits(num_rows: int, seed: int = 0) -> np.ndarray:
    return (4 * np.random.default_rng(seed).standard_normal((num_rows, VOCAB))).astype(np.float32)


def test_all_parameters_of_all_rows_together() -> None:
    cases = [(output, options) for output in OUTPUTS for options in PARAMS]
    before = random_logits(len(cases) + 1)
    logits = xp.asarray(before)
    if logits is before:
        logits = before.copy()
    shape_logits(logits, [row(place, *case) for place, case in enumerate(cases)])
    after = to_host(logits)
    for place, (output, options) in enumerate(cases):
        wanted = by_hand(before[place], output, options)
        np.testing.assert_allclose(after[place], wanted, rtol=1e-5, atol=1e-5, err_msg=f"{options} after {output}")
    np.testing.assert_array_equal(after[-1], before[-1])  # a row that nothing was asked of


def test_no_rows_and_nothing_asked_touch_nothing() -> None:
    before = random_logits(2)
    logits = before.copy() if xp is np else xp.asarray(before)
    shape_logits(logits, [])
    shape_logits(logits, [row(1, [3], {})])
    np.testing.assert_array_equal(to_host(logits), before)


def test_many_rows_take_as_many_array_operations_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def counted(places: logits_module.Places) -> Any:
        calls.append(len(places))
        return indices(places)

    indices = logits_module._indices
    monkeypatch.setattr(logits_module, "_indices", counted)
    for num_rows in (1, 256):
        calls.clear()
        logits = xp.asarray(random_logits(num_rows).copy())
        shape_logits(logits, [row(place, [6], PARAMS[-1]) for place in range(num_rows)])
        # allowed_token_ids; bad_words and min_tokens together, two places for each row; bias; repetition; the others
        assert calls == [num_rows, 2 * num_rows, num_rows, num_rows, num_rows]


@pytest.mark.parametrize("count", [0, 1, 5, VOCAB, -1])
def test_log_probabilities(count: int) -> None:
    logits, chosen = random_logits(6, seed=1), [0, 7, 39, 12, 3, 3]
    logits[5, [3, 9]] = 20.0  # two tokens that are equally likely: the smaller id first
    found = token_logprobs(xp.asarray(logits), chosen, [count, count, 2, count, count, count], str)
    for place, (token, entries) in enumerate(zip(chosen, found, strict=True)):
        wide = logits[place].astype(np.float64)
        wanted = wide - wide.max() - math.log(np.exp(wide - wide.max()).sum())
        order = sorted(range(VOCAB), key=lambda i: (-wanted[i], i))
        size = VOCAB if count < 0 else count
        assert next(iter(entries)) == token
        assert set(entries) == {token, *order[: 2 if place == 2 else size]}
        for i, entry in entries.items():
            rank = 1 + int((wanted > wanted[i]).sum()) if place == 5 and i == 3 else order.index(i) + 1
            assert entry == Logprob(pytest.approx(wanted[i], abs=1e-5), rank, str(i))  # type: ignore[arg-type]


def test_log_probabilities_of_more_rows_than_fit_together(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, chosen = xp.asarray(random_logits(7)), list(range(7))
    whole = token_logprobs(logits, chosen, [3] * 7, str)
    monkeypatch.setattr("paged_ref.extras.logprobs.PART", 2 * VOCAB + 1)
    assert token_logprobs(logits, chosen, [3] * 7, str) == whole


# --- transformers ----------------------------------------------------------------------------------------


@pytest.mark.compare
@pytest.mark.parametrize("options", PARAMS[1:11], ids=str)
def test_against_the_processors_of_transformers(options: dict[str, Any]) -> None:
    torch = pytest.importorskip("torch", reason="the extra `compare` (torch, transformers) is not installed")
    transformers = pytest.importorskip("transformers", reason="the extra `compare` is not installed")
    params = SamplingParams(max_tokens=None, **options)
    cpu = torch.device("cpu")
    bias = {(token,): value for token, value in (params.logit_bias or {}).items()}
    others = sorted(set(range(VOCAB)) - set(params.allowed_token_ids or range(VOCAB)))
    steps: list[tuple[bool, Any]] = [
        (params.min_tokens > 0, lambda: transformers.MinNewTokensLengthLogitsProcessor(
            len(PROMPT), params.min_tokens, STOPS, device=cpu)),
        (params.repetition_penalty != 1, lambda: transformers.RepetitionPenaltyLogitsProcessor(
            params.repetition_penalty)),
        (bool(bias), lambda: transformers.SequenceBiasLogitsProcessor(bias)),
        (bool(others), lambda: transformers.SuppressTokensLogitsProcessor(others, device="cpu")),
        (bool(params.bad_words), lambda: transformers.NoBadWordsLogitsProcessor(BAD_WORDS)),
        (params.min_p > 0 and params.temperature > 0, lambda: transformers.LogitsProcessorList(
            [transformers.TemperatureLogitsWarper(params.temperature), transformers.MinPLogitsWarper(params.min_p)])),
    ]  # fmt: skip
    for output in OUTPUTS:
        before = random_logits(1)
        logits = before.copy()
        shape_logits(logits, [row(0, output, options)])
        wanted = torch.tensor(before)
        for used, make in steps:
            if used:
                wanted = make()(torch.tensor([[*PROMPT, *output]]), wanted)
        result = wanted.numpy() * (params.temperature or 1)
        if params.presence_penalty or params.frequency_penalty:  # transformers has none
            result = by_hand(before[0], output, options)[None]
        np.testing.assert_allclose(logits, result, rtol=1e-5, atol=1e-5)
