"""Runs requests step by step with everything on that watches, and keeps what the tests compare."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from paged_ref import LLM, RequestOutput, SamplingParams
from paged_ref.core.memory.manager import KVCacheManager
from paged_ref.core.memory.paged import PagedManager
from paged_ref.extras.prefix_cache import CachingBlockPool
from paged_ref.extras.swapping import SwappingManager
from paged_ref.timeline.events import Event
from paged_ref.timeline.logged import LoggedManager
from paged_ref.timeline.state import RunState
from support.manager_state import state_of

Logits = dict[tuple[int, ...], np.ndarray]  # by the tokens before
Prompt = str | list[int]


@dataclass
class Run:
    """What came of some requests."""

    outputs: list[RequestOutput]
    logits: list[Logits]  # of each request
    transfers: Counter[str] = field(default_factory=Counter)  # by kind, in rows

    @property
    def tokens(self) -> list[list[list[int]]]:
        """Of each request, of each sample."""
        return [[sample.token_ids for sample in output.outputs] for output in self.outputs]

    @property
    def num_preemptions(self) -> int:
        return sum(output.num_preemptions for output in self.outputs)


class Engine:
    """An LLM with sanitizer and event log, checked after every step."""

    def __init__(self, model: str | Path = "tiny", **options: Any) -> None:
        self.events: list[Event] = []
        self.transfers: Counter[str] = Counter()
        options = {"sanitize": True, "log": self.events.append, "on_step": self._count, **options}
        self.llm = LLM(model, **options)
        self.manager = self.llm.engine.manager
        self.bare = bare(self.manager)
        self._state = RunState()
        self._applied = 0

    def _count(self, record: Any) -> None:
        for transfer in record.transfers:
            self.transfers[transfer.kind] += transfer.count

    def add(self, prompt: Prompt, params: SamplingParams | None = None) -> RequestOutput:
        """Queue a request."""
        return self.llm.output_of(self.llm.add_request(prompt, params))

    def step(self) -> None:
        """One step, and then the books must balance and the events must tell the same as the manager."""
        self.llm.step()
        self.check()

    def check(self) -> None:
        self.manager.check_integrity()
        for event in self.events[self._applied :]:
            self._state.apply(event)
        self._applied = len(self.events)
        if self.events:
            assert self._state.memory == state_of(self.manager)

    def finish(self, each_step: Callable[[], None] | None = None) -> None:
        """Steps to the end; then nothing is held."""
        while self.llm.has_unfinished:
            self.step()
            if each_step is not None:
                each_step()
        assert_nothing_held(self.llm)

    def run(self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams]) -> Run:
        """All prompts in one batch, from the beginning to the end."""
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else params
        self.transfers.clear()
        logits: list[Logits] = [{} for _ in prompts]
        outputs = [
            self.add(prompt, replace(its, logits_hook=recorder(into)))
            for prompt, its, into in zip(prompts, each, logits, strict=True)
        ]
        self.finish()
        return Run(outputs, logits, self.transfers.copy())


def recorder(into: Logits) -> Callable[[Sequence[int], np.ndarray], np.ndarray]:
    """A logits hook that changes nothing and writes down what it saw."""

    def hook(tokens: Sequence[int], logits: np.ndarray) -> np.ndarray:
        into[tuple(tokens)] = logits
        return logits

    return hook


def bare(manager: KVCacheManager) -> KVCacheManager:
    """The manager without its log."""
    return manager.manager if isinstance(manager, LoggedManager) else manager


def assert_nothing_held(llm: LLM) -> None:
    """Every slot is free, or cached, and every slot on the host is free."""
    manager = llm.engine.manager
    manager.check_integrity()
    snapshot = manager.snapshot()
    assert snapshot.free + snapshot.cached == manager.num_slots
    state = state_of(manager)
    assert state.sequences == {}
    assert not any(state.host.ref_count)
    assert len(state.host.free) == len(state.host.ref_count)
    unlogged = bare(manager)
    if isinstance(unlogged, PagedManager):
        assert isinstance(unlogged.pool, CachingBlockPool) or snapshot.cached == 0
    if isinstance(unlogged, SwappingManager):
        assert sum(size for _, size in unlogged.host_pool.holes) == unlogged.host_pool.num_slots
    assert not llm.engine.scheduler.waiting
    assert not llm.engine.scheduler.running


def furthest(a: Logits, b: Logits) -> float:
    """The largest difference between logits that two runs saw after the same tokens."""
    assert a.keys() == b.keys()
    return max(float(np.abs(a[tokens] - b[tokens]).max()) for tokens in a)


def narrowest(logits: Logits) -> float:
    """The smallest lead of the winner over the next: what a difference must not reach."""
    lead = np.inf
    for row in logits.values():
        second, first = np.partition(row, -2)[-2:]
        lead = min(lead, float(first - second))
    return float(lead)
