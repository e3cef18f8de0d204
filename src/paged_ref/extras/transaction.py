"""A step is all or nothing: an engine that an exception in a step, a hook, an observer or a log leaves as it was.

Whatever raises, the step is undone: sequences have the tokens, the text and the random numbers that they had before it.
K and V are not put back, they are computed again: every sequence waits for its prompt to be recomputed, as after a
preemption. Only where the way back is itself interrupted is the engine given up, and then it refuses every call.

One thread at a time makes a step or adds a request; the others wait for their turn.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import copy, deepcopy
from typing import Any

from ..core.device import Array
from ..core.engine.engine import Engine
from ..core.engine.outputs import FinishReason, TokenOutput
from ..core.engine.request import Request, Sample
from ..core.engine.scheduler import StepPlan
from ..core.engine.sequence import Group, Sequence, Status


class Turns:
    """A lock that threads get in the order in which they asked, and that refuses a thread that has it already."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._owner: int | None = None
        self._queue: deque[threading.Lock] = deque()  # a locked ticket for each thread; the first one has the turn

    @contextmanager
    def taken(self, what: str) -> Iterator[None]:
        """Have the turn. Raises RuntimeError where this thread has it: `what` was called by a hook, a log or an
        observer. A thread that is interrupted while it waits leaves the queue."""
        if self._owner == threading.get_ident():
            raise RuntimeError(f"{what} was called from inside a hook, a log or an observer of the same engine")
        ticket = threading.Lock()
        ticket.acquire()
        try:
            with self._guard:
                self._queue.append(ticket)
                if self._queue[0] is ticket:
                    ticket.release()
            ticket.acquire()  # when the tickets before it have left the queue
            self._owner = threading.get_ident()
            yield
        finally:
            with self._guard:
                if self._queue and self._queue[0] is ticket:
                    self._owner = None
                    self._queue.popleft()
                    if self._queue:
                        self._queue[0].release()
                elif ticket in self._queue:
                    self._queue.remove(ticket)


class TransactionalEngine(Engine):
    """An Engine whose steps are undone when something raises in them."""

    def __init__(self, *parts: Any, **more: Any) -> None:
        super().__init__(*parts, **more)
        self._saved: list[SavedRequest] = []  # the requests of the step under way, before its tokens are drawn
        self._given_up = False

    def step(self) -> list[TokenOutput]:
        self.require_usable()
        groups = [*self.scheduler.running, *self.scheduler.waiting]
        running = []
        for group in self.scheduler.running:
            running.append((group, group.seqs.copy(), group.num_preemptions))
        next_seq_id = self.next_seq_id
        self._saved = []
        try:
            tokens = super().step()
        except BaseException:
            self._given_up = True
            for seq_id in range(next_seq_id, self.next_seq_id):
                self.request_of.pop(seq_id, None)
            for saved in self._saved:
                saved.restore(self)
            for group, seqs, num_preemptions in running:
                group.seqs, group.num_preemptions = seqs, num_preemptions
            self._wait_all(groups)
            self._given_up = False
            raise
        self._saved = []
        return tokens

    def _sample(self, plan: StepPlan, logits: Array) -> list[TokenOutput]:
        requests: dict[int, Request] = {}
        for seq, _ in plan.chunks:
            request = self.request_of[seq.seq_id]
            requests[request.output.request_id] = request
        self._saved = list(map(SavedRequest, requests.values()))
        return super()._sample(plan, logits)

    def add(self, request: Request) -> None:
        self.require_usable()
        try:
            super().add(request)
        except BaseException:
            self._forget(request)
            raise

    def end_request(self, request: Request, reason: str) -> None:
        try:
            super().end_request(request, reason)
        except BaseException:
            self._given_up = True
            others = [
                group for group in [*self.scheduler.running, *self.scheduler.waiting] if group not in request.groups
            ]
            self._forget(request)
            self._wait_all(others)
            self._given_up = False
            raise

    def _forget(self, request: Request) -> None:
        """Take out all that names the request, but for the memory of its sequences."""
        self.requests.pop(request.output.request_id, None)
        for seq_id in [seq_id for seq_id, owner in self.request_of.items() if owner is request]:
            del self.request_of[seq_id]
        for groups in (self.scheduler.running, self.scheduler.waiting):
            for group in request.groups:
                if group in groups:
                    groups.remove(group)

    def _wait_all(self, groups: Iterable[Group]) -> None:
        """Every group waits, in this order, and none holds memory."""
        self.manager.clear()
        self.scheduler.running = []
        self.scheduler.waiting = deque(groups)
        for group in self.scheduler.waiting:
            group.status = Status.WAITING
            for seq in group.seqs:
                seq.admitted, seq.num_computed = False, 0

    def require_usable(self) -> None:
        """Raise RuntimeError where undoing a step was itself interrupted."""
        if self._given_up:
            raise RuntimeError("the engine was interrupted while it undid a step; make a new LLM")

    def __deepcopy__(self, memo: object) -> None:
        raise TypeError("an engine cannot be copied: its requests belong to one KV cache; make a new LLM")

    def __reduce__(self) -> Any:
        raise TypeError("an engine cannot be pickled; make a new LLM from the same arguments")


class SavedRequest:
    """What drawing tokens changes of a request, as it is now."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.fields: dict[str, Any] = {}
        for name in CHANGED:
            if name in request.__dict__:
                value = request.__dict__[name]
                self.fields[name] = deepcopy(value) if name == "search" else copy(value)
        output = request.output
        self.output = (output.outputs.copy(), output.first_token, output.finished, output.num_preemptions, output.error)
        self.groups: list[tuple[Group, list[Sequence], Status]] = []
        self.tokens: list[tuple[Sequence, int]] = []
        for group in request.groups:
            self.groups.append((group, group.seqs.copy(), group.status))
            for seq in group.seqs:
                self.tokens.append((seq, len(seq.tokens)))
        draws = request.params.temperature != 0
        self.samples: list[tuple[Sample, str, dict[str, Any], Any, tuple[str, FinishReason | None, int]]] = []
        for sample in request.samples.values():
            rng_state = sample.rng.bit_generator.state if draws else None
            made = sample.output.text, sample.output.finish_reason, len(sample.output.token_ids)
            stream = vars(sample.text).copy()  # the stream changes no list in place
            self.samples.append((sample, sample.held_back, stream, rng_state, made))
        for sample in request.to_fork:
            self.tokens.append((sample.seq, len(sample.seq.tokens)))

    def restore(self, engine: Engine) -> None:
        """Make the request what it was, and let the engine know it again."""
        request = self.request
        request.__dict__.update(self.fields)
        output = request.output
        output.outputs, output.first_token, output.finished, output.num_preemptions, output.error = self.output
        for group, seqs, status in self.groups:
            group.seqs, group.status = seqs, status
        for seq, length in self.tokens:
            del seq.tokens[length:]
            engine.request_of[seq.seq_id] = request
        for sample, held_back, stream, rng_state, (text, finish_reason, num_ids) in self.samples:
            sample.held_back = held_back
            vars(sample.text).update(stream)
            if rng_state is not None:
                sample.rng.bit_generator.state = rng_state
            del sample.output.token_ids[num_ids:]
            sample.output.text, sample.output.finish_reason = text, finish_reason
        engine.requests[request.output.request_id] = request


CHANGED = ("samples", "to_fork", "search", "_logits")  # what sampling changes of a request and of a search
