"""Which function of this package did what an event tells: file and line, read from the living code."""

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
from ...extras.prefix_cache import PrefixCache
from ...llm import LLM
from ...timeline.events import (
    BeamsReordered,
    BlockCached,
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
    TokenSampled,
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


def actor(moment: Moment) -> Function:
    """The function that did what the event of this moment tells."""
    event = moment.event
    manager = _MANAGERS.get(moment.state.memory.manager, PagedManager)
    if isinstance(event, SequenceFreed):
        return manager.free if ended(moment) else Scheduler._preempt
    if isinstance(event, TokensAppended) and event.copied:
        return PagedManager._copy_on_write
    if isinstance(event, TokensAppended) and event.evicted:
        return PrefixCache.evict
    if isinstance(event, RegionPlaced) and moment.change.place_before is not None:
        return SwappingManager._make_room
    if isinstance(event, SequenceAdmitted) and manager is StreamingManager:
        return StreamingManager.admit
    named = _BY_MANAGER.get(type(event))
    if named is not None:
        function: Function = getattr(manager, named)
        return function
    return _ALWAYS.get(type(event), LLM.step)


def ended(moment: Moment) -> bool:
    """A sequence gave its memory back because it came to its end: the engine says so in the next event."""
    following, event = moment.next_event, moment.event
    if not isinstance(event, SequenceFreed) or following is None:
        return True
    return isinstance(following, SequenceFinished) and following.seq_id == event.seq_id


_MANAGERS: dict[str, type[PagedManager | StandardManager | SwappingManager | StreamingManager]] = {
    "paged": PagedManager,
    "standard": StandardManager,
    "swapping": SwappingManager,
    "streaming": StreamingManager,
}
_BY_MANAGER: dict[type, str] = {PoolOpened: "__init__", TokensAppended: "append", RegionPlaced: "admit"}
_ALWAYS: dict[type, Function] = {
    RequestArrived: LLM.add_request,
    SequenceAdmitted: PagedManager.admit,
    SequenceForked: PagedManager.fork,
    BlockCached: PagedManager.commit,
    SwappedOut: PagedManager.swap_out,
    SwappedIn: PagedManager.swap_in,
    RegionSwappedOut: SwappingManager.swap_out,
    RegionSwappedIn: SwappingManager.swap_in,
    ResidencyOpened: Residency.__init__,
    PagesPlaced: Residency.need,
    PagesFreed: Residency.free,
    PagesNamed: StreamingManager.prepare,
    PagesAttended: StreamedKV._select,
    StepPlanned: Scheduler.schedule,
    TokenSampled: LLM._accept,
    BeamsReordered: BeamSearch.step,
    SequenceFinished: LLM._end_sequence,
}
