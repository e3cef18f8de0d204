"""Beam search and parallel samples: the right sequences come out, and they share their blocks on the way."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.beam_oracle import Found, exhaustive
from support.driving import Engine
from support.plain import PlainLlama

from paged_ref import LLM, RequestOutput, SamplingParams
from paged_ref.core.engine.outputs import SequenceOutput
from paged_ref.core.memory.paged import PagedManager
from paged_ref.core.model.loading import TINY
from paged_ref.extras.sanitizer import SanitizedKV
from paged_ref.interop.checkpoints import load
from paged_ref.timeline.events import BeamsReordered

PAPER = "Four score and seven years ago our"
PROMPTS = [PAPER, "Once upon a time", "Tom saw a big dog in the park and"]
FULL_STOP, COMMA = 14, 12  # token ids of the embedded model


# --- the oracle ----------------------------------------------------------------------------------------


@cache
def plain(model: str) -> PlainLlama:
    checkpoint = load(model)
    return PlainLlama(checkpoint.config, checkpoint.weights)


@cache
def log_probabilities(model: str, sequences: tuple[tuple[int, ...], ...]) -> list[list[float]]:
    """Of every token after each of the sequences."""
    logits = plain(model).logits(sequences)
    logits -= logits.max(axis=1, keepdims=True)
    answer: list[list[float]] = (logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))).tolist()
    return answer


@cache
def best_beams(
    model: str, prompt: tuple[int, ...], width: int, max_tokens: int, penalty: float, ends: tuple[int, ...]
) -> list[Found]:
    """What an exhaustive search finds."""

    def after(sequences: list[tuple[int, ...]]) -> list[list[float]]:
        return log_probabilities(model, tuple(prompt + tokens for tokens in sequences))

    return exhaustive(after, width, max_tokens, penalty, ends)


def assert_found(output: RequestOutput, model: str, params: SamplingParams) -> list[Found]:
    """The output is what the exhaustive search finds, in its order."""
    ends = (*(() if params.ignore_eos else load(model).config.eos_token_ids), *params.stop_token_ids)
    width, penalty = params.beam_width or 1, params.length_penalty
    wanted = best_beams(model, tuple(output.prompt_token_ids), width, params.max_tokens, penalty, ends)
    assert [tuple(sample.token_ids) for sample in output.outputs] == [found.tokens for found in wanted]
    np.testing.assert_allclose(
        [score_of(sample) for sample in output.outputs], [found.score for found in wanted], rtol=1e-5, atol=1e-4
    )
    reasons = ["stop" if found.tokens[-1] in ends else "length" for found in wanted]
    assert [sample.finish_reason for sample in output.outputs] == reasons
    return wanted


# --- the right sequences -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("width", "penalty", "stop"),
    [
        pytest.param(width, penalty, stop, marks=[pytest.mark.slow] * (width != 4 and penalty != 2.0 * (stop == ())))
        for width in (1, 2, 4)
        for penalty in (-1.0, 0.0, 1.0, 2.0)
        for stop in ((), (FULL_STOP, COMMA))
    ],
)
def test_beam_search_finds_what_an_exhaustive_search_finds(width: int, penalty: float, stop: tuple[int, ...]) -> None:
    params = SamplingParams(max_tokens=12, beam_width=width, length_penalty=penalty, stop_token_ids=stop)
    engine = Engine(block_size=4)
    outputs = [engine.add(prompt, params) for prompt in PROMPTS]
    engine.finish()
    for output in outputs:
        assert_found(output, "tiny", params)


@pytest.mark.parametrize("penalty", [0.5, 1.5])
def test_beam_search_on_stories260k(stories260k: Path, penalty: float) -> None:
    full_stop = load(stories260k).tokenizer.encode("Once.")[-1]
    params = SamplingParams(max_tokens=16, beam_width=3, length_penalty=penalty, stop_token_ids=[full_stop])
    engine = Engine(stories260k, block_size=4)
    outputs = [engine.add(prompt, params) for prompt in PROMPTS[1:]]
    engine.finish()
    ends = {sample.finish_reason for output in outputs for sample in output.outputs}
    assert ends == {"stop", "length"} or penalty < 1
    for output in outputs:
        assert_found(output, str(stories260k), params)


@pytest.mark.parametrize(
    "options",
    [
        {"block_size": 1},
        {"block_size": 4},
        {"block_size": 16},
        {"block_size": 4, "max_batch_tokens": 1},  # the beams of a request in different steps
        {"block_size": 4, "max_batch_tokens": 3},
        {"block_size": 2, "prefix_cache": True},
    ],
    ids=str,
)
def test_memory_and_steps_change_no_beam(options: dict[str, Any]) -> None:
    params = SamplingParams(max_tokens=12, beam_width=4, stop_token_ids=[FULL_STOP])
    engine = Engine(**options)
    outputs = [engine.add(prompt, params) for prompt in PROMPTS]
    engine.finish()
    for output in outputs:
        assert_found(output, "tiny", params)


@pytest.mark.parametrize("max_batch_tokens", [3, 512])
@pytest.mark.parametrize("block_size", [1, 4])
@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_beams_survive_preemption(preemption: str, block_size: int, max_batch_tokens: int) -> None:
    small = 60 if block_size == 1 else 68
    engine = Engine(
        block_size=block_size, kv_cache_tokens=small, preemption=preemption, max_batch_tokens=max_batch_tokens
    )
    before = engine.add("The cat", SamplingParams(max_tokens=55, ignore_eos=True))  # it came first, so it stays
    params = SamplingParams(max_tokens=14, beam_width=4, length_penalty=1.0)
    outputs = [engine.add(prompt, params) for prompt in PROMPTS[:2]]
    engine.finish()
    assert before.num_preemptions == 0
    assert sum(output.num_preemptions for output in outputs) > 0
    assert (engine.transfers["swap_out"] > 0) == (engine.transfers["swap_in"] > 0) == (preemption == "swap")
    for output in outputs:
        assert_found(output, "tiny", params)


def test_width_1_is_greedy() -> None:
    engine = Engine(block_size=4)
    for stop in ((), (FULL_STOP,)):
        greedy = engine.run(PROMPTS, SamplingParams(max_tokens=20, stop_token_ids=stop)).outputs
        beam = engine.run(PROMPTS, SamplingParams(max_tokens=20, stop_token_ids=stop, beam_width=1)).outputs
        for a, b in zip(greedy, beam, strict=True):
            ((one,), (other,)) = a.outputs, b.outputs
            assert (one.token_ids, one.text, one.finish_reason) == (other.token_ids, other.text, other.finish_reason)


def test_the_text_and_the_best_beam_of_the_papers_sentence() -> None:
    engine = Engine(block_size=4)
    output = engine.run([PAPER], SamplingParams(max_tokens=3, beam_width=4)).outputs[0]
    assert output.outputs[0].text == " fathers brought forth"
    assert [sample.index for sample in output.outputs] == [0, 1, 2, 3]
    scores = [score for sample in output.outputs if (score := sample.score) is not None]
    assert scores == sorted(scores, reverse=True)


# --- sharing -------------------------------------------------------------------------------------------


def test_beams_share_blocks_and_give_them_back() -> None:
    engine = Engine(block_size=4)
    output = engine.add(PROMPTS[2], SamplingParams(max_tokens=16, beam_width=4))
    most_shared, most_held = 0, 0

    def look() -> None:
        nonlocal most_shared, most_held
        snapshot = engine.manager.snapshot()
        most_shared = max(most_shared, snapshot.shared)
        most_held = max(most_held, engine.manager.num_slots - snapshot.free)

    engine.finish(look)
    prompt_blocks = len(output.prompt_token_ids) // 4
    assert most_shared >= 3 * prompt_blocks * 4  # at least the prompt's full blocks, for three beams more
    apart = 4 * -(-(len(output.prompt_token_ids) + 15) // 4) * 4
    assert most_held < apart  # less than four beams need that share nothing
    assert any(isinstance(event, BeamsReordered) for event in engine.events)
    assert engine.transfers["copy"] > 0


def tables(manager: PagedManager) -> list[list[int]]:
    return [table.blocks for table in manager.tables.values()]


def test_the_papers_figure_8_on_the_real_engine() -> None:
    """Two samples share the prompt's blocks 7 and 1; the first to write copies 1 to 3, the second writes in place."""
    engine = Engine(block_size=4, kv_cache_tokens=36, free_order=[7, 1, 3, 0, 2, 4, 5, 6, 8])
    manager, kv = engine.bare, engine.llm.engine.kv
    assert isinstance(manager, PagedManager)
    assert isinstance(kv, SanitizedKV)
    encode = engine.llm.tokenizer.encode
    other = " mother"  # the paper's second sample says mothers, which need not be one token
    words = iter(encode(word)[0] for word in (" fathers", other, " brought", " brought"))

    def say_the_next_word(tokens: object, logits: np.ndarray) -> np.ndarray:
        logits[next(words)] = 1000.0
        return logits

    output = engine.add(PAPER, SamplingParams(max_tokens=2, n=2, logits_hook=say_the_next_word))
    engine.step()
    assert tables(manager) == [[7, 1], [7, 1]]
    assert {block: manager.pool.ref_count[block] for block in (7, 1, 3)} == {7: 2, 1: 2, 3: 0}
    prompt = kv.inner.device[:, :, 1, :3].copy()  # K and V of "years ago our"

    plan = engine.llm.engine.scheduler.schedule()  # what step() begins with; then it could be seen only after its end
    assert [(t.kind, t.source, t.destination) for t in plan.transfers] == [("copy", 1, 3)]
    assert tables(manager) == [[7, 3], [7, 1]]
    assert {block: manager.pool.ref_count[block] for block in (7, 1, 3)} == {7: 2, 1: 1, 3: 1}
    engine.llm.engine.scheduler.schedule = lambda: plan  # type: ignore[method-assign]
    engine.step()
    assert [sample.text for sample in output.outputs] == [" fathers brought", f"{other} brought"]
    for block in (3, 1):
        assert (kv.inner.device[:, :, block, :3] == prompt).all()
    fathers, mothers = kv.inner.device[:, :, 3, 3], kv.inner.device[:, :, 1, 3]
    assert not np.isnan(fathers).any()
    assert (fathers != mothers).any()
    assert manager.pool.num_free == 9


# --- transformers --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def theirs() -> Any:
    """The embedded checkpoint in transformers."""
    pytest.importorskip("torch", reason="the extra `compare` (torch, transformers) is not installed")
    transformers = pytest.importorskip("transformers", reason="the extra `compare` is not installed")
    model = transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype="float32").eval()
    model.generation_config.pad_token_id = model.config.vocab_size - 1
    return model


def generate(theirs: Any, prompt: list[int], ends: list[int], max_tokens: int, **options: Any) -> tuple[Any, Any]:
    """Token ids that transformers generates, cut after the end; and the scores of beam search."""
    import torch

    answer = theirs.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=max_tokens,
        do_sample=False,
        eos_token_id=ends,
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )
    cut = []
    for row in answer.sequences[:, len(prompt) :].tolist():
        end = next((i for i, token in enumerate(row) if token in ends), len(row) - 1)
        cut.append(row[: end + 1])
    return cut, getattr(answer, "sequences_scores", None)


@pytest.mark.compare
@pytest.mark.parametrize("prompt", [*PROMPTS, "The cat", "One day, Ben found a red box under the tree."])
def test_greedy_is_transformers_greedy(theirs: Any, prompt: str) -> None:
    llm = LLM("tiny", block_size=4, sanitize=True)
    for ends in ([0], [0, FULL_STOP]):
        params = SamplingParams(max_tokens=60, stop_token_ids=ends[1:])
        (output,) = llm.generate(prompt, params)
        want, _ = generate(theirs, output.prompt_token_ids, ends, 60)
        assert [output.outputs[0].token_ids] == want


@pytest.mark.compare
@pytest.mark.parametrize("ends", [[0], [0, FULL_STOP], [0, FULL_STOP, COMMA]], ids=str)
@pytest.mark.parametrize("penalty", [-1.0, 0.0, 1.0, 2.0])
@pytest.mark.parametrize("width", [2, 4])
def test_beam_search_is_transformers_beam_search(theirs: Any, width: int, penalty: float, ends: list[int]) -> None:
    llm = LLM("tiny", block_size=4, sanitize=True)
    for prompt in PROMPTS:
        params = SamplingParams(max_tokens=16, beam_width=width, length_penalty=penalty, stop_token_ids=ends[1:])
        (output,) = llm.generate(prompt, params)
        want, scores = generate(
            theirs, output.prompt_token_ids, ends, 16,
            num_beams=width, num_return_sequences=width, length_penalty=penalty, early_stopping=False,
        )  # fmt: skip
        assert [sample.token_ids for sample in output.outputs] == want
        np.testing.assert_allclose([score_of(sample) for sample in output.outputs], scores, rtol=1e-5, atol=1e-4)


def score_of(sample: SequenceOutput) -> float:
    assert sample.score is not None
    return sample.score
