"""Which function of this package did what an event says: file, line and source, read from the code that runs.

Functions are named here by their public names: what they call to do their work may change.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import paged_ref

from ...beyond_device.kv import StreamedKV
from ...beyond_device.residency import Residency
from ...beyond_device.streaming import StreamingManager
from ...core.engine.scheduler import Scheduler
from ...core.memory.paged import PagedManager
from ...core.memory.standard import StandardManager
from ...core.memory.swapping import SwappingManager
from ...extras.beam import BeamSearch
from ...llm import LLM
from ...timeline.events import (
    BeamsReordered,
    BlockCached,
    Event,
    PagesAttended,
    PagesFreed,
    PagesNamed,
    PagesPlaced,
    PoolOpened,
    RegionPlaced,
    RegionSwappedIn,
    RegionSwappedOut,
    RequestArrived,
    ResidencyOpened,
    SequenceAdmitted,
    SequenceFinished,
    SequenceForked,
    SequenceFreed,
    StepPlanned,
    SwappedIn,
    SwappedOut,
    TokensAppended,
)
from ...timeline.history import Moment

Function = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Place:
    """A function in the source: `file` from the package's own directory on."""

    file: str
    line: int
    name: str
    source: tuple[str, ...]  # dedented lines


@cache
def place_of(function: Function) -> Place:
    file = inspect.getsourcefile(function)
    source, first = inspect.getsourcelines(function)
    root = Path(paged_ref.__file__).parent.parent
    shown = Path(file or "").relative_to(root).as_posix()
    lines = textwrap.dedent("".join(source)).splitlines()
    return Place(shown, first, function.__qualname__, tuple(lines))


def function_for_event(moment: Moment) -> Function:
    """The function that did what the event of this moment says."""
    event = moment.event
    if isinstance(event, SequenceFreed) and not ended(moment):
        return Scheduler.schedule  # it preempted the sequence
    name = METHODS.get(type(event))
    if isinstance(event, RegionPlaced) and moment.change.place_before is not None:
        name = "append"  # the region grew
    if name is None:
        return FUNCTIONS.get(type(event), LLM.step)
    function: Function = getattr(MANAGERS.get(moment.state.memory.manager, PagedManager), name)
    return function


def ended(moment: Moment) -> bool:
    """A sequence gave its memory back because it came to its end: then the next event says so."""
    following, event = moment.next_event, moment.event
    if not isinstance(event, SequenceFreed) or following is None:
        return True
    return isinstance(following, SequenceFinished) and following.seq_id == event.seq_id


MANAGERS: dict[str, type[PagedManager | StandardManager | SwappingManager | StreamingManager]] = {
    "paged": PagedManager,
    "standard": StandardManager,
    "swapping": SwappingManager,
    "streaming": StreamingManager,
}
METHODS: dict[type[Event], str] = {  # of the manager of the run
    PoolOpened: "__init__",
    SequenceAdmitted: "admit",
    RegionPlaced: "admit",
    TokensAppended: "append",
    SequenceForked: "fork",
    BlockCached: "commit",
    SequenceFreed: "free",
    SwappedOut: "swap_out",
    SwappedIn: "swap_in",
    RegionSwappedOut: "swap_out",
    RegionSwappedIn: "swap_in",
    PagesNamed: "prepare",
}
FUNCTIONS: dict[type[Event], Function] = {  # of the engine, and of the memory for pages; LLM.step for all others
    RequestArrived: LLM.add_request,
    StepPlanned: Scheduler.schedule,
    BeamsReordered: BeamSearch.step,
    ResidencyOpened: Residency.__init__,
    PagesPlaced: Residency.need,
    PagesFreed: Residency.free,
    PagesAttended: StreamedKV.attend,
}
