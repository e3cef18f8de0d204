"""A trace through the real scheduler and the real manager, without a model, on a simulated clock.

Every decision (which sequence runs, waits or is preempted, which block it gets) is made by the code that serves real
requests; only the forward pass is replaced by the time that the roofline gives it. So a simulation counts what an
engine counts on the same requests, step by step. Sequences that only decode are kept apart (`Decoding`): the scheduler
is asked about the others, and a step costs as much as what changes in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from math import inf
from typing import cast

from ..core.engine.scheduler import StepPlan
from ..core.engine.sequence import Group, Sequence, Status
from ..core.memory.usage import MemoryUsage
from .decoding import Decoding, SimulatedRequest
from .metrics import Admission, Outcome, Tally
from .roofline import chunk_pairs
from .setup import Setup
from .traces import RequestTrace, TraceRequest

SAMPLE_EVERY = 64  # steps between two samples of the memory's usage
GENERATIONS, MEASURED_GENERATIONS = 3, 10  # of a saturated system: warm-up, and the least that is measured


@dataclass(slots=True)
class Saturation:
    """When to measure a system in which a request always waits.

    The warm-up is over when GENERATIONS times as many requests have ended as ever ran together: what began together in
    the empty system has spread out by then. Measured are whole passes of the trace, from the beginning of one request
    to that of another, so that each of the `num_requests` of a pass counts as often as any other.
    """

    num_requests: int
    measured: int = 0  # requests that begin in the measured time; 0 during the warm-up
    began: float = 0.0  # seconds of the simulation's clock
    seconds: float = 0.0  # that were measured; 0 before the end
    _left: int = 0

    @property
    def ended(self) -> bool:
        return self.seconds > 0

    def begin(self, now: float, finished: int, running_peak: int) -> bool:
        """A request begins, in the step that starts now. True: the measurement begins with it."""
        if not self.measured:
            if finished < GENERATIONS * max(1, running_peak):
                return False
            passes = max(1, -(-MEASURED_GENERATIONS * running_peak // self.num_requests))
            self.measured = self._left = passes * self.num_requests
            self.began = now
            return True
        self._left -= 1
        if not self._left:
            self.seconds = now - self.began
        return False


class Simulation:
    """One run of a trace. `run` takes it to its end."""

    def __init__(
        self,
        setup: Setup,
        trace: RequestTrace,
        *,
        skip: bool = True,
        num_warm_up: int = 0,
        saturation: Saturation | None = None,
        sample_every: int = SAMPLE_EVERY,
        on_step: Callable[[StepPlan], None] | None = None,
        on_sample: Callable[[MemoryUsage], None] | None = None,
    ) -> None:
        """`skip` allows `Decoding`, which changes nothing that is counted. The latency of the first `num_warm_up`
        requests is left out. With `saturation`, which says when to measure, arrival times do not matter: a request is
        always waiting. `on_step` gets the plan of each step, after its tokens are computed and before sequences end;
        with it no step is skipped. `on_sample` gets the memory's usage just before that, every `sample_every` steps.
        Raises ValueError for an impossible setup."""
        self.setup = setup
        self.requests, self._hash_block = trace.requests, trace.hash_block
        self.manager = setup.make_manager()
        self.scheduler = setup.make_scheduler(self.manager)
        self.clock = setup.roofline
        self.tally = Tally(num_warm_up)
        self.now = 0.0  # seconds since the trace began
        self.num_preempted = 0  # in all of the run; the tally has those of the measured time
        self.num_arrived = 0
        self.unfinished: dict[int, SimulatedRequest] = {}  # by seq_id
        self.sample_every = sample_every
        self.waits_for: Admission | None = None  # what the first waiting request waits for
        # No decision is open: no request waits, or the first one could not be admitted, and nothing ended since then.
        self.settled = True
        self.saturation = saturation
        self._final_slots: dict[int, int] = {}  # seq_id -> the most slots that the sequence will hold
        self._longest = setup.longest
        self._decoding = Decoding(
            self.scheduler,
            self.manager,
            self.unfinished,
            prefix_cache=setup.prefix_cache,
            enabled=skip and on_step is None,
        )
        self._on_step, self._on_sample = on_step, on_sample

    def run(self) -> Outcome:
        """Serve all requests, or as many as the saturation measures."""
        scheduler, saturation = self.scheduler, self.saturation
        while not (saturation and saturation.ended):
            if not (scheduler.running or scheduler.waiting):
                if self.num_arrived == len(self.requests):
                    break
                if not saturation:
                    self.now = max(self.now, self.requests[self.num_arrived].arrival)  # idle until then
            self.arrive()
            if scheduler.running or scheduler.waiting:
                self._coast()
                self._step()
        return self.tally.outcome(self.setup.label, saturation.seconds if saturation else self.now)

    # --- requests in and out -----------------------------------------------------------------------

    @property
    def next_arrival(self) -> float:
        """When the next request arrives; infinite after the last, and before its time where requests wait anyway."""
        if self.num_arrived == len(self.requests):
            return inf
        if self.saturation:
            return inf if len(self.scheduler.waiting) > self.scheduler.max_batch_seqs else 0.0
        return self.requests[self.num_arrived].arrival

    def arrive(self) -> None:
        """Queue the requests that have arrived by now. A request that can never fit is refused, as LLM.add_request
        refuses it, and counted."""
        while self.next_arrival <= self.now:
            seq_id, request = self.num_arrived, self.requests[self.num_arrived]
            self.num_arrived += 1
            try:
                simulated = self._simulated(seq_id, request)
                self.scheduler.add(simulated.group)
            except ValueError as error:
                self.tally.refuse(str(error))
                continue
            if len(self.scheduler.waiting) == 1:
                self.settled = False
            self.unfinished[seq_id] = simulated
            self._final_slots[seq_id] = simulated.seq.max_slots
            self.tally.counts.cut += simulated.seq.max_len < request.num_tokens

    def _simulated(self, seq_id: int, request: TraceRequest) -> SimulatedRequest:
        prompt, context = request.prompt_len, self._longest
        if prompt >= context:
            raise ValueError(f"the prompt has {prompt} tokens; the context of {context} has no room for more")
        # Without a prefix cache only lengths matter, and zeros are enough.
        filler: list[int] | bytes = bytes(1)
        tokens = cast("list[int]", bytearray(prompt))
        if self.setup.prefix_cache:  # equal blocks get equal ids; all other tokens differ from request to request
            filler = [-1 - seq_id]
            tokens = [each for hash_id in request.hash_ids for each in [hash_id] * self._hash_block][:prompt]
            tokens += filler * (prompt - len(tokens))
        seq = Sequence(seq_id, tokens, prompt, min(request.num_tokens, context))
        return SimulatedRequest(request, Group([seq]), seq, filler)

    def finish(self, seq_id: int) -> None:
        simulated = self.unfinished.pop(seq_id)
        del self._final_slots[seq_id]
        seq = simulated.seq
        self.scheduler.finish(simulated.group, seq)
        self.settled = not self.scheduler.waiting
        first = self.now if simulated.first_token is None else simulated.first_token
        self.tally.finish(seq_id, simulated.request.arrival, first, self.now, seq.max_len - seq.prompt_len)

    # --- steps -------------------------------------------------------------------------------------

    def _coast(self) -> None:
        """Take steps for as long as all running sequences decode and nothing is to be decided, sampled or moved."""
        decoding, tally, count = self._decoding, self.tally, self._decoding.count
        if not count or count < len(self.scheduler.running):
            return
        next_arrival = self.next_arrival
        most = self.sample_every - 1 - tally.counts.steps % self.sample_every
        num_steps = read_tokens = 0
        while self.settled and num_steps < most and decoding.advance():
            kv_tokens = decoding.kv_tokens
            seconds = self.clock.seconds(count, kv_tokens, kv_tokens, count)
            self.now += seconds
            tally.step(seconds, count, self.waits_for)
            num_steps += 1
            read_tokens += kv_tokens
            if next_arrival <= self.now:
                self.arrive()
                next_arrival = self.next_arrival
        tally.counts.steps += num_steps
        tally.computed(count * num_steps, read_tokens, read_tokens, count * num_steps)

    def _step(self) -> None:
        """One step, as the engine makes it."""
        scheduler, decoding = self.scheduler, self._decoding
        transfers = decoding.grow()
        if transfers and decoding.moves and scheduler.waiting:
            self.settled = False
        plan = self._plan(decoding.count)
        self._note_lost_tokens(plan.preempted)
        num_tokens, compute_seconds, caught_up = self._compute(plan)
        seconds, moved, swapped = self.clock.transfers([*transfers, *plan.transfers], self.manager.block_size)
        seconds += compute_seconds
        self.now += seconds
        counts = self.tally.counts
        self.num_preempted += len(plan.preempted)
        counts.preemptions += len(plan.preempted)
        counts.bytes_moved += moved
        counts.bytes_swapped += swapped
        counts.steps += 1
        self.waits_for = self._limit(num_tokens, plan) if scheduler.waiting else None
        self.tally.step(seconds, len(scheduler.running), self.waits_for)
        if counts.steps % self.sample_every == 0:
            decoding.append_all()
            self._sample(seconds)
        if self._on_step:
            self._on_step(plan)
        # A request that was not tried in this step can be admitted in the next one, and so can one whose beginning was
        # just computed for another.
        tried = num_tokens < scheduler.max_batch_tokens and not plan.preempted
        self.settled = not scheduler.waiting or (tried and not (self.setup.prefix_cache and plan.chunks))
        for simulated in decoding.take_ended():
            self.finish(simulated.seq.seq_id)
        self._sample_tokens(caught_up)
        decoding.join()

    def _plan(self, num_decoding: int) -> StepPlan:
        """The scheduler's plan for the sequences behind the first `num_decoding` running ones, which have their tokens
        of this step already, and so much less is left of what a step may hold."""
        scheduler = self.scheduler
        if not num_decoding:
            return scheduler.schedule()
        if self.settled and num_decoding == len(scheduler.running):
            return StepPlan()
        decoding = scheduler.running[:num_decoding]
        del scheduler.running[:num_decoding]
        scheduler.max_batch_tokens -= num_decoding
        scheduler.max_batch_seqs -= num_decoding
        scheduler.num_others = num_decoding
        try:
            return scheduler.schedule()
        finally:
            scheduler.running[:0] = decoding
            scheduler.max_batch_tokens += num_decoding
            scheduler.max_batch_seqs += num_decoding
            scheduler.num_others = 0

    def _limit(self, num_tokens: int, plan: StepPlan) -> Admission:
        """What keeps the first waiting request out of this step's batch."""
        if self.settled and self.waits_for and not plan.chunks:
            return self.waits_for  # as before: it was not tried again
        if len(self.scheduler.running) >= self.scheduler.max_batch_seqs:
            return "sequences"
        return "tokens" if num_tokens >= self.scheduler.max_batch_tokens and not plan.preempted else "memory"

    def _note_lost_tokens(self, preempted: Iterable[Group]) -> None:
        """A sequence that decoded and lost its memory computes all of its tokens again."""
        for group in preempted:
            simulated = self.unfinished[group.leader.seq_id]
            if group.status is Status.WAITING and simulated.first_token is not None:
                simulated.furthest = len(simulated.seq.tokens) - 1

    def _compute(self, plan: StepPlan) -> tuple[int, float, list[Sequence]]:
        """In place of the forward pass: the planned tokens count as computed, beside those of `Decoding`. Returns how
        many there are, the seconds that they take, and the planned sequences that get a new token."""
        num_tokens, kv_tokens = self._decoding.count, self._decoding.kv_tokens
        pairs = kv_tokens
        caught_up = []
        for seq, count in plan.chunks:
            begin = seq.num_computed
            length = seq.num_computed = begin + count
            num_tokens += count
            kv_tokens += length
            pairs += length if count == 1 else chunk_pairs(length, count)
            if length == len(seq.tokens):
                caught_up.append(seq)
            if count > 1 or length <= seq.prompt_len or length < len(seq.tokens):
                self._count_prefill(self.unfinished[seq.seq_id], begin, length)
            if self.setup.prefix_cache:
                self.manager.commit(seq.seq_id, seq.tokens, length)
        num_sampled = self._decoding.count + len(caught_up)
        self.tally.computed(num_tokens, kv_tokens, pairs, num_sampled)
        return num_tokens, self.clock.seconds(num_tokens, kv_tokens, pairs, num_sampled), caught_up

    def _count_prefill(self, simulated: SimulatedRequest, begin: int, length: int) -> None:
        if not simulated.begun:
            simulated.begun = True
            peak = self.tally.counts.running_peak
            if self.saturation and self.saturation.begin(self.now, self.tally.finished, peak):
                self.tally = Tally()
            self.tally.counts.prompt_tokens += simulated.seq.prompt_len
            self.tally.counts.known_tokens += begin
        self.tally.counts.recomputed_tokens += max(0, min(length, simulated.furthest) - begin)
        simulated.furthest = max(simulated.furthest, length)

    def _sample_tokens(self, caught_up: list[Sequence]) -> None:
        """One more token for each planned sequence; a sequence ends with its last."""
        ended = []
        for seq in caught_up:
            simulated = self.unfinished[seq.seq_id]
            if simulated.first_token is None:
                simulated.first_token = self.now
            seq.tokens.extend(simulated.filler)
            if len(seq.tokens) >= seq.max_len:
                ended.append(seq.seq_id)
        for seq_id in ended:
            self.finish(seq_id)

    def _sample(self, seconds: float) -> None:
        """Look where the memory is. None of the step's sequences has ended yet."""
        head = self.scheduler.waiting[0].leader if self.scheduler.waiting else None
        snapshot = self.manager.snapshot((len(head.tokens), head.max_slots) if head else None)
        usage = snapshot.usage(self._final_slots)
        self.tally.sample(usage, seconds, head is not None)
        if self._on_sample:
            self._on_sample(usage)


def simulated(setup: Setup, trace: RequestTrace, make: Callable[[Setup], Simulation]) -> tuple[Simulation, Outcome]:
    """The simulation that `make` makes of a setup, run on this trace, and its outcome.

    Where no two requests begin with the same tokens, a prefix cache finds only what a preempted request had computed.
    So where none is preempted, the same blocks without the cache decide the same, and take a quarter of the time.
    """
    if setup.prefix_cache and not any(each.hash_ids for each in trace.requests):
        without = make(replace(setup, prefix_cache=False))
        outcome = without.run()
        if not without.num_preempted:
            return without, replace(outcome, label=setup.label)
    simulation = make(setup)
    return simulation, simulation.run()
