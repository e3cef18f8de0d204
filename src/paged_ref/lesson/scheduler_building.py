"""The scheduler that a reader writes in lesson 11: a trace of requests, step by step, beside the real scheduler."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ..core.checks import plural
from ..core.engine.scheduler import Scheduler
from ..core.engine.sequence import Group, Sequence
from ..core.memory.block_pool import BlockPool
from ..core.memory.paged import PagedManager
from .building import Build, Stage
from .calls import show
from .grading import Trail

Plan = list[tuple[int, int]]  # (sequence, tokens)
MAX_STEPS = 500


@dataclass(frozen=True)
class RequestTrace:
    """Requests as (tokens of the prompt, tokens of the output), and what serves them."""

    requests: tuple[tuple[int, int], ...]
    budget: int  # tokens in a step
    most: int  # sequences in a step
    num_blocks: int = 999  # of four slots

    def __repr__(self) -> str:
        limits = f"{self.budget} tokens and {self.most} sequences in a step, {self.num_blocks} blocks"
        return f"{plural(len(self.requests), 'request')}, {limits}"

    def manager(self) -> PagedManager:
        return PagedManager(BlockPool(self.num_blocks), 4)

    def sequences(self) -> list[Sequence]:
        return [Sequence(i, [0] * prompt, prompt, prompt + new) for i, (prompt, new) in enumerate(self.requests)]


class _Real(Scheduler):
    """The package's, without its guard against a return that is too early: the exercise leaves that out."""

    def room_to_return(self, group: Group) -> int:
        return 0


def _real_steps(case: RequestTrace) -> Iterator[tuple[Plan, list[int]]]:
    """The plan of each step of the package's scheduler, and the sequences that gave way in it."""
    scheduler = _Real(case.manager(), case.budget, case.most)
    groups = [Group([seq]) for seq in case.sequences()]
    for group in groups:
        scheduler.add(group)
    while scheduler.running or scheduler.waiting:
        plan = scheduler.schedule()
        yield [(seq.seq_id, n) for seq, n in plan.chunks], [group.leader.seq_id for group in plan.preempted]
        for group in [each for each in groups if each.seqs]:
            seq = group.leader
            seq.num_computed += next((n for each, n in plan.chunks if each is seq), 0)
            if _goes_on(seq, [each for each, _ in plan.chunks]):
                scheduler.finish(group, seq)


def _goes_on(seq: Sequence, ran: list[Sequence]) -> bool:
    """Add a token to a sequence that ran and has caught up. True: that was its last one."""
    if seq in ran and not seq.num_uncomputed:
        seq.tokens.append(0)
        return len(seq.tokens) == seq.max_len
    return False


def _steps(schedule: Callable[..., Any], case: RequestTrace) -> Iterator[tuple[Any, list[int]]]:
    """The same for the reader's function. Raises what it raises, and ValueError for a plan that is none."""
    manager, waiting = case.manager(), case.sequences()
    running: list[Sequence] = []
    known = {seq.seq_id: seq for seq in waiting}
    while waiting or running:
        before = list(running)
        plan = schedule(running, waiting, manager, case.budget, case.most)
        if not isinstance(plan, list) or not all(
            isinstance(chunk, tuple) and len(chunk) == 2 and chunk[0] in known.values() for chunk in plan
        ):
            raise ValueError(f"a plan is a list of (sequence, tokens); this step gives {plan!r}")
        for seq, n in plan:
            if seq not in running:
                raise ValueError(f"sequence {seq.seq_id} is planned, and is not in `running`")
            if (room := manager.length(seq.seq_id) - seq.num_computed) != n:
                raise ValueError(f"sequence {seq.seq_id} is to run {n} tokens; the manager has room for {room} more")
        yield [(seq.seq_id, n) for seq, n in plan], [seq.seq_id for seq in reversed(before) if seq not in running]
        for seq, n in plan:
            seq.num_computed += n
            if _goes_on(seq, [seq]):
                running.remove(seq)
                manager.free(seq.seq_id)


def _trail(steps: Iterator[tuple[Any, list[int]]]) -> Trail:
    """What each step runs: "3: 1" is one token of sequence 3."""
    trail = Trail()
    for number, (plan, gave_way) in enumerate(steps, start=1):
        words = ", ".join(f"{seq_id}: {count}" for seq_id, count in plan) or "nothing"
        if gave_way:
            words += f"; gives way: {', '.join(map(str, gave_way))}"
        trail[f"step {number} runs (sequence: tokens)"] = words
        if number == MAX_STEPS:
            break
    trail["steps"] = len(trail)
    return trail


def _trial(schedule: Callable[..., Any]) -> Callable[[RequestTrace], Trail]:
    return lambda case: _trail(_steps(schedule, case))


def _draw(schedule: Callable[..., Any]) -> None:
    """The trace step by step: P a chunk of a prompt, d one more token."""
    for title, case in (("enough blocks", EASY), ("twelve blocks", SHORT)):
        plans = [dict(plan) for plan, _ in _steps(schedule, case)]
        text = f"{title}: {len(plans)} steps; the package's scheduler takes {len(list(_real_steps(case)))}\n"
        for seq_id in range(len(case.requests)):
            marks = [plan.get(seq_id, 0) for plan in plans]
            text += f"{seq_id:>3} " + "".join("P" if n > 1 else "d" if n else "·" for n in marks) + "\n"
        show(text)


REQUESTS = ((6, 4), (6, 24), (9, 6), (3, 20), (6, 5), (14, 18), (6, 4), (2, 8))
EASY, SHORT = RequestTrace(REQUESTS, 16, 4), RequestTrace(REQUESTS, 16, 4, num_blocks=12)
BUILDS = {
    "my_schedule": Build(
        "my_schedule",
        [
            Stage(
                "admit and run", [(RequestTrace(((3, 2),), 16, 4),), (RequestTrace(((3, 2), (4, 3)), 16, 4),)],
                "first those that run, then those that wait\nwhile the budget lasts, min(behind, budget) tokens each",
            ),
            Stage(
                "the budget and the width", [(EASY,), (RequestTrace(REQUESTS, 8, 3),), (RequestTrace(REQUESTS, 1, 8),)],
                "what happens to a prompt that is longer than the budget?\n"
                "a prompt takes what is left of the budget, and goes on in the next step",
            ),
            Stage(
                "too few blocks", [(SHORT,), (RequestTrace(REQUESTS[::-1], 8, 8, num_blocks=9),)],
                "which sequence gives way, and where does it wait?\n"
                "the last of `running` goes to the front of `waiting`, and begins again: num_computed = 0\n"
                "where it is the very sequence that you plan, stop there: it has no table any more, and no chunk",
            ),
        ],
        lambda case: _trail(_real_steps(case)), _trial, Scheduler, _draw,
    )
}  # fmt: skip
