"""What happened, in the past tense: one frozen record for each thing that a manager or the engine did.

A log is any function that takes an event, `list.append` for instance. Managers and the engine tell what
they did after they did it, and only if there is a log. replay.py rebuilds a manager's state from them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from functools import cache, lru_cache
from typing import Any, ClassVar, TextIO

Pairs = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Event:
    """Base of all events. Fields are ints, strings and tuples of them, so that JSON holds them exactly."""

    kinds: ClassVar[dict[str, type[Event]]] = {}

    def __init_subclass__(cls) -> None:
        Event.kinds[cls.__name__] = cls


Log = Callable[[Event], None]


# --- told by managers ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PoolOpened(Event):
    """A manager began, with nothing in it. Blocks will be handed out in `free_order`."""

    manager: str
    num_blocks: int  # slots, for a manager without blocks
    block_size: int
    num_host_blocks: int
    free_order: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SequenceAdmitted(Event):
    """A sequence began. Its first `length` tokens lie in `blocks`, found in the prefix cache."""

    seq_id: int
    blocks: tuple[int, ...]
    length: int


@dataclass(frozen=True, slots=True)
class TokensAppended(Event):
    """`count` more tokens of a sequence have a slot. `copied` is the (source, destination) of a copy on write,
    which came first; then came the new blocks. `evicted` are those of them that the prefix cache gave up."""

    seq_id: int
    count: int
    new_blocks: tuple[int, ...] = ()
    copied: tuple[int, ...] = ()
    evicted: tuple[int, ...] = ()


@lru_cache(maxsize=16384)  # more than will run at once: a round robin beyond its size would always miss
def tokens_appended(seq_id: int, count: int) -> TokensAppended:
    """The event of tokens that need no new block, as nearly all of them.

    Told again and again in the same words. An event never changes, so the log may hold one object many times:
    a frozen dataclass for each token would make recording half of a scheduling step (`bench memory`).
    """
    return TokensAppended(seq_id, count)


@dataclass(frozen=True, slots=True)
class SequenceForked(Event):
    """`child_id` began with the blocks of `parent_id`."""

    parent_id: int
    child_id: int


@dataclass(frozen=True, slots=True)
class BlockCached(Event):
    """The prefix cache knows the full block under `digest` (hexadecimal) from now on."""

    block_id: int
    digest: str


@dataclass(frozen=True, slots=True)
class SwappedOut(Event):
    """The sequences moved to host memory: pairs of (device block, host block), each once."""

    seq_ids: tuple[int, ...]
    blocks: Pairs


@dataclass(frozen=True, slots=True)
class SwappedIn(Event):
    """The sequences came back: pairs of (host block, device block). `evicted` as in TokensAppended."""

    seq_ids: tuple[int, ...]
    blocks: Pairs
    evicted: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class SequenceFreed(Event):
    """A sequence gave back all that it held, on the device or on the host."""

    seq_id: int


@dataclass(frozen=True, slots=True)
class RegionPlaced(Event):
    """A sequence's region begins at slot `start` and has `size` slots: reserved, grown in place, or moved."""

    seq_id: int
    start: int
    size: int


@dataclass(frozen=True, slots=True)
class RegionSwappedOut(Event):
    """A region of the device was given up for one on the host that begins at slot `start`."""

    seq_id: int
    start: int
    size: int


@dataclass(frozen=True, slots=True)
class RegionSwappedIn(Event):
    """A region of the host was given up for one on the device that begins at slot `start`."""

    seq_id: int
    start: int
    size: int


@dataclass(frozen=True, slots=True)
class ResidencyOpened(Event):
    """A residency began, with no pages: this many blocks of a page's size on either side."""

    num_device_blocks: int
    num_host_blocks: int


@dataclass(frozen=True, slots=True)
class PagesPlaced(Event):
    """Pages are new, or moved. Page `pages[i]` is now in `device_blocks[i]` and in `host_blocks[i]`, -1: not there."""

    pages: tuple[int, ...]
    device_blocks: tuple[int, ...]
    host_blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PagesFreed(Event):
    """Pages are gone, on the device and on the host."""

    pages: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PagesNamed(Event):
    """These pages hold the next blocks of a sequence, in one layer and for one KV head."""

    seq_id: int
    layer: int
    head: int
    pages: tuple[int, ...]


# --- told by the engine --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ModelOpened(Event):
    """The engine began, with this model. `kv_bytes_per_token` counts K and V over all layers."""

    model: str
    kv_bytes_per_token: int


@dataclass(frozen=True, slots=True)
class TokenNamed(Event):
    """What a token id looks like on screen. Told once, before the first event that holds the id."""

    token_id: int
    text: str


@dataclass(frozen=True, slots=True)
class RequestArrived(Event):
    """A request was accepted. Its samples are the sequences `seq_ids`."""

    request_id: int
    seq_ids: tuple[int, ...]
    prompt: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StepPlanned(Event):
    """The scheduler decided: pairs of (sequence, tokens to compute), and who had to make room.

    It comes after what the managers told while the step was planned.
    """

    step: int
    chunks: Pairs
    preempted: tuple[int, ...] = ()
    waiting: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class PagesAttended(Event):
    """What one query head of one layer attended to, for the last token of a sequence: the logical blocks that were
    chosen, those of them that were on the device, and the true share of each block of all, in millionths."""

    seq_id: int
    layer: int
    head: int  # of the query heads
    chosen: tuple[int, ...]
    resident: tuple[int, ...]
    mass: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TokenSampled(Event):
    """A sequence has one more token. Its K and V are not computed yet."""

    seq_id: int
    token_id: int


@dataclass(frozen=True, slots=True)
class StepTimed(Event):
    """A step is over, and took so long from its plan to its tokens. The only event that no two runs share."""

    step: int
    microseconds: int


@dataclass(frozen=True, slots=True)
class BeamsReordered(Event):
    """Beam search chose: pairs of (old sequence, sequence that goes on from it)."""

    chosen: Pairs


@dataclass(frozen=True, slots=True)
class SequenceFinished(Event):
    """A sequence came to its end, for the reason that the output names."""

    seq_id: int
    reason: str


# --- JSON lines ----------------------------------------------------------------------------------------


def to_json(event: Event) -> str:
    """One line, without its line break."""
    return json.dumps({"event": type(event).__name__, **asdict(event)}, separators=(",", ":"))


def from_json(line: str) -> Event:
    """The event of one line. Raises ValueError that says what is wrong with it."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from None
    name = record.pop("event", None) if isinstance(record, dict) else None
    kind = Event.kinds.get(name) if isinstance(name, str) else None
    if kind is None:
        raise ValueError(f"event is {name!r}; known are {', '.join(Event.kinds)}")
    known = _types_of(kind.__name__)
    for key, value in record.items():
        if key not in known:
            raise ValueError(f"{name} has no field {key!r}; known are {', '.join(known)}")
        if not _is_of(value, known[key]):
            raise ValueError(f"{key} of {name} is {value!r}; {known[key]} is needed")
    try:
        return kind(**{key: _frozen(value) for key, value in record.items()})
    except TypeError as error:
        raise ValueError(f"{name}: {error}") from None


def write_events(events: Iterable[Event], file: TextIO) -> None:
    """Events as JSON lines."""
    for event in events:
        file.write(to_json(event) + "\n")


def read_events(file: TextIO) -> Iterator[Event]:
    """Events of JSON lines, one after another. Raises ValueError with the number of the line that is wrong."""
    for number, line in enumerate(file, start=1):
        try:
            yield from_json(line.rstrip("\n"))  # else a place at the end is called a place in the next line
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from None


@cache
def _types_of(kind: str) -> dict[str, str]:
    """Field to its type, as it is written. Kept, since a log may have a hundred thousand lines."""
    return {field.name: str(field.type) for field in fields(Event.kinds[kind])}


def _is_of(value: Any, expected: str) -> bool:
    """Is this JSON value one of the field type `expected`? `type() is`, since a bool is an int to isinstance."""
    if expected == "tuple[int, ...]":
        return isinstance(value, list) and all(type(item) is int for item in value)
    if expected == "Pairs":
        return isinstance(value, list) and all(_is_of(pair, "tuple[int, ...]") and len(pair) == 2 for pair in value)
    return type(value).__name__ == expected


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value
