"""A trace through the real scheduler and the real manager, without a model, on a simulated clock.

Every decision (who runs, who waits, which block, who is preempted) is made by the code that serves real
requests; only the forward pass is replaced by the time that the roofline gives it. What a run counts is
therefore what an engine counts on the same requests, and a test holds it to that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from ..core.engine.scheduler import StepPlan
from ..core.engine.sequence import Group, Sequence, Status
from ..core.memory.manager import KnowsRoom, MemoryUsage
from .clock import Clock
from .metrics import Outcome, Tally
from .quiet import skip_quiet_steps
from .roofline import chunk_pairs
from .setup import Setup
from .traces import Trace, TraceRequest

LOOK_EVERY = 64  # steps between two looks at where the memory is


@dataclass(eq=False, slots=True)
class Job:
    """One request on its way."""

    request: TraceRequest
    group: Group
    seq: Sequence
    filler: int  # the token id that stands for each token it generates
    begun: bool = False  # a first token of it was computed
    first_token: float | None = None  # when its first token came out
    furthest: int = 0  # tokens that were computed before a preemption took them


class Simulation:
    """One run of a trace. `run` takes it to its end."""

    def __init__(
        self,
        setup: Setup,
        trace: Trace,
        *,
        skip: bool = True,
        look_every: int = LOOK_EVERY,
        on_step: Callable[[StepPlan], None] | None = None,
        on_look: Callable[[MemoryUsage], None] | None = None,
        on_progress: Callable[[int], None] | None = None,
    ) -> None:
        """`skip` takes quiet steps together (quiet.py), which changes nothing that is counted. `on_step` gets the
        plan of each step when it is computed and before sequences end, and needs every step: no skipping.
        `on_look` gets the memory's usage just before, every `look_every` steps; `on_progress` the number of
        requests done. Raises ValueError where the setup cannot be."""
        self.setup = setup
        self.requests, self._hash_block = trace.requests, trace.hash_block
        self.manager = setup.make_manager()
        self.scheduler = setup.make_scheduler(self.manager)
        self.clock = Clock(setup.gpu, setup.model, setup.constants)
        self.tally = Tally()
        self.now = 0.0  # seconds since the trace began
        self.num_arrived = 0
        self.jobs: dict[int, Job] = {}  # by seq_id, unfinished
        self._final: dict[int, int] = {}  # seq_id -> the most slots that it will hold
        self._longest = setup.longest
        self._row_tokens = setup.block_size if self.manager.paged else 1
        can_skip = skip and on_step is None and isinstance(self.manager, KnowsRoom)
        self._skips = cast(KnowsRoom, self.manager) if can_skip else None
        self.look_every, self._on_look = look_every, on_look
        self._on_step, self._on_progress = on_step, on_progress

    def run(self) -> Outcome:
        """Serve all requests."""
        scheduler = self.scheduler
        while True:
            if not (scheduler.running or scheduler.waiting):
                if self.num_arrived == len(self.requests):
                    return self.tally.outcome(self.setup.label, self.now)
                self.now = max(self.now, self.requests[self.num_arrived].arrival)  # idle until then
            self.arrive()
            if (scheduler.running or scheduler.waiting) and self._step() and self._skips is not None:
                skip_quiet_steps(self, self._skips)

    # --- requests in and out -----------------------------------------------------------------------

    def arrive(self) -> None:
        """Queue who has come by now. Who can never fit is refused, as LLM.add_request does, and counted."""
        while self.num_arrived < len(self.requests) and self.requests[self.num_arrived].arrival <= self.now:
            seq_id, request = self.num_arrived, self.requests[self.num_arrived]
            self.num_arrived += 1
            try:
                job = self._job(seq_id, request)
                self.scheduler.add(job.group)
            except ValueError as error:
                self.tally.refuse(str(error))
                continue
            self.jobs[seq_id] = job
            self._final[seq_id] = job.seq.max_slots
            self.tally.cut += job.seq.max_tokens < request.prompt_len + request.output_len

    def _job(self, seq_id: int, request: TraceRequest) -> Job:
        prompt, context = request.prompt_len, self._longest
        if prompt >= context:
            raise ValueError(f"the prompt has {prompt} tokens; the context of {context} has no room for more")
        filler, tokens = 0, cast("list[int]", bytearray(prompt))  # of zeros: without a prefix cache, lengths are all
        if self.setup.prefix_cache:  # equal blocks get equal ids; the rest, and what is generated, is like nothing else
            filler = -1 - seq_id
            tokens = [each for hash_id in request.hash_ids for each in [hash_id] * self._hash_block][:prompt]
            tokens += [filler] * (prompt - len(tokens))
        seq = Sequence(seq_id, tokens, prompt, min(prompt + request.output_len, context))
        return Job(request, Group([seq]), seq, filler)

    def finish(self, seq_id: int) -> None:
        job = self.jobs.pop(seq_id)
        del self._final[seq_id]
        self.scheduler.finish(job.group, job.seq)
        first = self.now if job.first_token is None else job.first_token
        self.tally.finish(job.request.arrival, first, self.now, job.seq.max_tokens - job.seq.prompt_len)
        if self._on_progress:
            self._on_progress(self.tally.num_done)

    # --- one step, as EngineCore.step makes it -----------------------------------------------------

    def _step(self) -> bool:
        """True if quiet steps may follow: all that run decode, and whoever waits cannot be admitted as it is."""
        scheduler, tally = self.scheduler, self.tally
        plan = scheduler.schedule()
        for group in plan.preempted:
            job = self.jobs[group.leader.seq_id]
            if group.status is Status.WAITING and job.first_token is not None:  # it decoded, and loses all
                job.furthest = len(job.seq.tokens) - 1
        num_tokens = kv = pairs = 0
        ready: list[Sequence] = []  # have caught up, so that their last token says what comes next
        for seq, count in plan.chunks:
            begin = seq.num_computed
            length = seq.num_computed = begin + count
            num_tokens += count
            kv += length
            pairs += length if count == 1 else chunk_pairs(length, count)
            caught_up = length == len(seq.tokens)
            if caught_up:
                ready.append(seq)
            if count > 1 or length <= seq.prompt_len or not caught_up:
                self._prefilled(self.jobs[seq.seq_id], begin, length)
            if self.setup.prefix_cache:
                self.manager.commit(seq.seq_id, seq.tokens, length)
        seconds, moved, swapped = self.clock.transfers(plan.transfers, self._row_tokens)
        seconds += self.clock.step(num_tokens, kv, pairs, len(ready))
        self.now += seconds
        tally.preemptions += len(plan.preempted)
        tally.bytes_moved += moved
        tally.bytes_swapped += swapped
        self.count(num_tokens, seconds)
        if self._on_step:
            self._on_step(plan)
        in_prefill = len(plan.chunks) - len(ready)
        num_ended = self._sample(ready)
        tried = num_tokens < scheduler.max_batch_tokens and not plan.preempted  # to admit who waits
        return not in_prefill and (not scheduler.waiting or (tried and not num_ended))

    def _prefilled(self, job: Job, begin: int, length: int) -> None:
        if not job.begun:
            job.begun = True
            self.tally.prompts += job.seq.prompt_len
            self.tally.known += begin
        self.tally.recomputed += max(0, min(length, job.furthest) - begin)
        job.furthest = max(job.furthest, length)

    def _sample(self, ready: list[Sequence]) -> int:
        """One more token for each, and the end for those whose last it is. Returns how many ended."""
        ended = []
        for seq in ready:
            if seq.num_computed <= seq.prompt_len or self.setup.prefix_cache:
                job = self.jobs[seq.seq_id]
                if job.first_token is None:
                    job.first_token = self.now
                seq.tokens.append(job.filler)
            else:
                seq.tokens.append(0)
            if len(seq.tokens) >= seq.max_tokens:
                ended.append(seq.seq_id)
        for seq_id in ended:
            self.finish(seq_id)
        return len(ended)

    def count(self, num_tokens: int, seconds: float) -> None:
        """A step was computed, and nobody has ended yet."""
        scheduler, tally = self.scheduler, self.tally
        waiting = bool(scheduler.waiting)
        tally.step(num_tokens, seconds, len(scheduler.running), waiting)
        if tally.steps % self.look_every == 0:
            head = scheduler.waiting[0].leader if waiting else None
            snapshot = self.manager.snapshot((len(head.tokens), head.max_slots) if head else None)
            usage = snapshot.usage(self._final)
            tally.look(usage, seconds, waiting)
            if self._on_look:
                self._on_look(usage)
