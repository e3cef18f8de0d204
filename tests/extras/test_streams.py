"""Tokens as they come, several loops over one LLM, and what a loop that is left leaves behind."""

from __future__ import annotations

import itertools

import pytest

from paged_ref.core.engine.outputs import RequestOutput
from paged_ref.core.engine.sampling import SamplingParams
from paged_ref.extras.streams import StreamingLLM

PAPER = "Four score and seven years ago our"
MIXED = [PAPER, "Once upon a time", "The cat", "One day, Ben found a red box under the tree. " * 4]


def ids(outputs: list[RequestOutput]) -> list[list[int]]:
    return [sample.token_ids for output in outputs for sample in output.outputs]


@pytest.fixture(scope="module")
def tiny() -> StreamingLLM:
    return StreamingLLM("tiny")


def assert_empty(llm: StreamingLLM) -> None:
    assert not llm.has_unfinished
    assert llm.engine.manager.snapshot().free == llm.engine.manager.num_slots
    assert llm._loops == {}


@pytest.mark.parametrize("stop", ["a ", "e", "and happy", "girl named", "\n"])
def test_streamed_text_is_the_text_and_never_shows_a_stop_string(tiny: StreamingLLM, stop: str) -> None:
    params = SamplingParams(max_tokens=80, stop=[stop, "zzzz"])
    streamed = "".join(token.text for token in tiny.stream("Once upon a time", params))
    (output,) = tiny.generate("Once upon a time", params)
    (whole,) = tiny.generate("Once upon a time", SamplingParams(max_tokens=80))
    assert streamed == output.outputs[0].text == whole.outputs[0].text.partition(stop)[0]


def test_leaving_a_stream_frees_everything(tiny: StreamingLLM) -> None:
    for token in itertools.islice(tiny.stream(MIXED, SamplingParams(max_tokens=50)), 6):
        assert token.finish_reason is None
    # The generator is dropped here, half way.
    assert_empty(tiny)


def test_a_stream_that_is_dropped_before_its_first_token_frees_everything(tiny: StreamingLLM) -> None:
    stream = tiny.stream(MIXED, SamplingParams(max_tokens=50))
    assert tiny.has_unfinished
    del stream
    assert_empty(tiny)


def test_two_loops_over_one_engine_get_their_own_tokens(tiny: StreamingLLM) -> None:
    params = SamplingParams(max_tokens=12)
    want = ids(tiny.generate(MIXED[:2], params))
    loops = [tiny.stream(prompt, params) for prompt in MIXED[:2]]
    got: list[list[int]] = [[], []]
    for first, second in itertools.zip_longest(loops[0], loops[1]):
        got[0] += [] if first is None else [first.token_id]
        got[1] += [] if second is None else [second.token_id]
    assert got == want
    assert_empty(tiny)


def test_a_callback_sees_every_token(tiny: StreamingLLM) -> None:
    seen: dict[int, list[int]] = {}
    outputs = tiny.generate(
        MIXED, SamplingParams(max_tokens=9),
        on_token=lambda token: seen.setdefault(token.request_id, []).append(token.token_id),
    )  # fmt: skip
    assert [seen[output.request_id] for output in outputs] == ids(outputs)


def test_a_callback_that_raises_leaves_nothing_behind_and_spares_the_others(tiny: StreamingLLM) -> None:
    def explode(token: object) -> None:
        raise RuntimeError("from the callback")

    other = tiny.add_request("The cat", SamplingParams(max_tokens=20))
    output = tiny.output_of(other)
    with pytest.raises(RuntimeError, match="from the callback"):
        tiny.generate(MIXED, SamplingParams(max_tokens=20), on_token=explode)
    while tiny.has_unfinished:
        tiny.step()
    assert ids([output]) == ids(tiny.generate("The cat", SamplingParams(max_tokens=20)))
    assert_empty(tiny)


def test_a_hook_that_raises_reaches_the_loop_that_waits(tiny: StreamingLLM) -> None:
    def explode(tokens: object, logits: object) -> None:
        raise RuntimeError("from the hook")

    params = SamplingParams(max_tokens=20, logits_hook=explode)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="from the hook"):
        list(tiny.stream(PAPER, params))
    assert_empty(tiny)


def test_abort_in_the_middle(tiny: StreamingLLM) -> None:
    keep = tiny.add_request(PAPER, SamplingParams(max_tokens=6))
    drop = tiny.add_request("Once upon a time", SamplingParams(max_tokens=50, n=2, temperature=1.0))
    queued, output = tiny.output_of(drop), tiny.output_of(keep)
    tiny.step()
    tiny.abort(drop)
    tiny.abort(drop)  # a second time does nothing
    assert [sample.finish_reason for sample in queued.outputs] == ["abort", "abort"]
    while tiny.has_unfinished:
        tiny.step()
    assert output.outputs[0].text.startswith(" fathers brought forth")
    assert_empty(tiny)


def test_one_of_several_prompts_that_is_refused_leaves_none(tiny: StreamingLLM) -> None:
    for prompt in ("", [5] * 512):
        with pytest.raises(ValueError, match=r"empty|512 tokens"):
            tiny.stream([PAPER, prompt])
        assert_empty(tiny)
