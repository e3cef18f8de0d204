"""What happened, in the past tense: one frozen record for each thing that a manager or the engine did.

A log is any function that takes an event, `list.append` for instance. An event says what happened, with all that was
decided; state.py follows the events, and decides nothing.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Callable, Iterable
from typing import TextIO, Union

import msgspec

from ..extras.reading import MOST_DIGITS, parse_json

Pairs = tuple[tuple[int, int], ...]


class Event(msgspec.Struct, frozen=True, gc=False, tag=True, tag_field="event", forbid_unknown_fields=True):
    """Base of all events. Fields are ints, strings and tuples of them, so that JSON holds them exactly."""


Log = Callable[[Event], None]


# --- logged for managers (logged.py) ------------------------------------------------------------------


class PoolOpened(Event, frozen=True):
    """A manager began, with nothing in it. Blocks will be handed out in `free_order`. The first event of a run, so it
    says the version of the log."""

    manager: str
    num_blocks: int  # slots, for a manager without blocks
    block_size: int
    num_host_blocks: int
    free_order: tuple[int, ...]
    version: int = 1  # also of the logs that were written before there was a version


class SequenceAdmitted(Event, frozen=True):
    """A sequence began. Its first `length` tokens lie in `blocks`, found in the prefix cache."""

    seq_id: int
    blocks: tuple[int, ...]
    length: int


class TokensAppended(Event, frozen=True):
    """`count` more tokens of a sequence have a slot. `copied` is the (source, destination) of a copy on write, made
    before the new blocks were added. `evicted`: blocks that the prefix cache gave up, and that were taken here, or that
    a sequence that was truncated fills again."""

    seq_id: int
    count: int
    new_blocks: tuple[int, ...] = ()
    copied: tuple[int, ...] = ()
    evicted: tuple[int, ...] = ()


class SequenceTruncated(Event, frozen=True):
    """A sequence keeps its first `length` tokens, and gives back the blocks that held only others, the last one
    first."""

    seq_id: int
    length: int


class SequenceForked(Event, frozen=True):
    """`child_id` began with the blocks of `parent_id`."""

    parent_id: int
    child_id: int


class BlockCached(Event, frozen=True):
    """The prefix cache knows the full block under `digest` (hexadecimal) from now on."""

    block_id: int
    digest: str


class SwappedOut(Event, frozen=True):
    """The sequences moved to host memory: pairs of (device block, host block), each once."""

    seq_ids: tuple[int, ...]
    blocks: Pairs


class SwappedIn(Event, frozen=True):
    """The sequences came back: pairs of (host block, device block), each once. `evicted` as in TokensAppended."""

    seq_ids: tuple[int, ...]
    blocks: Pairs
    evicted: tuple[int, ...] = ()


class SequenceFreed(Event, frozen=True):
    """A sequence gave back all that it held, on the device or on the host."""

    seq_id: int


class PoolCleared(Event, frozen=True):
    """An exception ended a step, which was undone: no sequence holds memory, the prefix cache knows nothing, and all
    blocks are free in this order. What sequences got since StepPlanned, unless StepTimed came, they do not have."""

    free_order: tuple[int, ...]


class RegionPlaced(Event, frozen=True):
    """A sequence's region begins at slot `start` and has `size` slots: reserved, grown in place, or moved."""

    seq_id: int
    start: int
    size: int


class RegionSwappedOut(Event, frozen=True):
    """A region of the device was given up for one on the host that begins at slot `start`."""

    seq_id: int
    start: int
    size: int


class RegionSwappedIn(Event, frozen=True):
    """A region of the host was given up for one on the device that begins at slot `start`."""

    seq_id: int
    start: int
    size: int


class ResidencyOpened(Event, frozen=True):
    """Memory for pages opened, with no page in it. A block has the size of a page."""

    num_device_blocks: int
    num_host_blocks: int


class PagesPlaced(Event, frozen=True):
    """Pages are new, or moved. Page `pages[i]` is now in `device_blocks[i]` and in `host_blocks[i]`, -1: not there."""

    pages: tuple[int, ...]
    device_blocks: tuple[int, ...]
    host_blocks: tuple[int, ...]


class PagesFreed(Event, frozen=True):
    """Pages are gone, on the device and on the host."""

    pages: tuple[int, ...]


class PagesNamed(Event, frozen=True):
    """These pages hold the next blocks of a sequence, in one layer and for one KV head."""

    seq_id: int
    layer: int
    head: int
    pages: tuple[int, ...]


# --- logged for the engine (logged.py), and by memory whose pages stream -------------------------------


class ModelOpened(Event, frozen=True):
    """The engine began, with this model. `kv_bytes_per_token` counts K and V over all layers."""

    model: str
    kv_bytes_per_token: int


class RanksOpened(Event, frozen=True):
    """Several ranks share the model, and each has a pool of the blocks that PoolOpened counts. Rank i holds the query
    heads from `heads[i][0]` up to `heads[i][1]`, which is the next rank's, and K and V of the KV heads `kv_heads[i]`.
    Fewer KV heads than ranks: some ranks hold the same."""

    heads: Pairs
    kv_heads: Pairs


class TokenNamed(Event, frozen=True):
    """What a token id looks like on screen. Logged once, before the first event that holds the id."""

    token_id: int
    text: str


class RequestArrived(Event, frozen=True):
    """A request was accepted. Its samples are the sequences `seq_ids`."""

    request_id: int
    seq_ids: tuple[int, ...]
    prompt: tuple[int, ...]


class StepPlanned(Event, frozen=True):
    """The scheduler decided: pairs of (sequence, tokens to compute), and the sequences that had to make room.

    The events of the manager for this step come before.
    """

    step: int
    chunks: Pairs
    preempted: tuple[int, ...] = ()
    waiting: tuple[int, ...] = ()


class PagesAttended(Event, frozen=True):
    """What one query head of one layer attended to, for the last token of a sequence: the logical blocks that were
    chosen, those of them that were on the device, and the true share of each block of all, in millionths."""

    seq_id: int
    layer: int
    head: int  # of the query heads
    chosen: tuple[int, ...]
    resident: tuple[int, ...]
    mass: tuple[int, ...]


class TokenSampled(Event, frozen=True):
    """A sequence has one more token. Its K and V are not computed yet."""

    seq_id: int
    token_id: int


class StepTimed(Event, frozen=True):
    """A step is over, and took this long from its plan to its tokens. The only event that no two runs share."""

    step: int
    microseconds: int


class BeamsReordered(Event, frozen=True):
    """Beam search chose: pairs of (old sequence, sequence that goes on from it)."""

    chosen: Pairs


class SequenceFinished(Event, frozen=True):
    """A sequence came to its end, for the reason that the output names."""

    seq_id: int
    reason: str


# --- about events --------------------------------------------------------------------------------------


def sequences_of(event: Event) -> tuple[int, ...]:
    """The sequences that an event is about."""
    if isinstance(event, SequenceForked):
        return (event.parent_id, event.child_id)
    if isinstance(event, StepPlanned):
        return tuple(seq_id for seq_id, _ in event.chunks)
    if isinstance(event, BeamsReordered):
        return tuple(dict.fromkeys(seq_id for _, seq_id in event.chosen))
    seq_id: int | None = getattr(event, "seq_id", None)
    seq_ids: tuple[int, ...] = getattr(event, "seq_ids", ())
    return seq_ids if seq_id is None else (seq_id,)


# --- JSON lines ----------------------------------------------------------------------------------------

KINDS: dict[str, type[Event]] = {kind.__name__: kind for kind in Event.__subclasses__()}
_ENCODER = msgspec.json.Encoder()
_DECODER: msgspec.json.Decoder[Event] = msgspec.json.Decoder(Union[tuple(KINDS.values())])  # noqa: UP007
_LONG_NUMBER = re.compile(rf"\d{{{MOST_DIGITS + 1}}}")
_VERSION = 1  # a change that a reader of older logs must know of makes the next one


def to_json(event: Event) -> str:
    """One line, without its line break."""
    return _ENCODER.encode(event).decode("utf-8")


def from_json(line: str) -> Event:
    """The event of one line. Raises ValueError that says what is wrong with the line."""
    if _LONG_NUMBER.search(line):
        parse_json(line)  # refuses a number of more than 64 bits, which would come back as an integer of any length
    try:
        event = _DECODER.decode(line)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise ValueError(_what_is_wrong(line) or str(error)) from None
    if isinstance(event, PoolOpened):
        _require_version(event.version)
    return event


def _require_version(version: object) -> None:
    if type(version) is int and version != _VERSION:
        raise ValueError(f"the log has version {reprlib.repr(version)}; this program reads {_VERSION}")


def _what_is_wrong(line: str) -> str:
    """A sentence about a line that is no event, with the field, its value and what is known or needed. Raises
    ValueError with that sentence for what is no JSON."""
    record = parse_json(line)
    name = record.pop("event", None) if isinstance(record, dict) else None
    if not isinstance(name, str) or name not in KINDS:
        return f"event is {reprlib.repr(name)}; known are {', '.join(KINDS)}"
    if name == "PoolOpened":
        _require_version(record.get("version"))  # before a field that this program does not know yet
    fields = {field.name: field for field in msgspec.structs.fields(KINDS[name])}
    for key, value in record.items():
        if key not in fields:
            return f"{name} has no field {reprlib.repr(key)}; known are {', '.join(fields)}"
        try:
            msgspec.convert(value, fields[key].type)
        except msgspec.ValidationError:
            return f"{key} of {name} is {reprlib.repr(value)}; {_NEEDED[fields[key].type]} is needed"
    missing = [repr(key) for key, field in fields.items() if field.required and key not in record]
    return f"{name}: missing field {', '.join(missing)}" if missing else ""


_NEEDED = {int: "int", str: "str", tuple[int, ...]: "an array of ints", Pairs: "an array of pairs of ints"}


def write_events(events: Iterable[Event], file: TextIO) -> None:
    """Events as JSON lines."""
    for event in events:
        file.write(to_json(event) + "\n")
