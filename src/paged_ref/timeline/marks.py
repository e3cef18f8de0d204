"""Which events of a run are worth a look: a letter for each kind."""

from __future__ import annotations

from . import events
from .state import RunState

MARKS = {
    "F": "fork",
    "C": "copy on write",
    "H": "prefix hit",
    "E": "eviction",
    "S": "swap out",
    "R": "return",
    "X": "preempted by recompute",
    "A": "attention watched",
    "B": "beams",
    "N": "end of a sequence",
}
_MARK_OF = {
    events.SequenceForked: "F",
    events.SwappedOut: "S",
    events.RegionSwappedOut: "S",
    events.RegionSwappedIn: "R",
    events.BeamsReordered: "B",
    events.SequenceFinished: "N",
    events.PagesAttended: "A",
}


def marks_of(event: events.Event, state: RunState) -> str:
    """The letters of an event; none for most events. `state` has followed it already."""
    if isinstance(event, events.TokensAppended):
        return "C" * bool(event.copied) + "E" * bool(event.evicted)
    if isinstance(event, events.SwappedIn):
        return "R" + "E" * bool(event.evicted)
    if isinstance(event, events.SequenceAdmitted):
        return "H" * bool(event.blocks)
    if isinstance(event, events.StepPlanned):
        return "X" * any(state.sequences[seq_id].status == "waiting" for seq_id in event.preempted)
    return _MARK_OF.get(type(event), "")
