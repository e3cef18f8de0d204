"""A trace through the real scheduler and the real manager, without a model, on a simulated clock.

Every decision (which sequence runs, waits or is preempted, which block it gets) is made by the code that serves real
requests; only the forward pass is replaced by the time that the roofline gives it. So a simulation counts what an
engine counts on the same requests, step by step. Sequences that only decode are kept apart (`Decoding`): the scheduler
is asked about the others, and a step costs as much as what changes in it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import inf
from operator import attrgetter
from typing import cast

from ..core.engine.scheduler import StepPlan
from ..core.engine.sequence import Group, Sequence, Status
from ..core.memory.block_pool import OutOfBlocks
from ..core.memory.manager import KVCacheManager, Transfer
from ..core.memory.paged import PagedManager
from ..core.memory.standard import StandardManager
from ..core.memory.usage import MemoryUsage
from ..extras.swapping import SwappingManager
from .metrics import Admission, Outcome, Tally
from .roofline import chunk_pairs
from .setup import Setup
from .traces import RequestTrace, TraceRequest

SAMPLE_EVERY = 64  # steps between two samples of the memory's usage
GENERATIONS, MEASURED_GENERATIONS = 3, 10  # of a saturated system: warm-up, and the least that is measured


@dataclass(eq=False, slots=True)
class SimulatedRequest:
    """One unfinished request."""

    request: TraceRequest
    group: Group
    seq: Sequence
    filler: int  # the token id that stands for each generated token
    begun: bool = False  # a first token was computed
    first_token: float | None = None  # time at which the first new token came out
    furthest: int = 0  # tokens that were computed before a preemption took them


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
        self.num_arrived = 0
        self.unfinished: dict[int, SimulatedRequest] = {}  # by seq_id
        self.sample_every = sample_every
        self.waits_for: Admission | None = None  # what the first waiting request waits for
        # No decision is open: no request waits, or the first one could not be admitted, and nothing ended since then.
        self.settled = True
        self._saturation = saturation
        self._final_slots: dict[int, int] = {}  # seq_id -> the most slots that the sequence will hold
        self._longest = setup.longest
        self._decoding = Decoding(self, skip and on_step is None)
        self._on_step, self._on_sample = on_step, on_sample

    def run(self) -> Outcome:
        """Serve all requests, or as many as the saturation measures."""
        scheduler, saturation = self.scheduler, self._saturation
        while not (saturation and saturation.ended):
            if not (scheduler.running or scheduler.waiting):
                if self.num_arrived == len(self.requests):
                    break
                if not saturation:
                    self.now = max(self.now, self.requests[self.num_arrived].arrival)  # idle until then
            self.arrive()
            if scheduler.running or scheduler.waiting:
                self._decoding.coast()
                self._step()
        return self.tally.outcome(self.setup.label, saturation.seconds if saturation else self.now)

    # --- requests in and out -----------------------------------------------------------------------

    @property
    def next_arrival(self) -> float:
        """When the next request arrives; infinite after the last, and before its time where requests wait anyway."""
        if self.num_arrived == len(self.requests):
            return inf
        if self._saturation:
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
        filler, tokens = 0, cast("list[int]", bytearray(prompt))  # zeros: without a prefix cache only lengths matter
        if self.setup.prefix_cache:  # equal blocks get equal ids; all other tokens differ from request to request
            filler = -1 - seq_id
            tokens = [each for hash_id in request.hash_ids for each in [hash_id] * self._hash_block][:prompt]
            tokens += [filler] * (prompt - len(tokens))
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

    # --- one step, as the engine makes it ----------------------------------------------------------

    def _step(self) -> None:
        scheduler, decoding = self.scheduler, self._decoding
        transfers = decoding.grow()
        plan = self._plan(decoding.count)
        self._note_lost_tokens(plan.preempted)
        num_tokens, compute_seconds, caught_up = self._compute(plan)
        seconds, moved, swapped = self.clock.transfers([*transfers, *plan.transfers], self.manager.block_size)
        seconds += compute_seconds
        self.now += seconds
        counts = self.tally.counts
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
        decoding.finish()
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
            if self._saturation and self._saturation.begin(self.now, self.tally.finished, peak):
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
            seq.tokens.append(simulated.filler)
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


# --- sequences that only decode ------------------------------------------------------------------------------


class Decoding:
    """The first of the running sequences: those that decode. Each gets one token in each step, and whether there is
    memory for it is all that has to be asked.

    Most have room for the token in what they hold, so the append is postponed until the memory is sampled or the
    sequence ends; only a sequence that needs memory is appended in its step. So the cost of a step is that of the
    blocks that it takes. Where there is no memory, all go back to the scheduler, which preempts.
    """

    def __init__(self, simulation: Simulation, enabled: bool) -> None:
        self._simulation = simulation
        self._enabled = enabled
        self._moves = isinstance(simulation.manager, SwappingManager)  # growth may move a region, which leaves a hole
        self.count = 0
        self.kv_tokens = 0  # read by the latest step
        self._clear()

    def _clear(self) -> None:
        self.count = self.kv_tokens = self._num_steps = 0
        self._appended: dict[int, int] = {}  # seq_id -> steps whose token manager and sequence have
        self._full: defaultdict[int, list[Sequence]] = defaultdict(list)  # by the steps after which no slot is left
        self._ending: defaultdict[int, list[Sequence]] = defaultdict(list)  # by the step that is their last

    def join(self) -> None:
        """Take the running sequences that decode from now on, as long as they follow each other."""
        running = self._simulation.scheduler.running
        most = min(len(running), self._simulation.scheduler.max_batch_tokens) if self._enabled else 0
        while self.count < most:
            seq = running[self.count].leader
            simulated = self._simulation.unfinished[seq.seq_id]
            if seq.num_uncomputed != 1 or simulated.first_token is None:
                return
            self._appended[seq.seq_id] = self._num_steps
            self._full[self._num_steps + slack(self._simulation.manager, seq.seq_id)].append(seq)
            self._ending[self._num_steps + seq.max_len - len(seq.tokens)].append(seq)
            self.kv_tokens += seq.num_computed
            self.count += 1

    def coast(self) -> None:
        """Take steps for as long as all running sequences decode and nothing is to be decided, sampled or moved."""
        simulation, count = self._simulation, self.count
        running, counts, clock = simulation.scheduler.running, simulation.tally.counts, simulation.clock
        while count and count == len(running) and simulation.settled:
            if self._num_steps + 1 in self._ending or (counts.steps + 1) % simulation.sample_every == 0:
                return
            if self._num_steps in self._full and (self._moves or self._append_full() is None):
                return
            self._num_steps += 1
            self.kv_tokens += count
            seconds = clock.seconds(count, self.kv_tokens, self.kv_tokens, count)
            simulation.now += seconds
            counts.steps += 1
            simulation.tally.computed(count, self.kv_tokens, self.kv_tokens, count)
            simulation.tally.step(seconds, count, simulation.waits_for)
            simulation.arrive()

    def grow(self) -> list[Transfer]:
        """The tokens of the next step. Where there is no memory for them, all sequences go back to the scheduler."""
        transfers: list[Transfer] = []
        if self._num_steps in self._full:
            found = self._append_full()
            if found is None:
                self.append_all()
                self._clear()
                return []
            transfers = found
            if self._moves and self._simulation.scheduler.waiting:
                self._simulation.settled = False
        self._num_steps += 1
        self.kv_tokens += self.count
        return transfers

    def finish(self) -> None:
        """End the sequences whose last step this was."""
        ending = self._ending.pop(self._num_steps, None)
        if not ending:
            return
        ending.sort(key=attrgetter("seq_id"))
        self._append(ending, self._num_steps)
        for seq in ending:
            self.kv_tokens -= seq.num_computed
            self.count -= 1
            del self._appended[seq.seq_id]
            self._simulation.finish(seq.seq_id)

    def append_all(self) -> None:
        """Give manager and sequences every token that was postponed."""
        running = self._simulation.scheduler.running
        self._append([group.leader for group in running[: self.count]], self._num_steps)

    def _append_full(self) -> list[Transfer] | None:
        """Append the next token of the sequences that have no slot left for it. None, and nothing changes, where there
        is no memory for them."""
        full = [seq for seq in self._full[self._num_steps] if seq.seq_id in self._appended]
        full.sort(key=attrgetter("seq_id"))  # in order of arrival
        if self._moves:
            self._append(full, self._num_steps)  # a region moves with all tokens that it has
        upto = self._num_steps + 1
        try:
            transfers = self._append(full, upto)
        except OutOfBlocks:
            return None
        del self._full[self._num_steps]
        for seq in full:
            self._full[upto + slack(self._simulation.manager, seq.seq_id)].append(seq)
        return transfers

    def _append(self, seqs: list[Sequence], upto: int) -> list[Transfer]:
        """Give manager and sequences the tokens of the steps up to `upto`. Raises OutOfBlocks, and changes nothing."""
        simulation, appended = self._simulation, self._appended
        appends = [(seq.seq_id, upto - appended[seq.seq_id]) for seq in seqs]
        transfers = simulation.manager.append(appends)
        for seq, (seq_id, count) in zip(seqs, appends, strict=True):
            seq.num_computed += count
            seq.tokens.extend([simulation.unfinished[seq_id].filler] * count)
            appended[seq_id] = upto
            if simulation.setup.prefix_cache:
                simulation.manager.commit(seq_id, seq.tokens, seq.num_computed)
        return transfers


def slack(manager: KVCacheManager, seq_id: int) -> int:
    """Tokens that fit into what the sequence holds: for these, `append` takes nothing from the pool."""
    if isinstance(manager, PagedManager):
        table = manager.tables[seq_id]
        if table.length % manager.block_size and manager.pool.ref_count[table.blocks[-1]] > 1:
            return 0  # the last block is shared, and the next token copies it
        return len(table.blocks) * manager.block_size - table.length
    assert isinstance(manager, (StandardManager, SwappingManager))
    region = manager.regions[seq_id]
    return region.size - region.length
