"""What each sequence does in each step of a run: the rows of the timeline."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict

from .events import StepPlanned
from .state import RunState


class Spans:
    """A code for each sequence and step: P prefill, R prefill again, d decode, - nothing, w waits, x preempted by
    recompute, S by swap, s is swapped out, F has finished, blank before and after."""

    def __init__(self) -> None:
        self._of: defaultdict[int, list[tuple[int, str]]] = defaultdict(list)  # of sequences: (first step, code)
        self._num_steps = 0

    def codes(self) -> set[str]:
        """All codes that occur."""
        return {code for spans in self._of.values() for _, code in spans}

    def code_at(self, seq_id: int, step: int) -> str:
        spans = self._of.get(seq_id, [])
        i = bisect_right(spans, (step, "~")) - 1
        return spans[i][1] if i >= 0 else " "

    def begin(self, seq_id: int, step: int, code: str) -> None:
        """From this step on, until the next span, the sequence has this code."""
        spans = self._of[seq_id]
        while spans and spans[-1][0] >= step:
            spans.pop()
        if not spans or spans[-1][1] != code:
            spans.append((step, code))

    def plan(self, event: StepPlanned, state: RunState) -> None:
        """The next step is planned so; `state` is that after the plan."""
        step, self._num_steps = self._num_steps, self._num_steps + 1
        computing = dict(event.chunks)
        for seq_id, count in event.chunks:
            self.begin(seq_id, step, _code_of_chunk(seq_id, count, state))
        for seq_id in event.preempted:
            swapped = state.sequences[seq_id].status == "swapped"
            self.begin(seq_id, step, "S" if swapped else "x")
            self.begin(seq_id, step + 1, "s" if swapped else "w")
        for seq_id in set(event.waiting).difference(event.preempted):
            self.begin(seq_id, step, "s" if state.sequences[seq_id].status == "swapped" else "w")
        for seq_id, place in state.memory.sequences.items():
            if not place.on_host and seq_id not in computing:
                self.begin(seq_id, step, "-")


def _code_of_chunk(seq_id: int, count: int, state: RunState) -> str:
    """What a sequence does that computes `count` tokens: P, R or d."""
    view, length = state.sequences[seq_id], state.memory.sequences[seq_id].length
    if len(view.tokens) <= view.prompt_len:
        return "P"
    return "d" if count == 1 and length == len(view.tokens) else "R"
