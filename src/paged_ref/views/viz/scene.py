"""One moment of a run, as the viewer looks at it, and what frames ask of it: names, colours, owners, texts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ...timeline.history import History, Moment
from ..common.canvas import COLOURS, size_of


@dataclass(frozen=True, slots=True)
class Scene:
    """What is to be drawn, and how the viewer looks at it."""

    moment: Moment
    runs: Sequence[History] = ()  # all that are there to compare; this one among them
    selected: int | None = None  # a sequence
    scroll: int = 0  # lines that the list of the frame is moved down
    hints: bool = True  # show the keys
    playing: bool = False
    message: str = ""  # in place of the keys

    @property
    def history(self) -> History:
        return self.moment.history

    @property
    def run(self) -> int:
        """The place of this run among `runs`."""
        return next((i for i, run in enumerate(self.runs) if run is self.history), 0)


def prose(history: History, tokens: Iterable[int]) -> str:
    """The tokens as running text."""
    return "".join(map(history.text, tokens)).replace("·", " ").strip()


def kv_size(history: History, tokens: int) -> str:
    """`, 12,288 bytes`: what so many tokens keep, where the log says it."""
    return f", {size_of(tokens * history.bytes_per_token)}" if history.bytes_per_token else ""


def colour(moment: Moment, seq_id: int) -> str:
    """The colour of the sequence's request."""
    view = moment.state.sequences.get(seq_id)
    number = seq_id if view is None or view.request_id < 0 else view.request_id
    return COLOURS[number % len(COLOURS)]


_ORDER = ("running", "swapped", "waiting", "finished")


def in_order(moment: Moment, finished: bool = False) -> list[int]:
    """The sequences, those that run first; on request the finished ones, too, last."""
    views = [v for v in moment.state.sequences.values() if finished or v.status != "finished"]
    return [view.seq_id for view in sorted(views, key=lambda v: (_ORDER.index(v.status), v.seq_id))]


def owners(moment: Moment, on_host: bool = False) -> dict[int, list[int]]:
    """Block to the sequences whose tables have it, in one of the pools."""
    found: dict[int, list[int]] = {}
    for seq_id, place in sorted(moment.state.memory.sequences.items()):
        if place.on_host == on_host:
            for block_id in place.blocks:
                found.setdefault(block_id, []).append(seq_id)
    return found
