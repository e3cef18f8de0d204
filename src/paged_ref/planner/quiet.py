"""Quiet steps, many at once: what makes millions of tokens a matter of seconds.

In a quiet step each sequence that runs computes one token, and the scheduler has nothing to decide. `schedule`
would append one token to each of them, in order of arrival. Most have room for it in what they hold, and the
manager need not be told before somebody asks; only those that need a new block are told in their step. So the cost
of a step is that of the blocks it asks for. tests/workload/test_simulate.py holds it to the plain loop.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from ..core.engine.sequence import Sequence
from ..core.memory.block_pool import OutOfBlocks
from ..core.memory.manager import KnowsRoom

if TYPE_CHECKING:
    from .simulate import Simulation


def skip_quiet_steps(simulation: Simulation, manager: KnowsRoom) -> None:
    """Take quiet steps until one may not be.

    That is when somebody comes who could be admitted, when somebody leaves and another waits, or when a block is
    asked for and none is there: then `schedule` decides. Before the first, all that run decode, and whoever waits
    could not be admitted; memory only gets shorter until somebody leaves.
    """
    running, waiting = simulation.scheduler.running, simulation.scheduler.waiting
    requests, clock, tally = simulation.requests, simulation.clock, simulation.tally
    needs_room: defaultdict[int, list[Sequence]] = defaultdict(list)  # by the step in which it does
    ends: defaultdict[int, list[Sequence]] = defaultdict(list)
    told: dict[int, int] = {}  # seq_id -> steps that manager and sequence know of
    step = kv = 0
    for group in running:
        seq = group.leader
        needs_room[manager.room(seq.seq_id)].append(seq)
        ends[seq.max_tokens - len(seq.tokens)].append(seq)
        told[seq.seq_id] = 0
        kv += seq.num_computed

    def tell(seqs: list[Sequence], upto: int) -> None:
        """Bring manager and sequences up to date. Raises OutOfBlocks, and changes nothing."""
        appends = [(seq.seq_id, upto - told[seq.seq_id]) for seq in seqs]
        simulation.manager.append(appends)
        for seq, (seq_id, count) in zip(seqs, appends, strict=True):
            seq.num_computed += count
            seq.tokens.extend([simulation.jobs[seq_id].filler] * count)
            told[seq_id] = upto
            if simulation.setup.prefix_cache:
                simulation.manager.commit(seq_id, seq.tokens, seq.num_computed)

    while running:
        if simulation.num_arrived < len(requests) and requests[simulation.num_arrived].arrival <= simulation.now:
            nobody_waited = not waiting
            simulation.arrive()
            if waiting and nobody_waited:
                break
        asking = sorted((seq for seq in needs_room.pop(step, ()) if seq.seq_id in told), key=_by_arrival)
        if asking:
            try:
                tell(asking, step + 1)
            except OutOfBlocks:
                break
            for seq in asking:
                needs_room[step + 1 + manager.room(seq.seq_id)].append(seq)
        step += 1
        kv += len(running)
        seconds = clock.decode(len(running), kv)
        simulation.now += seconds
        if (tally.steps + 1) % simulation.look_every == 0:
            tell([group.leader for group in running], step)
        simulation.count(len(running), seconds)
        if step in ends:
            ending = sorted(ends.pop(step), key=_by_arrival)
            tell(ending, step)
            for seq in ending:
                kv -= seq.num_computed
                del told[seq.seq_id]
                simulation.finish(seq.seq_id)
            if waiting:
                break
    tell([group.leader for group in running], step)


def _by_arrival(seq: Sequence) -> int:
    return seq.seq_id
