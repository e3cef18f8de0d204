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
from ...core.engine.engine import Engine
from ...core.engine.scheduler import Scheduler
from ...core.memory.manager import KVCacheManager
from ...core.memory.standard import StandardManager
from ...distributed.split import Part
from ...extras.beam import BeamSearch
from ...extras.host_swap import SwappablePagedManager
from ...extras.prefix_cache import CachingBlockPool
from ...extras.swapping import SwappingManager
from ...llm import LLM
from ...timeline import events
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
    if isinstance(event, events.SequenceFreed) and not ended(moment):
        return Scheduler.schedule  # it preempted the sequence
    if isinstance(event, (events.TokensAppended, events.SwappedIn)) and event.evicted:
        return CachingBlockPool.allocate
    done_by = DONE_BY.get(type(event), Engine.step)
    if isinstance(event, events.RegionPlaced) and moment.change.place_before is not None:
        done_by = "append"  # the region grew
    manager = MANAGERS.get(moment.state.memory.manager, SwappablePagedManager)
    function: Function = getattr(manager, done_by) if isinstance(done_by, str) else done_by
    return function


def ended(moment: Moment) -> bool:
    """A sequence gave its memory back because it came to its end: then the next event says so."""
    following, event = moment.next_event, moment.event
    if not isinstance(event, events.SequenceFreed) or following is None:
        return True
    return isinstance(following, events.SequenceFinished) and following.seq_id == event.seq_id


MANAGERS: dict[str, type[KVCacheManager]] = {
    "paged": SwappablePagedManager,
    "standard": StandardManager,
    "swapping": SwappingManager,
    "streaming": StreamingManager,
}
DONE_BY: dict[type[events.Event], Function | str] = {  # a name: the method of the run's manager
    events.PoolOpened: "__init__",
    events.SequenceAdmitted: "admit",
    events.RegionPlaced: "admit",
    events.TokensAppended: "append",
    events.SequenceTruncated: "truncate",
    events.SequenceForked: "fork",
    events.SequenceFreed: "free",
    events.PoolCleared: "clear",
    events.SwappedOut: "swap_out",
    events.SwappedIn: "swap_in",
    events.RegionSwappedOut: "swap_out",
    events.RegionSwappedIn: "swap_in",
    events.PagesNamed: "prepare",
    events.RanksOpened: Part.__init__,
    events.RequestArrived: LLM.add_request,
    events.BlockCached: CachingBlockPool.filled,
    events.StepPlanned: Scheduler.schedule,
    events.BeamsReordered: BeamSearch.step,
    events.ResidencyOpened: Residency.__init__,
    events.PagesPlaced: Residency.need,
    events.PagesFreed: Residency.free,
    events.PagesAttended: StreamedKV.attend,
    events.TokenSampled: Engine.add_token,
    events.SequenceFinished: Engine.end_sequence,
}
