"""What each step did, handed to a function: `LLM(on_step=...)`."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from ..core.device import synchronize
from ..core.engine.engine import Observer
from ..core.engine.outputs import TokenOutput
from ..core.engine.scheduler import Scheduler, StepPlan
from ..core.memory.manager import Transfer
from ..core.memory.usage import Snapshot
from ..core.model.llama import StepInputs


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One step."""

    chunks: list[tuple[int, int]]  # (seq_id, tokens computed)
    num_preempted: int
    transfers: list[Transfer]
    num_running: int
    num_waiting: int
    snapshot: Snapshot
    seconds: float  # from the end of planning to the tokens


class StepRecords(Observer):
    """Calls `on_step` with a StepRecord after each step."""

    def __init__(self, scheduler: Scheduler, on_step: Callable[[StepRecord], None]) -> None:
        self.scheduler = scheduler
        self.on_step = on_step
        self._record: StepRecord | None = None
        self._began = 0.0

    def before_step(self, plan: StepPlan, inputs: StepInputs) -> None:
        self._began = time.perf_counter()
        waiting = self.scheduler.waiting
        leader = waiting[0].leader if waiting else None
        self._record = StepRecord(
            chunks=[(seq.seq_id, num_tokens) for seq, num_tokens in plan.chunks],
            num_preempted=len(plan.preempted),
            transfers=plan.transfers,
            num_running=sum(len(group.seqs) for group in self.scheduler.running),
            num_waiting=sum(len(group.seqs) for group in waiting),
            snapshot=self.scheduler.manager.snapshot((len(leader.tokens), leader.max_slots) if leader else None),
            seconds=0.0,
        )

    def after_step(self, plan: StepPlan, tokens: list[TokenOutput]) -> None:
        synchronize()
        if self._record is not None:
            self.on_step(replace(self._record, seconds=time.perf_counter() - self._began))
