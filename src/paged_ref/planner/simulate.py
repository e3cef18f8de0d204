"""A trace through the real scheduler and the real manager, without a model, on a simulated clock.

Every decision (which sequence runs, waits or is preempted, which block it gets) is made by the code that serves real
requests; only the forward pass is replaced by the time that the roofline gives it. So a simulation counts what an
engine counts on the same requests, step by step. Decode steps in which the scheduler has nothing to decide are taken
without it (`FastForward`), which makes millions of tokens a matter of seconds.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from operator import attrgetter
from typing import cast

from ..core.engine.scheduler import StepPlan
from ..core.engine.sequence import Group, Sequence, Status
from ..core.memory.block_pool import OutOfBlocks
from ..core.memory.manager import KVCacheManager
from ..core.memory.paged import PagedManager
from ..core.memory.standard import StandardManager
from ..core.memory.usage import MemoryUsage
from .metrics import Outcome, Tally
from .roofline import chunk_pairs
from .setup import Setup
from .traces import RequestTrace, TraceRequest

SAMPLE_EVERY = 64  # steps between two samples of the memory's usage


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


class Simulation:
    """One run of a trace. `run` takes it to its end."""

    def __init__(
        self,
        setup: Setup,
        trace: RequestTrace,
        *,
        skip: bool = True,
        sample_every: int = SAMPLE_EVERY,
        on_step: Callable[[StepPlan], None] | None = None,
        on_sample: Callable[[MemoryUsage], None] | None = None,
    ) -> None:
        """`skip` allows `FastForward`, which changes nothing that is counted. `on_step` gets the plan of each step,
        after its tokens are computed and before sequences end; with it no step is skipped. `on_sample` gets the
        memory's usage just before that, every `sample_every` steps. Raises ValueError for an impossible setup."""
        self.setup = setup
        self.requests, self._hash_block = trace.requests, trace.hash_block
        self.manager = setup.make_manager()
        self.scheduler = setup.make_scheduler(self.manager)
        self.clock = setup.roofline
        self.tally = Tally()
        self.now = 0.0  # seconds since the trace began
        self.num_arrived = 0
        self.unfinished: dict[int, SimulatedRequest] = {}  # by seq_id
        self.sample_every = sample_every
        self._final_slots: dict[int, int] = {}  # seq_id -> the most slots that the sequence will hold
        self._longest = setup.longest
        # A region of the swapping manager may have to move when it grows, which takes time: no step is skipped there.
        self._skips = skip and on_step is None and isinstance(self.manager, (PagedManager, StandardManager))
        self._on_step, self._on_sample = on_step, on_sample

    def run(self) -> Outcome:
        """Serve all requests."""
        scheduler = self.scheduler
        while True:
            if not (scheduler.running or scheduler.waiting):
                if self.num_arrived == len(self.requests):
                    return self.tally.outcome(self.setup.label, self.now)
                self.now = max(self.now, self.requests[self.num_arrived].arrival)  # idle until then
            self.arrive()
            if (scheduler.running or scheduler.waiting) and self._step() and self._skips:
                FastForward(self).run()

    # --- requests in and out -----------------------------------------------------------------------

    def arrive(self) -> None:
        """Queue the requests that have arrived by now. A request that can never fit is refused, as LLM.add_request
        refuses it, and counted."""
        while self.num_arrived < len(self.requests) and self.requests[self.num_arrived].arrival <= self.now:
            seq_id, request = self.num_arrived, self.requests[self.num_arrived]
            self.num_arrived += 1
            try:
                simulated = self._simulated(seq_id, request)
                self.scheduler.add(simulated.group)
            except ValueError as error:
                self.tally.refuse(str(error))
                continue
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
        first = self.now if simulated.first_token is None else simulated.first_token
        self.tally.finish(simulated.request.arrival, first, self.now, seq.max_len - seq.prompt_len)

    # --- one step, as the engine makes it ----------------------------------------------------------

    def _step(self) -> bool:
        """True if decode steps without a decision may follow: all running sequences decode, and the first waiting
        one cannot be admitted."""
        scheduler, counts = self.scheduler, self.tally.counts
        plan = scheduler.schedule()
        self._note_lost_tokens(plan.preempted)
        num_tokens, compute_seconds, caught_up = self._compute(plan)
        seconds, moved, swapped = self.clock.transfers(plan.transfers, self.manager.block_size)
        seconds += compute_seconds
        self.now += seconds
        counts.preemptions += len(plan.preempted)
        counts.bytes_moved += moved
        counts.bytes_swapped += swapped
        self.count(num_tokens, seconds)
        if self._on_step:
            self._on_step(plan)
        in_prefill = len(plan.chunks) > len(caught_up)
        num_ended = self._sample_tokens(caught_up)
        tried_to_admit = num_tokens < scheduler.max_batch_tokens and not plan.preempted
        return not in_prefill and (not scheduler.waiting or (tried_to_admit and not num_ended))

    def _note_lost_tokens(self, preempted: Iterable[Group]) -> None:
        """A sequence that decoded and lost its memory computes all of its tokens again."""
        for group in preempted:
            simulated = self.unfinished[group.leader.seq_id]
            if group.status is Status.WAITING and simulated.first_token is not None:
                simulated.furthest = len(simulated.seq.tokens) - 1

    def _compute(self, plan: StepPlan) -> tuple[int, float, list[Sequence]]:
        """In place of the forward pass: the planned tokens count as computed. Returns how many there are, the seconds
        that they take, and the sequences that get a new token."""
        num_tokens = kv_tokens = pairs = 0
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
        return num_tokens, self.clock.seconds(num_tokens, kv_tokens, pairs, len(caught_up)), caught_up

    def _count_prefill(self, simulated: SimulatedRequest, begin: int, length: int) -> None:
        counts = self.tally.counts
        if not simulated.begun:
            simulated.begun = True
            counts.prompt_tokens += simulated.seq.prompt_len
            counts.known_tokens += begin
        counts.recomputed_tokens += max(0, min(length, simulated.furthest) - begin)
        simulated.furthest = max(simulated.furthest, length)

    def _sample_tokens(self, caught_up: list[Sequence]) -> int:
        """One more token for each sequence; a sequence ends with its last. Returns how many ended."""
        ended = []
        for seq in caught_up:
            if seq.num_computed <= seq.prompt_len or self.setup.prefix_cache:
                simulated = self.unfinished[seq.seq_id]
                if simulated.first_token is None:
                    simulated.first_token = self.now
                seq.tokens.append(simulated.filler)
            else:
                seq.tokens.append(0)
            if len(seq.tokens) >= seq.max_len:
                ended.append(seq.seq_id)
        for seq_id in ended:
            self.finish(seq_id)
        return len(ended)

    def count(self, num_tokens: int, seconds: float) -> None:
        """A step was computed, and none of its sequences has ended yet."""
        scheduler, tally = self.scheduler, self.tally
        waiting = bool(scheduler.waiting)
        tally.step(num_tokens, seconds, len(scheduler.running), waiting)
        if tally.counts.steps % self.sample_every == 0:
            head = scheduler.waiting[0].leader if waiting else None
            snapshot = self.manager.snapshot((len(head.tokens), head.max_slots) if head else None)
            usage = snapshot.usage(self._final_slots)
            tally.sample(usage, seconds, waiting)
            if self._on_sample:
                self._on_sample(usage)


# --- many decode steps together ----------------------------------------------------------------------------


class FastForward:
    """Decode steps in each of which `schedule` would append one token to every sequence, in order of arrival.

    The scheduler has a decision to make when a request arrives that could be admitted, when a sequence ends and another
    waits, or when a block is needed and none is free. Before the first of these steps all running sequences decode,
    and the waiting ones could not be admitted; until a sequence ends, the free memory only shrinks.

    Most sequences have room for the token in what they hold, so the append is postponed until the memory is sampled
    or the sequence ends; only a sequence that needs a new block is appended in its step. So the cost of a step is
    that of the blocks that it takes.
    """

    def __init__(self, simulation: Simulation) -> None:
        self._simulation = simulation
        self._num_steps = 0
        self._kv_tokens = 0  # read by the latest step
        self._appended: dict[int, int] = {}  # seq_id -> steps whose token manager and sequence have
        self._full: defaultdict[int, list[Sequence]] = defaultdict(list)  # by the steps after which no slot is left
        self._ending: defaultdict[int, list[Sequence]] = defaultdict(list)  # by the step that is their last
        for group in simulation.scheduler.running:
            seq = group.leader
            self._full[slack(simulation.manager, seq.seq_id)].append(seq)
            self._ending[seq.max_len - len(seq.tokens)].append(seq)
            self._appended[seq.seq_id] = 0
            self._kv_tokens += seq.num_computed

    def run(self) -> None:
        """Take steps until the scheduler has a decision to make."""
        while self._simulation.scheduler.running and self._step():
            pass
        self._append_all()

    def _step(self) -> bool:
        """Take one step, or none where the scheduler must decide first. False: the scheduler comes next."""
        simulation = self._simulation
        running, waiting = simulation.scheduler.running, simulation.scheduler.waiting
        queue_was_empty = not waiting
        simulation.arrive()
        if (queue_was_empty and waiting) or not self._append_full():
            return False
        self._num_steps += 1
        self._kv_tokens += len(running)
        seconds = simulation.clock.seconds(len(running), self._kv_tokens, self._kv_tokens, len(running))
        simulation.now += seconds
        if (simulation.tally.counts.steps + 1) % simulation.sample_every == 0:
            self._append_all()
        simulation.count(len(running), seconds)
        if self._num_steps not in self._ending:
            return True
        self._finish(self._ending.pop(self._num_steps))
        return not waiting

    def _append_all(self) -> None:
        """Give manager and sequences every token that was postponed."""
        self._append([group.leader for group in self._simulation.scheduler.running], self._num_steps)

    def _append_full(self) -> bool:
        """Append the next token of the sequences that have no slot left for it. False, and nothing changes, where
        the pool has no block for them."""
        full = [seq for seq in self._full.pop(self._num_steps, ()) if seq.seq_id in self._appended]
        if not full:
            return True
        full.sort(key=attrgetter("seq_id"))  # in order of arrival
        upto = self._num_steps + 1
        try:
            self._append(full, upto)
        except OutOfBlocks:
            return False
        for seq in full:
            self._full[upto + slack(self._simulation.manager, seq.seq_id)].append(seq)
        return True

    def _append(self, seqs: list[Sequence], upto: int) -> None:
        """Give manager and sequences the tokens of the steps up to `upto`. Raises OutOfBlocks, and changes nothing."""
        simulation = self._simulation
        appends = [(seq.seq_id, upto - self._appended[seq.seq_id]) for seq in seqs]
        simulation.manager.append(appends)
        for seq, (seq_id, count) in zip(seqs, appends, strict=True):
            seq.num_computed += count
            seq.tokens.extend([simulation.unfinished[seq_id].filler] * count)
            self._appended[seq_id] = upto
            if simulation.setup.prefix_cache:
                simulation.manager.commit(seq_id, seq.tokens, seq.num_computed)

    def _finish(self, ending: list[Sequence]) -> None:
        ending.sort(key=attrgetter("seq_id"))
        self._append(ending, self._num_steps)
        for seq in ending:
            self._kv_tokens -= seq.num_computed
            del self._appended[seq.seq_id]
            self._simulation.finish(seq.seq_id)


def slack(manager: KVCacheManager, seq_id: int) -> int:
    """Tokens that fit into what the sequence holds: for these, `append` takes nothing from the pool."""
    if isinstance(manager, PagedManager):
        table = manager.tables[seq_id]
        if table.length % manager.block_size and manager.pool.ref_count[table.blocks[-1]] > 1:
            return 0  # the last block is shared, and the next token copies it
        return len(table.blocks) * manager.block_size - table.length
    assert isinstance(manager, StandardManager)
    region = manager.regions[seq_id]
    return region.size - region.length
