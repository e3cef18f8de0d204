"""When something goes wrong for one request, the others write what they write alone, and nothing leaks."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from support.driving import Engine, assert_nothing_held

from paged_ref import LLM, RequestOutput, SamplingParams
from paged_ref.core.engine.sequence import Status
from paged_ref.core.memory.paged import PagedManager

PAPER = "Four score and seven years ago our"
PROMPTS = [PAPER, "Once upon a time", "The cat", "Tom saw a big dog in the park and"]
MANAGERS = ["paged", "standard", "swapping"]


@cache
def alone(prompt: str, params: SamplingParams = SamplingParams(max_tokens=20)) -> list[list[int]]:  # noqa: B008
    """What a request writes with the engine to itself."""
    (output,) = LLM("tiny").generate(prompt, params)
    return tokens_of(output)


def tokens_of(output: RequestOutput) -> list[list[int]]:
    return [sample.token_ids for sample in output.outputs]


def greedy(max_tokens: int = 20, **options: Any) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, **options)


def status_of(engine: Engine, request: RequestOutput) -> Status:
    return engine.llm.engine.requests[request.request_id].groups[0].status


class FromTheHookError(Exception):
    """What the tests' hooks and callbacks raise."""


def failing_hook(after: int = 0) -> Any:
    """A logits hook that raises on its call number `after`, counted from 0."""
    calls = iter(range(10**6))

    def hook(tokens: Sequence[int], logits: np.ndarray) -> np.ndarray:
        if next(calls) >= after:
            raise FromTheHookError("from the hook")
        return logits

    return hook


# --- no room -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_the_device_pool_runs_out_when_several_groups_grow_in_one_step(preemption: str) -> None:
    """All four need a new block in one step, and two are left: the last makes room, for the third."""
    prompts = [[5 + i] * 8 for i in range(4)]
    engine = Engine(block_size=4, kv_cache_tokens=4 * 10, preemption=preemption, watermark=0)
    outputs = [engine.add(prompt, greedy(5, ignore_eos=True)) for prompt in prompts]
    engine.step()
    assert isinstance(engine.bare, PagedManager)
    assert engine.bare.pool.num_free == 2
    assert [status_of(engine, output) for output in outputs] == [Status.RUNNING] * 4
    engine.step()
    assert [status_of(engine, output) is Status.RUNNING for output in outputs] == [True, True, True, False]
    engine.finish()
    assert [output.num_preemptions > 0 for output in outputs] == [False, False, False, True]
    assert (engine.transfers["swap_out"] > 0) == (preemption == "swap")
    for prompt, output in zip(prompts, outputs, strict=True):
        (wanted,) = LLM("tiny").generate(prompt, greedy(5, ignore_eos=True))
        assert tokens_of(output) == tokens_of(wanted)


def test_a_group_of_samples_runs_out_of_room_as_a_whole() -> None:
    """The samples' copies on write do not fit; not one of them moves on, and later all do."""
    params = SamplingParams(max_tokens=12, n=4, temperature=1.0, seed=5, ignore_eos=True)
    engine = Engine(block_size=4, kv_cache_tokens=76, preemption="swap", watermark=0)
    first = engine.add("The cat", greedy(40, ignore_eos=True))
    second = engine.add(PAPER, params)
    engine.finish()
    assert second.num_preemptions > 0
    assert tokens_of(first) == alone("The cat", greedy(40, ignore_eos=True))
    assert tokens_of(second) == alone(PAPER, params)


@pytest.mark.parametrize("host_kv_tokens", [0, 4, 16])
@pytest.mark.parametrize("manager", ["paged", "swapping"])
def test_a_full_host_pool_means_recompute(manager: str, host_kv_tokens: int) -> None:
    engine = Engine(manager=manager, block_size=4, kv_cache_tokens=48, host_kv_tokens=host_kv_tokens, preemption="swap")
    outputs = [engine.add(prompt, greedy()) for prompt in PROMPTS]
    engine.finish()
    assert sum(output.num_preemptions for output in outputs) > 0
    assert engine.transfers["swap_out"] <= host_kv_tokens * sum(output.num_preemptions for output in outputs)
    if host_kv_tokens == 0:
        assert engine.transfers["swap_out"] == 0
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        assert tokens_of(output) == alone(prompt)


def test_some_swap_and_some_recompute_when_the_host_pool_is_small() -> None:
    engine = Engine(block_size=2, kv_cache_tokens=40, host_kv_tokens=12, preemption="swap")
    outputs = [engine.add(prompt, greedy()) for prompt in PROMPTS]
    engine.finish()
    assert 0 < engine.transfers["swap_out"] == engine.transfers["swap_in"]
    gone = [event for event in engine.events if type(event).__name__ == "SwappedOut"]
    assert 0 < len(gone) < sum(output.num_preemptions for output in outputs)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        assert tokens_of(output) == alone(prompt)


@pytest.mark.parametrize("manager", MANAGERS)
@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_whoever_is_left_alone_can_always_go_on(manager: str, preemption: str) -> None:
    """Every request may grow until it fills the pool, wherever it lies and however high the watermark."""
    if (manager, preemption) == ("standard", "swap"):
        pytest.skip("the standard manager cannot swap")
    options = {"reserve": "exact"} if manager == "standard" else {"watermark": 0.4}
    engine = Engine(
        manager=manager, block_size=4, kv_cache_tokens=96, host_kv_tokens=24, preemption=preemption, **options
    )
    prompts = [[5 + i] * length for i, length in enumerate((40, 40, 20, 60, 3))]
    for prompt in prompts:
        engine.add(prompt, greedy(97 - len(prompt), ignore_eos=True))
    engine.finish()


# --- aborted -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("manager", ["paged", "swapping"])
def test_abort_while_swapped(manager: str) -> None:
    engine = Engine(manager=manager, block_size=4, kv_cache_tokens=48, preemption="swap", host_kv_tokens=48)
    outputs = [engine.add(prompt, greedy()) for prompt in PROMPTS]
    aborted: list[RequestOutput] = []
    while engine.llm.has_unfinished:
        engine.step()
        for output in outputs[1:]:
            unfinished = output.request_id in engine.llm.engine.requests
            if unfinished and not aborted and status_of(engine, output) is Status.SWAPPED:
                aborted.append(output)
                engine.llm.abort(output.request_id)
                engine.check()
    assert_nothing_held(engine.llm)
    assert len(aborted) == 1
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        (wanted,) = alone(prompt)
        (sample,) = output.outputs
        if output in aborted:
            assert sample.finish_reason == "abort"
            assert sample.token_ids == wanted[: len(sample.token_ids)]
        else:
            assert sample.token_ids == wanted


@pytest.mark.parametrize("manager", MANAGERS)
def test_abort_while_waiting(manager: str) -> None:
    engine = Engine(manager=manager, kv_cache_tokens=2048, max_batch_seqs=2)
    outputs = [engine.add(prompt, greedy()) for prompt in PROMPTS]
    engine.step()
    assert [status_of(engine, output) for output in outputs] == [Status.RUNNING] * 2 + [Status.WAITING] * 2
    engine.llm.abort(outputs[2].request_id)
    engine.finish()
    assert outputs[2].outputs[0].finish_reason == "abort"
    assert outputs[2].outputs[0].token_ids == []
    for i in (0, 1, 3):
        assert tokens_of(outputs[i]) == alone(PROMPTS[i])


@pytest.mark.parametrize("steps", [0, 1, 2])
@pytest.mark.parametrize("params", [greedy(n=4), greedy(beam_width=4)], ids=["n", "beams"])
@pytest.mark.parametrize("manager", MANAGERS)
def test_abort_before_the_siblings_began(manager: str, params: SamplingParams, steps: int) -> None:
    if params.beam_width and manager != "paged":
        pytest.skip("only the paged manager can share")
    engine = Engine(manager=manager, block_size=4, kv_cache_tokens=2048, max_batch_tokens=4)
    drop = engine.add(PROMPTS[3], params)  # 9 tokens: three steps of 4 until the siblings can begin
    keep = engine.add(PAPER, greedy())
    for _ in range(steps):
        engine.step()
    engine.llm.abort(drop.request_id)
    engine.check()
    assert [sample.finish_reason for sample in drop.outputs] == ["abort"] * len(drop.outputs)
    engine.finish()
    assert tokens_of(keep) == alone(PAPER)


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_abort_a_group_that_was_preempted_after_it_forked(preemption: str) -> None:
    for params in (greedy(16, n=3, temperature=1.0, seed=1, ignore_eos=True), greedy(16, beam_width=3)):
        engine = Engine(block_size=4, kv_cache_tokens=64, preemption=preemption)
        keep = engine.add("The cat", greedy(60, ignore_eos=True))
        for _ in range(24):
            engine.step()
        drop = engine.add(PAPER, params)
        engine.step()
        while status_of(engine, drop) is Status.RUNNING:
            engine.step()
        assert status_of(engine, drop) is (Status.SWAPPED if preemption == "swap" else Status.WAITING)
        engine.llm.abort(drop.request_id)
        engine.check()
        engine.finish()
        assert tokens_of(keep) == alone("The cat", greedy(60, ignore_eos=True))


def test_abort_of_what_is_unknown_or_finished_does_nothing() -> None:
    engine = Engine()
    output = engine.add(PAPER, greedy(2))
    engine.finish()
    engine.llm.abort(output.request_id)
    engine.llm.abort(77)
    assert output.outputs[0].finish_reason == "length"


# --- exceptions of the caller --------------------------------------------------------------------------


@pytest.mark.parametrize("at", [1, 2, 9, 30])
@pytest.mark.parametrize("params", [greedy(), greedy(n=3, temperature=1.0, seed=1)], ids=["one", "n"])
@pytest.mark.parametrize("manager", MANAGERS)
def test_a_callback_raises(manager: str, params: SamplingParams, at: int) -> None:
    engine = Engine(manager=manager, kv_cache_tokens=2048)
    other = engine.add("The cat", greedy())
    calls = []

    def on_token(token: object) -> None:
        calls.append(token)
        if len(calls) == at:
            raise FromTheHookError("from the callback")

    with pytest.raises(FromTheHookError, match="from the callback"):
        engine.llm.generate(PROMPTS, params, on_token=on_token)
    assert len(calls) == at
    engine.check()
    assert set(engine.llm.engine.requests) == {other.request_id}
    engine.finish()
    assert tokens_of(other) == alone("The cat")


def test_the_consumer_of_a_stream_raises() -> None:
    engine = Engine()
    other = engine.add("The cat", greedy())

    def consume() -> None:
        for number, _ in enumerate(engine.llm.stream(PROMPTS, greedy())):
            if number == 5:
                raise FromTheHookError("from the loop")

    with pytest.raises(FromTheHookError) as caught:
        consume()
    del caught  # its traceback holds the loop
    gc.collect()
    assert set(engine.llm.engine.requests) == {other.request_id}
    engine.finish()
    assert tokens_of(other) == alone("The cat")


def test_a_stream_that_nobody_reads_is_dropped() -> None:
    llm = LLM("tiny")
    tokens = llm.stream(PAPER, greedy())
    assert llm.has_unfinished
    del tokens
    gc.collect()
    assert not llm.has_unfinished
    assert_nothing_held(llm)


def test_two_streams_read_in_turn_get_all_their_tokens() -> None:
    llm = LLM("tiny", sanitize=True)
    streams = {prompt: llm.stream(prompt, greedy()) for prompt in PROMPTS[:3]}
    got: dict[str, list[int]] = {prompt: [] for prompt in streams}
    for _ in range(20):
        for prompt, tokens in streams.items():
            got[prompt].append(next(tokens).token_id)
    assert got == {prompt: alone(prompt)[0] for prompt in streams}


def test_generate_inside_a_callback_disturbs_nothing() -> None:
    llm = LLM("tiny", sanitize=True)
    inner: list[list[list[int]]] = []

    def on_token(token: Any) -> None:
        if len(inner) < 3:
            inner.append([])  # or the tokens of this very call would begin another
            inner[-1] = tokens_of(llm.generate("The cat", greedy())[0])

    outputs = llm.generate(PROMPTS[:2], greedy(), on_token=on_token)
    assert [tokens_of(output) for output in outputs] == [alone(prompt) for prompt in PROMPTS[:2]]
    assert inner == [alone("The cat")] * 3
    assert_nothing_held(llm)


@pytest.mark.parametrize(
    "params",
    [
        greedy(logits_hook=failing_hook()),
        greedy(logits_hook=failing_hook(after=3)),
        greedy(n=4, logits_hook=failing_hook(after=2)),  # while the siblings begin
        greedy(n=4, logits_hook=failing_hook(after=5)),  # in the second of them, later
        greedy(beam_width=4, logits_hook=failing_hook()),
        greedy(beam_width=4, logits_hook=failing_hook(after=7)),
    ],
    ids=["first token", "later", "n, first token", "n, later", "beams, first token", "beams, later"],
)
def test_a_logits_hook_raises(params: SamplingParams) -> None:
    hook = params.logits_hook
    assert hook is not None
    engine = Engine(block_size=4)
    outputs = [engine.add(prompt, greedy()) for prompt in PROMPTS[:2]]
    failing = engine.add(PROMPTS[3], params)
    outputs.append(engine.add(PROMPTS[2], greedy()))
    engine.finish()
    assert isinstance(failing.error, FromTheHookError)
    assert {sample.finish_reason for sample in failing.outputs} <= {"error"}
    for prompt, output in zip(PROMPTS[:3], outputs, strict=True):
        assert tokens_of(output) == alone(prompt)


@pytest.mark.parametrize("after", [0, 2, 6])
@pytest.mark.parametrize("options", [{}, {"n": 4}, {"beam_width": 4}], ids=str)
@pytest.mark.parametrize("manager", MANAGERS)
def test_generate_raises_what_a_hook_raised(manager: str, options: dict[str, Any], after: int) -> None:
    if "beam_width" in options and manager != "paged":
        pytest.skip("only the paged manager can share")
    engine = Engine(manager=manager, block_size=4, kv_cache_tokens=2048)
    other = engine.add("The cat", greedy())
    with pytest.raises(FromTheHookError, match="from the hook"):
        engine.llm.generate([PAPER, PAPER], [greedy(), greedy(logits_hook=failing_hook(after), **options)])
    engine.check()
    assert set(engine.llm.engine.requests) == {other.request_id}
    engine.finish()
    assert tokens_of(other) == alone("The cat")


def test_another_loops_step_can_bring_the_error() -> None:
    """The error of a request goes to the thread that waits for the request, not to the one that made the step."""
    llm = LLM("tiny", sanitize=True)
    bad = llm.stream(PAPER, greedy(logits_hook=failing_hook(after=2)))
    good = llm.stream("The cat", greedy())
    assert [token.token_id for token in good] == alone("The cat")[0]
    seen: list[int] = []
    with pytest.raises(FromTheHookError):
        seen.extend(token.token_id for token in bad)
    assert_nothing_held(llm)


def test_a_sample_that_fails_takes_its_siblings_along_and_the_finished_ones_stay() -> None:
    """n = 2: the first sample ends with its first token, the second fails with its third."""
    llm = LLM("tiny", sanitize=True, block_size=4)
    full_stop = llm.tokenizer.encode(".")[0]
    calls = iter(range(100))

    def hook(tokens: Sequence[int], logits: np.ndarray) -> np.ndarray:
        call = next(calls)
        if call == 0:
            logits[full_stop] = 1000.0
        if call == 3:
            raise FromTheHookError("from the hook")
        return logits

    output = llm.output_of(llm.add_request(PAPER, greedy(n=2, stop_token_ids=[full_stop], logits_hook=hook)))
    while llm.has_unfinished:
        llm.step()
    assert [sample.finish_reason for sample in output.outputs] == ["stop", "error"]
    assert [len(sample.token_ids) for sample in output.outputs] == [1, 2]
    assert_nothing_held(llm)


@pytest.mark.parametrize("wrong", [lambda _: None, lambda logits: logits[:-1], lambda logits: logits[None]])
@pytest.mark.parametrize("options", [{}, {"n": 3}, {"beam_width": 2}], ids=str)
def test_a_hook_that_returns_the_wrong_shape_is_told_so(options: dict[str, Any], wrong: Any) -> None:
    llm = LLM("tiny", sanitize=True)
    params = greedy(logits_hook=lambda _, logits: wrong(logits), **options)
    with pytest.raises(ValueError, match=r"logits_hook returned shape \[.*\]; \[\d+\] is needed"):
        llm.generate(PAPER, params)
    assert_nothing_held(llm)


@pytest.mark.parametrize(
    "wrong", [lambda logits: logits * 1j, lambda logits: [None] * len(logits), lambda logits: logits > 0]
)
def test_a_hook_that_returns_no_real_numbers_is_told_so(wrong: Any) -> None:
    llm = LLM("tiny", backend="reference")
    with pytest.raises(ValueError, match=r"logits_hook returned (complex64|object|bool); real numbers are needed"):
        llm.generate(PAPER, greedy(logits_hook=lambda _, logits: wrong(logits)))
    assert_nothing_held(llm)


@pytest.mark.parametrize("manager", MANAGERS)
def test_an_observer_that_raises_ends_the_call_but_no_other_request(manager: str) -> None:
    armed = False

    def on_step(record: object) -> None:
        if armed:
            raise FromTheHookError("from on_step")

    engine = Engine(manager=manager, kv_cache_tokens=1024, on_step=on_step)
    other = engine.add("The cat", greedy())
    engine.step()
    armed = True
    with pytest.raises(FromTheHookError, match="from on_step"):
        engine.llm.generate(PROMPTS, greedy())
    armed = False
    engine.finish()
    assert tokens_of(other) == alone("The cat")


# --- refused on arrival --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "prompt_len", "params", "numbers"),
    [
        ({"block_size": 4}, 30, greedy(20), "length 30 and an output of length 20 can need 52 slots .* has 48"),
        ({"block_size": 1}, 30, greedy(20), "length 30 and an output of length 20 can need 49 slots .* has 48"),
        ({"block_size": 4}, 10, greedy(20, n=2), "length 10 .* length 20, 2 times, can need 56 slots .* 48"),
        ({"block_size": 4}, 10, greedy(20, beam_width=3), "length 20, 3 times, can need 80 slots .* 48"),
        ({"manager": "swapping"}, 30, greedy(20), "length 30 and an output of length 20 can need 49 slots .* 48"),
        (
            {"manager": "standard", "reserve": "exact"}, 30, greedy(20),
            "length 30 and an output of length 20 can need 49 slots .* has 48",
        ),
        (
            {"manager": "standard", "reserve": "pow2"}, 30, greedy(18),
            "length 30 and an output of length 18 can need 62 slots .* has 48",
        ),
    ],
    ids=["paged", "blocks of 1", "n", "beams", "swapping", "exact", "pow2"],
)  # fmt: skip
def test_what_can_never_fit_is_refused_with_the_numbers(
    options: dict[str, Any], prompt_len: int, params: SamplingParams, numbers: str
) -> None:
    engine = Engine(kv_cache_tokens=48, max_model_len=512, **options)
    keep = engine.add("The cat", greedy())
    num_events = len(engine.events)
    with pytest.raises(ValueError, match=numbers):
        engine.add([5] * prompt_len, params)
    assert len(engine.events) == num_events
    engine.finish()
    assert tokens_of(keep) == alone("The cat")


@pytest.mark.parametrize(
    ("options", "params"),
    [
        ({"block_size": 4}, greedy(19, ignore_eos=True)),
        ({"block_size": 4}, greedy(3, n=3, ignore_eos=True)),
        ({"block_size": 1}, greedy(7, n=3, temperature=1.0, seed=3, ignore_eos=True)),
        ({"block_size": 1}, greedy(7, beam_width=3, ignore_eos=True)),
        ({"manager": "swapping"}, greedy(19, n=3, ignore_eos=True)),
        ({"manager": "standard", "reserve": "exact"}, greedy(19, n=3, ignore_eos=True)),
    ],
    ids=["paged", "n", "blocks of 1, n", "beams", "swapping", "standard"],
)
def test_what_just_fits_is_not_refused(options: dict[str, Any], params: SamplingParams) -> None:
    engine = Engine(kv_cache_tokens=48, max_model_len=512, watermark=0.5, **options)
    output = engine.add([5] * 30, params)
    engine.finish()
    assert [len(sample.token_ids) for sample in output.outputs] == [params.max_tokens] * len(output.outputs)
    with pytest.raises(ValueError, match="can need"):
        engine.add([5] * 30, replace(params, max_tokens=(params.max_tokens or 0) + 1))


@pytest.mark.parametrize("options", [{"n": 5}, {"beam_width": 5}], ids=str)
def test_more_sequences_than_may_run_at_once_are_refused(options: dict[str, Any]) -> None:
    llm = LLM("tiny", max_batch_seqs=4)
    with pytest.raises(ValueError, match="a request of 5 sequences; at most max_batch_seqs = 4 can run"):
        llm.add_request(PAPER, greedy(**options))
    assert not llm.has_unfinished


@pytest.mark.parametrize("manager", ["standard", "swapping"])
def test_beams_are_refused_by_managers_that_cannot_share(manager: Any) -> None:
    llm = LLM("tiny", manager=manager)
    with pytest.raises(ValueError, match="beam_width is set; beams share blocks, and only the paged manager can"):
        llm.add_request(PAPER, greedy(beam_width=2))
    assert not llm.has_unfinished


# --- watching changes nothing --------------------------------------------------------------------------


@pytest.mark.parametrize("manager", MANAGERS)
@pytest.mark.parametrize("watch", [["log"], ["sanitize"], ["on_step"], ["log", "sanitize", "on_step"]], ids=" ".join)
def test_watching_changes_no_token(manager: Any, watch: list[str]) -> None:
    options: dict[str, Any] = {"manager": manager, "block_size": 4, "kv_cache_tokens": 64}
    if manager == "standard":
        options["reserve"] = "exact"
    params = [greedy(), greedy(n=2, temperature=0.8, seed=4), greedy()]
    plain = LLM("tiny", **options).generate(PROMPTS[:3], params)
    watchers: dict[str, Any] = {name: True if name == "sanitize" else [].append for name in watch}
    llm = LLM("tiny", **options, **watchers)
    watched = llm.generate(PROMPTS[:3], params)
    assert [tokens_of(output) for output in watched] == [tokens_of(output) for output in plain]
    assert [output.num_preemptions for output in watched] == [output.num_preemptions for output in plain]
    assert sum(output.num_preemptions for output in plain) > 0 or manager == "standard"
    llm.engine.observers.clear()
    without = llm.generate(PROMPTS[:3], params)
    assert [tokens_of(output) for output in without] == [tokens_of(output) for output in plain]


@pytest.mark.parametrize("manager", MANAGERS)
def test_observers_that_are_deleted_between_two_steps_change_no_token(manager: Any) -> None:
    options: dict[str, Any] = {"prefix_cache": True, "preemption": "swap"} if manager == "paged" else {}
    if manager == "standard":
        options["reserve"] = "exact"
    params = [greedy(), greedy(n=2, temperature=0.8, seed=4), greedy()]
    if manager == "paged":
        params[2] = greedy(beam_width=3)
    engine = Engine(manager=manager, block_size=4, kv_cache_tokens=96, **options)
    plain = LLM("tiny", manager=manager, block_size=4, kv_cache_tokens=96, **options).generate(PROMPTS[:3], params)
    outputs = [engine.add(prompt, its) for prompt, its in zip(PROMPTS, params, strict=False)]
    for _ in range(5):
        engine.step()
    assert len(engine.llm.engine.observers) == 2
    engine.llm.engine.observers.clear()
    while engine.llm.has_unfinished:
        engine.llm.step()
    assert [tokens_of(output) for output in outputs] == [tokens_of(output) for output in plain]
    assert_nothing_held(engine.llm)
