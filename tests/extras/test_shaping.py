"""Shaped requests in the engine: the same whatever the memory does, and against float64 code on the logits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
from support.driving import Engine

from paged_ref import LLM, RequestOutput, SamplingParams
from paged_ref.core.engine import sampling
from paged_ref.core.engine.outputs import SequenceOutput
from paged_ref.extras import shaping
from paged_ref.extras.logits import shape_logits
from paged_ref.extras.logprobs import Logprob
from paged_ref.extras.sampling_params import SHAPING

PAPER = "Four score and seven years ago our"
PROMPTS = [PAPER, "The cat", "Tom saw a big dog in the park and"]
SHAPED: dict[str, Any] = {
    "max_tokens": 10, "temperature": 0.8, "seed": 3, "repetition_penalty": 1.2, "presence_penalty": 0.4,
    "frequency_penalty": 0.3, "min_p": 0.02, "min_tokens": 6, "logit_bias": {264: -3.0}, "bad_words": ["dog"],
    "logprobs": 2, "prompt_logprobs": 1, "ignore_eos": True,
}  # fmt: skip


@cache
def tiny() -> LLM:
    return LLM("tiny")


def made(output: RequestOutput) -> list[tuple[str, list[int], Any]]:
    return [(sample.text, sample.token_ids, sample.stop_reason) for sample in output.outputs]


def run(llm: LLM) -> None:
    while llm.has_unfinished:
        llm.step()


def assert_same_logprobs(mine: Sequence[Any] | None, wanted: Sequence[Any] | None) -> None:
    """The places have the same tokens in the same order, with log-probabilities that differ by rounding at most."""
    assert mine is not None
    assert wanted is not None
    assert len(mine) == len(wanted)
    for a, b in zip(mine, wanted, strict=True):
        if a is None or b is None:
            assert a is b
            continue
        assert next(iter(a)) == next(iter(b))
        assert {i: e.rank for i, e in a.items()} == {i: e.rank for i, e in b.items()}
        assert [e.logprob for e in a.values()] == pytest.approx([e.logprob for e in b.values()], abs=1e-4)


# --- whatever the memory does ----------------------------------------------------------------------------


@cache
def ample(n: int) -> list[RequestOutput]:
    params = [SamplingParams(n=n, **SHAPED)] * len(PROMPTS)
    return tiny().generate(PROMPTS, params)


@pytest.mark.parametrize(
    "options",
    [
        {"block_size": 4, "kv_cache_tokens": 64, "preemption": "swap", "watermark": 0},
        {"block_size": 4, "kv_cache_tokens": 64, "preemption": "recompute", "prefix_cache": True},
        {"block_size": 4, "max_batch_tokens": 5, "prefix_cache": True},
        pytest.param({"manager": "standard", "kv_cache_tokens": 60, "reserve": "exact"}, marks=pytest.mark.slow),
        pytest.param({"manager": "swapping", "kv_cache_tokens": 64}, marks=pytest.mark.slow),
    ],
    ids=str,
)
@pytest.mark.parametrize("n", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_memory_changes_no_token_and_no_log_probability(options: dict[str, Any], n: int) -> None:
    engine = Engine(**options)
    for _ in range(2):  # the second time, a prefix cache knows the prompts
        outputs = [engine.add(prompt, SamplingParams(n=n, **SHAPED)) for prompt in PROMPTS]
        engine.finish()
        for output, wanted in zip(outputs, ample(n), strict=True):
            assert made(output) == made(wanted)
            assert_same_logprobs(output.prompt_logprobs, wanted.prompt_logprobs)
            for sample, its in zip(output.outputs, wanted.outputs, strict=True):
                assert_same_logprobs(sample.logprobs, its.logprobs)
                assert sample.cumulative_logprob == pytest.approx(its.cumulative_logprob, abs=1e-3)


def test_a_step_that_is_undone_leaves_no_log_probability_twice() -> None:
    for fails in (1, 2, 5):
        records: list[object] = []

        def on_step(record: object, fails: int = fails, records: list[object] = records) -> None:
            records.append(record)
            if len(records) == fails:
                raise OSError

        llm = LLM("tiny", max_batch_tokens=6, on_step=on_step)
        outputs = [llm.output_of(llm.add_request(prompt, SamplingParams(n=2, **SHAPED))) for prompt in PROMPTS]
        with pytest.raises(OSError):  # noqa: PT011
            run(llm)
        for output in outputs:
            for sample in output.outputs:
                assert len(sample.logprobs or ()) == len(sample.token_ids)
        run(llm)
        for output, wanted in zip(outputs, ample(2), strict=True):
            assert made(output) == made(wanted)
            assert_same_logprobs(output.prompt_logprobs, wanted.prompt_logprobs)
            for sample, its in zip(output.outputs, wanted.outputs, strict=True):
                assert_same_logprobs(sample.logprobs, its.logprobs)
                assert sample.cumulative_logprob == pytest.approx(its.cumulative_logprob, abs=1e-3)


def test_the_prefix_cache_is_used_again_once_a_prompt_is_scored() -> None:
    llm = LLM("tiny", block_size=4, prefix_cache=True)
    prompt = list(range(5, 26))
    llm.generate([prompt], SamplingParams(max_tokens=1))
    chunks: list[int] = []
    llm.engine.model.forward = counting(llm.engine.model.forward, chunks)  # type: ignore[method-assign]
    for count, computed in ((None, 1), (0, 21), (None, 1)):
        chunks.clear()
        (output,) = llm.generate([prompt], SamplingParams(max_tokens=1, prompt_logprobs=count))
        assert chunks == [computed]
        assert len(output.prompt_logprobs or ()) == (0 if count is None else 21)


def test_the_prefix_cache_is_reset_between_requests() -> None:
    llm = LLM("tiny", block_size=4, prefix_cache=True)
    prompt = list(range(5, 26))
    llm.generate([prompt], SamplingParams(max_tokens=1))
    assert llm.engine.manager.snapshot().cached == 20
    llm.add_request(prompt, SamplingParams(max_tokens=2))
    llm.step()
    assert not llm.reset_prefix_cache()
    llm.step()
    assert llm.engine.manager.snapshot().cached == 20
    assert llm.reset_prefix_cache()
    assert llm.engine.manager.snapshot().cached == 0
    assert llm.engine.manager.admit(99, prompt, 30) == 0
    assert LLM("tiny").reset_prefix_cache()  # without one, there is nothing to forget


def counting(forward: Any, into: list[int]) -> Any:
    def counted(inputs: Any, kv: Any) -> Any:
        into.append(len(inputs.token_ids))
        return forward(inputs, kv)

    return counted


# --- against float64 code --------------------------------------------------------------------------------


def logits_after(tokens: list[int]) -> np.ndarray:
    """From a run of the core's request."""
    found: list[np.ndarray] = []

    def hook(_: Sequence[int], logits: np.ndarray) -> np.ndarray:
        found.append(logits.astype(np.float64))
        return logits

    tiny().generate([tokens], sampling.SamplingParams(max_tokens=1, logits_hook=hook))
    return found[0]


def test_log_probabilities_are_of_the_models_own_logits() -> None:
    (output,) = tiny().generate(PAPER, SamplingParams(**SHAPED | {"max_tokens": 4, "min_tokens": 2, "logprobs": -1}))
    tokens, sample = output.prompt_token_ids + output.outputs[0].token_ids, output.outputs[0]
    assert output.prompt_logprobs is not None
    assert sample.logprobs is not None
    assert output.prompt_logprobs[0] is None
    entries: list[dict[int, Logprob]] = [*output.prompt_logprobs[1:], *sample.logprobs]
    for place, entry in enumerate(entries, start=1):
        logits = logits_after(tokens[:place])
        wanted = logits - logits.max() - math.log(np.exp(logits - logits.max()).sum())
        assert next(iter(entry)) == tokens[place]
        assert len(entry) == len(wanted) if place >= len(output.prompt_token_ids) else len(entry) <= 2
        for i, each in entry.items():
            assert each.logprob == pytest.approx(wanted[i], abs=1e-3)
        assert entry[tokens[place]].rank == pytest.approx(1 + (wanted > wanted[tokens[place]]).sum(), abs=1)
    assert sample.cumulative_logprob == pytest.approx(sum(e[i].logprob for e, i in zip(
        sample.logprobs, sample.token_ids, strict=True)))  # fmt: skip
    text = "".join(e[i].decoded_token or "" for e, i in zip(sample.logprobs, sample.token_ids, strict=True))
    assert text == sample.text


def test_streamed_tokens_carry_their_log_probabilities() -> None:
    llm = LLM("tiny")
    params = [SamplingParams(max_tokens=3, n=2, temperature=1.0, seed=1, logprobs=2), SamplingParams(max_tokens=2)]
    tokens = llm.stream(PROMPTS[:2], params)
    outputs = [llm.output_of(request_id) for request_id in (0, 1)]
    found = list(tokens)
    for index, sample in enumerate(outputs[0].outputs):
        assert [token.logprobs for token in found if (token.request_id, token.index) == (0, index)] == sample.logprobs
    assert [token.logprobs for token in found if token.request_id == 1] == [None, None]


def test_penalties_against_a_hook_in_float64() -> None:
    """Greedy tokens, of one request that is shaped and of one that shapes its logits itself."""
    options: dict[str, Any] = {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.25}

    def penalized(prompt_len: int) -> Any:
        def hook(tokens: Sequence[int], logits: np.ndarray) -> np.ndarray:
            x = logits.astype(np.float64)
            for token in set(tokens):
                x[token] = x[token] / 1.3 if x[token] > 0 else x[token] * 1.3
            for token in tokens[prompt_len:]:
                x[token] -= 0.25
            for token in set(tokens[prompt_len:]):
                x[token] -= 0.5
            return x

        return hook

    llm = tiny()
    prompts = [llm.get_tokenizer().encode(text) for text in PROMPTS]
    shaped = llm.generate(prompts, SamplingParams(max_tokens=20, **options))
    by_hook = llm.generate(
        prompts, [SamplingParams(max_tokens=20, logits_hook=penalized(len(prompt))) for prompt in prompts]
    )
    plain = llm.generate(prompts, SamplingParams(max_tokens=20))
    assert list(map(made, shaped)) == list(map(made, by_hook))
    assert list(map(made, shaped)) != list(map(made, plain))


def test_a_hook_sees_the_logits_after_all_else() -> None:
    seen: list[np.ndarray] = []

    def hook(_: Sequence[int], logits: np.ndarray) -> np.ndarray:
        seen.append(logits)
        return logits

    tiny().generate(PAPER, SamplingParams(max_tokens=1, allowed_token_ids=[5, 9], logits_hook=hook))
    assert np.flatnonzero(np.isfinite(seen[0])).tolist() == [5, 9]


def test_only_allowed_tokens_are_drawn() -> None:
    (output,) = tiny().generate(
        PAPER, SamplingParams(max_tokens=30, temperature=2.0, seed=1, allowed_token_ids=[40, 41, 300])
    )
    assert set(output.outputs[0].token_ids) == {40, 41, 300}


def test_logits_that_allow_no_token_end_their_request_by_name() -> None:
    llm = tiny()
    params = SamplingParams(allowed_token_ids=[0], min_tokens=2)
    with pytest.raises(ValueError, match=r"its largest logit is -inf after the model and what allowed_token_ids, bad"):
        llm.generate(PAPER, params)
    assert llm.generate(PAPER, SamplingParams(max_tokens=1))[0].outputs[0].text == " fathers"


# --- the ends of a text ----------------------------------------------------------------------------------


def end_of(**options: Any) -> SequenceOutput:
    """The paper's text goes on with: fathers brought forth, on this continent, a new nation."""
    return tiny().generate(PAPER, SamplingParams(max_tokens=8, **options))[0].outputs[0]


BROUGHT = tiny().tokenizer.encode(" brought")[-1]


@pytest.mark.parametrize(
    ("options", "text", "reason", "stop_reason"),
    [
        ({}, " fathers brought forth, on this continent", "length", None),
        ({"stop": None}, " fathers brought forth, on this continent", "length", None),
        ({"stop": ["ght f", "rth"]}, " fathers brou", "stop", "ght f"),
        ({"stop": "ght f", "include_stop_str_in_output": True}, " fathers brought f", "stop", "ght f"),
        ({"stop_token_ids": [BROUGHT]}, " fathers", "stop", BROUGHT),
        ({"stop_token_ids": [BROUGHT], "include_stop_str_in_output": True}, " fathers brought", "stop", BROUGHT),
        ({"stop": "brou", "min_tokens": 2}, " fathers brought forth, on this continent", "length", None),
        ({"stop": "ght f", "min_tokens": 2}, " fathers brou", "stop", "ght f"),  # it ends in the third token
        ({"stop": "ght f", "min_tokens": 3}, " fathers brought forth, on this continent", "length", None),
        ({"stop": "zzz", "min_tokens": 8}, " fathers brought forth, on this continent", "length", None),
        ({"logit_bias": {0: 100.0}}, "", "stop", None),  # the end of sequence
        ({"logit_bias": {0: 100.0}, "include_stop_str_in_output": True}, "", "stop", None),
        ({"logit_bias": {0: 100.0}, "skip_special_tokens": False}, "", "stop", None),
        (
            {"logit_bias": {0: 100.0}, "skip_special_tokens": False, "include_stop_str_in_output": True},
            "<|endoftext|>", "stop", None,
        ),
        ({"logit_bias": {0: 100.0}, "ignore_eos": True, "stop": "<|endoftext|>"}, "", "stop", "<|endoftext|>"),
        (
            {"logit_bias": {0: 100.0}, "ignore_eos": True, "stop": "text|><|end", "skip_special_tokens": False},
            "<|endof", "stop", "text|><|end",
        ),
    ],
    ids=str,
)  # fmt: skip
def test_ends(options: dict[str, Any], text: str, reason: str, stop_reason: Any) -> None:
    output = end_of(**options)
    assert (output.text, output.finish_reason, output.stop_reason) == (text, reason, stop_reason)


def test_min_tokens_forbids_every_end() -> None:
    output = end_of(logit_bias={0: 100.0, BROUGHT: 20.0}, stop_token_ids=[BROUGHT], min_tokens=3)
    assert len(output.token_ids) == 4
    assert not {0, BROUGHT} & set(output.token_ids[:3])
    assert (output.token_ids[3], output.finish_reason) == (0, "stop")


def test_a_stop_text_with_a_special_token_inside_is_refused() -> None:
    message = r"stop holds 'a<\|endoftext\|>', which contains the special token '<\|endoftext\|>'"
    with pytest.raises(ValueError, match=message):
        end_of(stop=["x", "a<|endoftext|>"])


def test_bad_words_are_not_completed() -> None:
    for words, text in (
        (["fathers"], "fathers"), (["brought forth"], "brought forth"), (["continent", "ought"], "continent"),
    ):  # fmt: skip
        output = end_of(bad_words=words)
        assert text in end_of().text
        assert text not in output.text
    assert end_of(bad_words=["forth brought"]).text == end_of().text


def test_beams_show_special_tokens_where_asked() -> None:
    texts = [
        end_of(beam_width=2, skip_special_tokens=skip, ignore_eos=True, logits_hook=lambda t, x: x + 30 * (x == x[0]))
        for skip in (True, False)
    ]
    assert ["<|endoftext|>" in output.text for output in texts] == [False, True]


# --- what is refused, and what costs nothing -------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"logit_bias": {99999: 1.0}}, "logit_bias holds token id 99999; known are 0 to 2047"),
        ({"allowed_token_ids": [3, -1]}, "allowed_token_ids holds token id -1; known are 0 to 2047"),
        ({"stop_token_ids": [2048]}, "stop_token_ids holds token id 2048; known are 0 to 2047"),
        ({"logprobs": 2049}, "logprobs is 2049; the vocabulary has 2048 tokens"),
        ({"prompt_logprobs": 9999}, "prompt_logprobs is 9999; the vocabulary has 2048 tokens"),
    ],
)
def test_tokens_that_the_vocabulary_does_not_have(options: dict[str, Any], message: str) -> None:
    llm = tiny()
    with pytest.raises(ValueError, match=message):
        llm.generate(PAPER, SamplingParams(**options))
    assert not llm.has_unfinished


def test_more_log_probabilities_than_fit_in_memory_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paged_ref.extras.memory_limit.machine_memory", lambda: 10**7)
    llm = tiny()
    for name, tokens in (("prompt_logprobs", 30), ("logprobs", 40)):
        message = f"{name} is -1, for {tokens} tokens: a request of this size needs 0.0 GB"
        options: dict[str, Any] = {name: -1}
        with pytest.raises(ValueError, match=message):
            llm.add_request([5] * 30, SamplingParams(max_tokens=40, **options))
    assert not llm.has_unfinished


def test_a_request_that_asks_for_nothing_is_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def counted(logits: Any, rows: Sequence[Any]) -> None:
        calls.append(len(rows))
        shape_logits(logits, rows)

    monkeypatch.setattr(shaping, "shape_logits", counted)
    llm = LLM("tiny")
    llm.generate(PROMPTS, SamplingParams(max_tokens=4, stop="zzz"))
    assert calls == []
    params = [SamplingParams(max_tokens=4), SamplingParams(max_tokens=2, logprobs=0)]
    llm.generate(PROMPTS[:2], params)
    assert calls == [1, 1]  # one of two rows, in the steps in which it ran


def test_every_parameter_has_a_default_that_shapes_nothing() -> None:
    assert not SamplingParams().shapes
    assert set(SHAPING) <= set(SamplingParams.__dataclass_fields__)
