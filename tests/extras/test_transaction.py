"""A step is all or nothing: whatever raises in it, the other requests get the tokens of a quiet run."""

from __future__ import annotations

import copy
import pickle
import random
import sys
import threading
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any
from unittest.mock import Mock, patch

import numpy as np
import pytest

import paged_ref
from paged_ref import LLM, SamplingParams
from paged_ref.core.engine.engine import Observer
from paged_ref.core.engine.outputs import RequestOutput
from paged_ref.extras.transaction import Turns
from paged_ref.timeline.events import RequestArrived

SOURCE = paged_ref.__path__[0]
REQUESTS = [
    ("Once upon a time there was", SamplingParams(max_tokens=14, ignore_eos=True)),
    ("Lily", SamplingParams(max_tokens=12, temperature=0.9, seed=3, n=2, ignore_eos=True)),
    ("Tom had a big", SamplingParams(max_tokens=10, temperature=0.7, seed=1)),
    ("The sun", SamplingParams(max_tokens=8, beam_width=3)),
]
PAGED: dict[str, Any] = {"manager": "paged", "block_size": 4, "kv_cache_tokens": 88}  # too few for all requests
SETUPS: dict[str, dict[str, Any]] = {
    "prefix cache": PAGED | {"prefix_cache": True},
    "swap": PAGED | {"preemption": "swap"},
    "recompute": PAGED | {"preemption": "recompute"},
    "standard": {"manager": "standard", "kv_cache_tokens": 96, "reserve": "exact", "max_model_len": 48},
    "swapping": {"manager": "swapping", "kv_cache_tokens": 80, "max_model_len": 48},
    "long": {"device_blocks": 4, "host_blocks": 16, "block_size": 4, "max_model_len": 48},
}


def requests_for(options: dict[str, Any]) -> list[int]:
    return [i for i, (_, params) in enumerate(REQUESTS) if options.get("manager") == "paged" or not params.beam_width]


@cache
def alone(i: int) -> list[list[int]]:
    """The tokens of a request that runs by itself."""
    prompt, params = REQUESTS[i]
    return tokens_of(LLM(backend="reference").generate([prompt], [params])[0])


def tokens_of(output: RequestOutput) -> list[list[int]]:
    return [sample.token_ids for sample in output.outputs]


def opened(options: dict[str, Any]) -> tuple[LLM, dict[int, RequestOutput]]:
    llm = LLM(backend="reference", **options)
    return llm, {i: llm.output_of(llm.add_request(*REQUESTS[i])) for i in requests_for(options)}


def run(llm: LLM) -> None:
    while llm.has_unfinished:
        llm.step()


def finish(llm: LLM, outputs: dict[int, RequestOutput]) -> None:
    """Step to the end: every request has the tokens of a run alone, nothing is held, and a new request works."""
    run(llm)
    for i, output in outputs.items():
        assert tokens_of(output) == alone(i)
    manager = llm.engine.manager
    manager.check_integrity()
    snapshot = manager.snapshot()
    assert snapshot.free + snapshot.cached == manager.num_slots
    assert tokens_of(llm.generate(*REQUESTS[0])[0]) == alone(0)


def interrupt(call: Callable[[], object], kind: type[BaseException], after: int) -> tuple[bool, int]:
    """Raise `kind` at the call number `after` into the package. Was it reached, and how many calls were there?"""
    count = 0

    def profile(frame: Any, event: str, argument: object) -> None:
        nonlocal count
        if event == "call" and frame.f_code.co_filename.startswith(SOURCE):
            if count == after:
                sys.setprofile(None)
                raise kind
            count += 1

    sys.setprofile(profile)
    try:
        call()
    except kind:
        return True, count
    finally:
        sys.setprofile(None)
    return False, count


@pytest.mark.parametrize("name", SETUPS)
@pytest.mark.parametrize("seed", [*range(16), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(16, 300))])
def test_an_interrupted_step_is_undone(name: str, seed: int) -> None:
    rng = random.Random(seed)
    kind = (KeyboardInterrupt, MemoryError)[seed % 2]
    llm, outputs = opened(SETUPS[name])
    for _ in range(rng.randrange(14)):
        llm.step()
    after = rng.randrange(400)
    while llm.has_unfinished:
        reached, count = interrupt(llm.step, kind, after)
        if reached:
            break
        after -= count
    finish(llm, outputs)


def test_a_transfer_that_fails_once() -> None:
    llm, outputs = opened(SETUPS["swap"])
    apply = llm.engine.kv.apply  # type: ignore[attr-defined]
    failed: list[int] = []

    def failing(transfers: Sequence[Any]) -> None:
        if transfers and not failed:
            failed.append(len(transfers))
            raise OSError("no more page-locked memory")
        apply(transfers)

    llm.engine.kv.apply = failing  # type: ignore[attr-defined]
    with pytest.raises(OSError, match="page-locked"):
        run(llm)
    assert failed
    finish(llm, outputs)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("name", SETUPS)
def test_a_forward_pass_that_fails_once(name: str, kind: type[BaseException]) -> None:
    llm, outputs = opened(SETUPS[name])
    llm.step()
    forward = llm.engine.model.forward

    def failing(*arguments: Any) -> None:
        llm.engine.model.forward = forward  # type: ignore[method-assign]
        raise kind

    llm.engine.model.forward = failing  # type: ignore[assignment, method-assign]
    with pytest.raises(kind):
        llm.step()
    finish(llm, outputs)


def test_a_hook_that_is_interrupted_aborts_its_own_call_alone() -> None:
    llm, outputs = opened(PAGED)

    def hook(tokens: Sequence[int], logits: np.ndarray) -> np.ndarray:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        llm.generate("Once", SamplingParams(logits_hook=hook))
    assert len(llm.engine.requests) == len(outputs)
    finish(llm, outputs)


@pytest.mark.parametrize("after", range(0, 60, 3))
def test_an_interrupted_add_request_leaves_nothing(after: int) -> None:
    llm = LLM(backend="reference", **PAGED)
    interrupt(lambda: llm.add_request("Tom", SamplingParams(max_tokens=2)), KeyboardInterrupt, after)
    for request_id in list(llm.engine.requests):
        llm.abort(request_id)
    assert tokens_of(llm.generate(*REQUESTS[0])[0]) == alone(0)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("name", SETUPS)
def test_a_generate_that_is_interrupted_at_any_call_leaves_nothing(name: str, kind: type[BaseException]) -> None:
    """At each of the calls before the first step, and at some of those in the steps."""
    llm, outputs = opened(SETUPS[name])
    params = SamplingParams(max_tokens=3, temperature=0.5, seed=1, n=2)
    with_steps = [*range(0, 110, 2), *range(110, 1500, 97)]
    for after in with_steps:
        interrupt(lambda: llm.generate(["Tom", "Lily"], params), kind, after)
        assert {request.output.request_id for request in llm.engine.requests.values()} <= {
            output.request_id for output in outputs.values()
        }, after
        if after < 110 and after % 20 == 0:
            assert not llm._loops
    finish(llm, outputs)


def test_a_thread_that_is_interrupted_while_it_waits_leaves_the_queue() -> None:
    turns, order, go = Turns(), [], threading.Event()

    def hold() -> None:
        with turns.taken("first"):
            order.append("first")
            go.wait(30)

    def wait(name: str) -> None:
        with turns.taken(name):
            order.append(name)

    first = threading.Thread(target=hold)
    first.start()
    while not order:
        pass
    ticket = Mock(wraps=threading.Lock())
    ticket.acquire.side_effect = [True, KeyboardInterrupt]
    with patch("paged_ref.extras.transaction.threading.Lock", return_value=ticket), pytest.raises(KeyboardInterrupt):
        wait("interrupted")
    last = threading.Thread(target=wait, args=("last",))
    last.start()
    go.set()
    last.join(30)
    first.join(30)
    assert order == ["first", "last"]


class Raising(Observer):
    """Raises once, in one of its methods."""

    def __init__(self, method: str, after: int) -> None:
        self.left = after
        setattr(self, method, self.count)

    def count(self, *arguments: object) -> None:
        self.left -= 1
        if self.left == 0:
            raise ValueError("the disk is full")


EVENTS = ("request_added", "before_step", "token_sampled", "sequence_finished", "after_step")


@pytest.mark.parametrize("after", [pytest.param(1, marks=pytest.mark.slow), 4])
@pytest.mark.parametrize("method", ["before_step", "token_sampled", "sequence_finished", "after_step"])
@pytest.mark.parametrize("name", SETUPS)
def test_an_observer_that_raises_ends_no_request(name: str, method: str, after: int) -> None:
    llm, outputs = opened(SETUPS[name])
    llm.engine.observers.append(Raising(method, after))
    with pytest.raises(ValueError, match="the disk is full"):
        run(llm)
    finish(llm, outputs)


@pytest.mark.parametrize("after", [3, 20, 45])
@pytest.mark.parametrize("name", SETUPS)
def test_a_log_that_raises_ends_no_request(name: str, after: int) -> None:
    left = [10**9]

    def log(event: object) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise OSError("no space left on device")

    llm, outputs = opened(SETUPS[name] | {"log": log})
    left[0] = after
    with pytest.raises(OSError, match="no space"):
        run(llm)
    finish(llm, outputs)


@pytest.mark.parametrize("what", ["generate", "stream", "add_request", "abort", "step"])
@pytest.mark.parametrize("where", ["hook", "log", "on_step", *EVENTS])
def test_calling_the_engine_from_inside_a_step_is_refused_by_name(where: str, what: str) -> None:
    inside = False

    def call(*arguments: Any) -> Any:
        if inside:
            {
                "generate": lambda: llm.generate("Lily"),
                "stream": lambda: llm.stream("Lily"),
                "add_request": lambda: llm.add_request("Lily"),
                "abort": lambda: llm.abort(0),
                "step": llm.step,
            }[what]()
        return arguments[-1]

    llm, outputs = opened(PAGED | ({where: call} if where in ("log", "on_step") else {}))
    if where in EVENTS:
        observer = Observer()
        setattr(observer, where, call)
        llm.engine.observers.append(observer)
    inside = True
    called = "add_request" if what in ("generate", "stream") else what
    with pytest.raises(RuntimeError, match=f"{called} was called from inside a hook, a log or an observer"):
        llm.generate("Once", SamplingParams(logits_hook=call if where == "hook" else None))
    inside = False
    finish(llm, outputs)


@pytest.mark.parametrize("where", ["request_added", "log"])
def test_a_log_or_observer_that_raises_when_a_request_is_added(where: str) -> None:
    """The new request is not there, and the others go on."""

    def log(event: object) -> None:
        if left and isinstance(event, RequestArrived):
            left.pop()
            raise ValueError("the disk is full")

    left: list[int] = []
    llm, outputs = opened(PAGED | ({"log": log} if where == "log" else {}))
    llm.step()
    before = list(llm.engine.requests)
    left.append(1)
    if where == "request_added":
        llm.engine.observers.append(Raising(where, 1))
    with pytest.raises(ValueError, match="the disk is full"):
        llm.add_request("Lily")
    assert list(llm.engine.requests) == before
    finish(llm, outputs)


def test_a_hook_cannot_change_the_tokens() -> None:
    def hook(tokens: Any, logits: np.ndarray) -> np.ndarray:
        tokens[0] = 5
        return logits

    with pytest.raises(TypeError, match="does not support item assignment"):
        LLM(backend="reference").generate("Once", SamplingParams(logits_hook=hook))


def test_threads_take_turns() -> None:
    llm = LLM(backend="reference", **PAGED)
    found: dict[int, list[list[int]]] = {}

    def work(thread: int) -> None:
        for _ in range(3):
            i = thread % len(REQUESTS)
            found[thread] = tokens_of(llm.generate([REQUESTS[i][0]], [REQUESTS[i][1]])[0])

    threads = [threading.Thread(target=work, args=(thread,)) for thread in range(6)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert found == {thread: alone(thread % len(REQUESTS)) for thread in range(6)}
    assert not llm.has_unfinished


@pytest.mark.parametrize("make", [copy.copy, copy.deepcopy, pickle.dumps])
def test_an_llm_is_not_copied(make: Callable[[object], object]) -> None:
    llm = LLM(backend="reference")
    for what in (llm, llm.engine):
        with pytest.raises(TypeError, match=r"make a new LLM"):
            make(what)


def test_an_engine_whose_way_back_was_interrupted_refuses_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    llm, _ = opened(PAGED)
    llm.step()

    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(llm.engine.model, "forward", interrupted)
    monkeypatch.setattr(llm.engine.manager, "clear", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.step()
    for call in (llm.step, lambda: llm.add_request("Lily"), lambda: llm.generate("Lily")):
        with pytest.raises(RuntimeError, match="interrupted while it undid a step; make a new LLM"):
            call()
