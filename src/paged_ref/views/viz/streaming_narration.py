"""The sentences for runs whose pages stream in and out (`paged-ref long`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...core.checks import plural
from ...timeline import events
from ...timeline.history import Moment
from ..common.canvas import in_words


def _opened(moment: Moment, event: events.PoolOpened) -> str:
    return (
        f"Memory for pages opened. A page is the K and V of {plural(event.block_size, 'token')} in one layer, for one "
        f"KV head; there is room for {plural(event.num_blocks, 'page')} on the device and {event.num_host_blocks:,} on "
        "the host."
    )


def _named(moment: Moment, event: events.PagesNamed) -> str:
    pages = moment.state.memory.pages.tables[event.seq_id, event.layer, event.head]
    first = len(pages) - len(event.pages)
    blocks = f"block {first}" if len(event.pages) == 1 else f"blocks {first} to {len(pages) - 1}"
    return (
        f"In layer {event.layer}, KV head {event.head}, {blocks} of {moment.history.name(event.seq_id)} "
        f"{'has its page' if len(event.pages) == 1 else 'have their pages'}, about to be written."
    )


def _placed(moment: Moment, event: events.PagesPlaced) -> str:
    parts = [
        ("on the device only", sum(d >= 0 > h for d, h in zip(event.device_blocks, event.host_blocks, strict=True))),
        ("on both sides", sum(d >= 0 <= h for d, h in zip(event.device_blocks, event.host_blocks, strict=True))),
        ("on the host only", sum(d < 0 for d in event.device_blocks)),
    ]
    places = in_words([f"{number:,} {where}" for where, number in parts if number])
    return f"{plural(len(event.pages), 'page')} came or moved: now {places}. The policy chooses what leaves the device."


def _attended(moment: Moment, event: events.PagesAttended) -> str:
    chosen, total = len(event.chosen), len(event.mass)
    covered = sum(event.mass[block] for block in event.chosen) / 1e4
    here = len(set(event.chosen) & set(event.resident))
    what = "all" if chosen == total else f"{chosen} of the"
    return (
        f"Layer {event.layer}, query head {event.head} of {moment.history.name(event.seq_id)} reads {what} {total:,} "
        f"pages, which hold {covered:.1f}% of its attention. {here:,} of them were on the device already."
    )


def _name(moment: Moment, event: Any) -> str:
    return moment.history.name(event.seq_id)


OF_PAGES: dict[type[events.Event], Callable[[Moment, Any], str]] = {
    events.PoolOpened: _opened,
    events.ResidencyOpened: lambda moment, event: (
        "No page is anywhere yet. A page will be on the device, on the host, or the same on both."
    ),
    events.SequenceAdmitted: lambda moment, event: (
        f"{_name(moment, event)} begins, without a page. Each layer makes its own when it writes."
    ),
    events.TokensAppended: lambda moment, event: (
        f"{_name(moment, event)} has room for {plural(event.count, 'token')} more, "
        f"{moment.state.memory.sequences[event.seq_id].length:,} in all, on the device and the host."
    ),
    events.PagesNamed: _named,
    events.PagesPlaced: _placed,
    events.PagesFreed: lambda moment, event: (
        f"{plural(len(event.pages), 'page')} are gone, on the device and on the host."
    ),
    events.SequenceFreed: lambda moment, event: (
        f"{_name(moment, event)} holds no page any more, on the device or on the host."
    ),
    events.PagesAttended: _attended,
}
