"""From events back to where each page is: the part of replay.py for sequences longer than the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..beyond_device.streaming import StreamingManager
from .events import Event, PagesFreed, PagesNamed, PagesPlaced, ResidencyOpened, SequenceFreed

Place = tuple[int, int]  # device block, host block; -1: not there


@dataclass(slots=True)
class PageState:
    """Pages, their places, and whose they are."""

    num_device_blocks: int = 0
    num_host_blocks: int = 0
    places: dict[int, Place] = field(default_factory=dict)  # by page
    tables: dict[tuple[int, int, int], list[int]] = field(default_factory=dict)  # (sequence, layer, KV head) -> pages

    def copy(self) -> PageState:
        tables = {key: pages.copy() for key, pages in self.tables.items()}
        return PageState(self.num_device_blocks, self.num_host_blocks, self.places.copy(), tables)

    @classmethod
    def of(cls, manager: StreamingManager) -> PageState:
        """The same, read off a manager."""
        residency = manager.residency
        tables = {
            (seq_id, layer, head): list(pages)
            for seq_id, table in manager.tables.items()
            for layer, heads in enumerate(table.pages)
            for head, pages in enumerate(heads)
            if pages
        }
        places = {p: (residency.device_of[p], residency.host_of[p]) for pages in tables.values() for p in pages}
        return cls(residency.device.num_blocks, residency.host.num_blocks, places, tables)


def _opened(state: PageState, event: ResidencyOpened) -> None:
    state.num_device_blocks, state.num_host_blocks = event.num_device_blocks, event.num_host_blocks


def _placed(state: PageState, event: PagesPlaced) -> None:
    """All leave their old places before one comes to its new one."""
    for page in event.pages:
        state.places.pop(page, None)
    new = {page: (d, h) for page, d, h in zip(event.pages, event.device_blocks, event.host_blocks, strict=True)}
    for side, total in ((0, state.num_device_blocks), (1, state.num_host_blocks)):
        coming = [place[side] for place in new.values() if place[side] >= 0]
        if any(block >= total for block in coming):
            raise ValueError(f"block {max(coming)} is not among the {total}")
        taken = {place[side] for place in state.places.values()} if coming else set()
        twice = [block for i, block in enumerate(coming) if block in taken or block in coming[:i]]
        if twice:
            raise ValueError(f"{('device', 'host')[side]} block {twice[0]} has two pages")
    state.places.update(new)


def _freed(state: PageState, event: PagesFreed) -> None:
    for page in event.pages:
        del state.places[page]


def _named(state: PageState, event: PagesNamed) -> None:
    state.tables.setdefault((event.seq_id, event.layer, event.head), []).extend(event.pages)


def _ended(state: PageState, event: SequenceFreed) -> None:
    for key in [key for key in state.tables if key[0] == event.seq_id]:
        del state.tables[key]


_CHANGES: dict[type[Event], Callable[[PageState, Any], None]] = {
    ResidencyOpened: _opened,
    PagesPlaced: _placed,
    PagesFreed: _freed,
    PagesNamed: _named,
    SequenceFreed: _ended,
}


def apply_to_pages(state: PageState, event: Event) -> None:
    """Advance `state` by one event. Raises ValueError or KeyError where it contradicts what came before."""
    change = _CHANGES.get(type(event))
    if change is not None:
        change(state, event)
