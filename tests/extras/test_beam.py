"""The search alone, on a model that is a table of random numbers, and what its parameters exclude."""

from __future__ import annotations

import itertools
import random
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
from support.beam_oracle import exhaustive

from paged_ref.core.engine.engine import Engine
from paged_ref.core.engine.llm import LLM
from paged_ref.core.engine.outputs import RequestOutput
from paged_ref.core.engine.sequence import Group, Sequence
from paged_ref.extras.beam import BeamRequest, BeamSearch, log_softmax
from paged_ref.extras.sampling_params import SamplingParams

VOCAB_SIZE = 6


@cache
def logits_after(seed: int, tokens: tuple[int, ...]) -> np.ndarray:
    """[VOCAB_SIZE] float32: a model that looks at all tokens before."""
    rng = np.random.default_rng([seed, len(tokens), *tokens])
    return rng.standard_normal(VOCAB_SIZE).astype(np.float32) * 2


def after(seed: int, sequences: list[tuple[int, ...]]) -> list[list[float]]:
    """The log-probabilities of every token after each of the sequences."""
    return [log_softmax(logits_after(seed, tokens)).tolist() for tokens in sequences]


def search(seed: int, width: int, max_tokens: int, penalty: float, ends: tuple[int, ...]) -> BeamSearch:
    """Run a search to its end, as a request does."""
    found = BeamSearch(width, penalty)
    beams: list[list[int]] = [[]]
    for length in range(1, max_tokens + 1):
        logits = [logits_after(seed, tuple(beam)) for beam in beams]
        chosen = found.step(logits, beams, ends, is_last=length == max_tokens)
        if not chosen:
            break
        beams = [[*beams[continuation.beam], continuation.token_id] for continuation in chosen]
        assert len(beams) == len(found.log_probabilities) <= width
        assert found.log_probabilities == sorted(found.log_probabilities, reverse=True)
    return found


def test_log_softmax_is_exact_in_float64() -> None:
    logits = np.array([0.0, 700.0, -700.0, 699.0], np.float32)
    wide = logits.astype(np.float64) - 700
    np.testing.assert_allclose(log_softmax(logits), wide - np.log(np.exp(wide).sum()), rtol=1e-15)
    assert logits[1] == 700


@pytest.mark.parametrize("ends", [(), (0,), (0, 3)], ids=str)
@pytest.mark.parametrize("penalty", [-1.0, 0.0, 1.0, 2.0])
@pytest.mark.parametrize("width", [1, 2, 4])
def test_the_search_finds_what_an_exhaustive_search_finds(width: int, penalty: float, ends: tuple[int, ...]) -> None:
    for seed in range(20):
        wanted = exhaustive(partial(after, seed), width, 7, penalty, ends)
        found = search(seed, width, 7, penalty, ends)
        assert [tuple(hypothesis.tokens) for hypothesis in found.finished] == [each.tokens for each in wanted]
        np.testing.assert_allclose([hypothesis.score for hypothesis in found.finished], [each.score for each in wanted])
        for hypothesis in found.finished:
            assert hypothesis.stopped == (hypothesis.tokens[-1] in ends)


def test_wide_enough_a_search_finds_the_best_of_all_sequences() -> None:
    def score(tokens: tuple[int, ...]) -> float:
        return float(sum(log_softmax(logits_after(1, tokens[:i]))[token] for i, token in enumerate(tokens)))

    best = max(itertools.product(range(VOCAB_SIZE), repeat=3), key=score)
    assert tuple(search(1, VOCAB_SIZE**2, 3, 0.0, ()).finished[0].tokens) == best


def test_a_search_of_width_1_takes_the_likeliest_token_each_time() -> None:
    (hypothesis,) = search(2, 1, 5, 1.0, ()).finished
    tokens: list[int] = []
    for _ in range(5):
        tokens.append(int(logits_after(2, tuple(tokens)).argmax()))
    assert hypothesis.tokens == tokens


@pytest.mark.parametrize("allowed", [1, 2, 3])
def test_fewer_candidates_than_the_width_take_no_forbidden_token(allowed: int) -> None:
    found = BeamSearch(4, 1.0)
    beams: list[list[int]] = [[]]
    for length in range(1, 5):
        logits = [np.where(np.arange(VOCAB_SIZE) < allowed, logits_after(0, tuple(beam)), -np.inf) for beam in beams]
        chosen = found.step(logits, beams, (5,), is_last=length == 4)
        if chosen:
            assert len(chosen) == min(4, allowed * len(beams))
            beams = [[*beams[continuation.beam], continuation.token_id] for continuation in chosen]
    assert len(found.finished) == min(4, allowed**4)
    for hypothesis in found.finished:
        assert np.isfinite(hypothesis.score)
        assert max(hypothesis.tokens) < allowed


# --- as a request of the core's engine -------------------------------------------------------------------


def beam_request(llm: LLM, params: SamplingParams, prompt: list[int], on_reordered: Any = None) -> RequestOutput:
    """Queue a beam search, as the public LLM does."""
    engine: Engine = llm.engine
    output = RequestOutput(len(engine.requests), None, prompt, [], arrival=0.0)
    seq = Sequence(engine.next_seq_id, prompt.copy(), len(prompt), len(prompt) + (params.max_tokens or 0))
    group = Group([seq], params.beam_width or 1)
    engine.add(BeamRequest(output, params, group, llm.tokenizer, on_reordered))
    return output


@pytest.mark.parametrize("max_batch_tokens", [1, 3, 512])
def test_beams_share_blocks_and_give_them_back(max_batch_tokens: int) -> None:
    llm = LLM("tiny", block_size=4, max_batch_tokens=max_batch_tokens, kv_cache_tokens=256)
    prompt, manager = llm.tokenizer.encode("Tom saw a big dog in the park and"), llm.engine.manager
    reordered: list[Any] = []
    output = beam_request(llm, SamplingParams(max_tokens=12, beam_width=4), prompt, reordered.append)
    most_shared = 0
    while llm.engine.requests:
        llm.step()
        manager.check_integrity()
        most_shared = max(most_shared, manager.snapshot().shared)
    assert most_shared >= 3 * (len(prompt) // 4) * 4  # at least the prompt's full blocks, for three beams more
    assert manager.snapshot().free == manager.num_slots
    assert reordered
    assert all(len(pairs) == 4 for pairs in reordered)
    assert [sample.index for sample in output.outputs] == [0, 1, 2, 3]
    scores: list[Any] = [sample.score for sample in output.outputs]
    assert scores == sorted(scores, reverse=True)
    wide = LLM("tiny")
    (again,) = [beam_request(wide, SamplingParams(max_tokens=12, beam_width=4), prompt)]
    while wide.engine.requests:
        wide.step()
    assert [sample.token_ids for sample in again.outputs] == [sample.token_ids for sample in output.outputs]


def test_beams_survive_preemption_and_abort() -> None:
    small = LLM("tiny", block_size=4, kv_cache_tokens=76)
    params = SamplingParams(max_tokens=14, beam_width=4)
    prompts = [small.tokenizer.encode(text) for text in ("Once upon a time", "Tom saw a big dog in the park and")]
    outputs = [beam_request(small, params, prompt) for prompt in prompts]
    while small.engine.requests:
        small.step()
        small.engine.manager.check_integrity()
    assert sum(output.num_preemptions for output in outputs) > 0
    for prompt, output in zip(prompts, outputs, strict=True):
        wide = LLM("tiny", block_size=4)
        alone = beam_request(wide, params, prompt)
        while wide.engine.requests:
            wide.step()
        assert [sample.token_ids for sample in output.outputs] == [sample.token_ids for sample in alone.outputs]
    beam_request(small, params, prompts[0])
    for _ in range(random.Random(0).randrange(2, 6)):
        small.step()
    small.engine.abort(0)
    assert small.engine.manager.snapshot().free == small.engine.manager.num_slots
