"""One or two sentences for each event: what happened, and why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...core.checks import plural
from ...timeline import events
from ...timeline.history import Moment
from ..common.canvas import in_words
from .frames.ranks import listed
from .scene import kv_size, prose
from .source_links import ended
from .streaming_narration import OF_PAGES

_REASONS = {
    "length": "it has the number of tokens that was asked for",
    "stop": "its last token, or its text, ends the output",
    "abort": "the caller stopped it",
    "error": "a hook of the caller raised an exception",
    "beam dropped": "other beams are likelier",
    "beam search ended": "the search has its results",
}


def narrate(moment: Moment) -> str:
    """What the event of this moment did, and why."""
    streaming = moment.state.memory.manager == "streaming"
    sentences = {**_SENTENCES, **OF_PAGES} if streaming else _SENTENCES
    sentence = sentences.get(type(moment.event))
    return sentence(moment, moment.event) if sentence else type(moment.event).__name__


def address(moment: Moment, selected: int | None = None) -> str:
    """Where the newest token of the sequence lies that is selected, or that the event gave a slot: the arithmetic."""
    memory, change = moment.state.memory, moment.change
    seq_id = selected if selected is not None else change.seq_ids[0] if change.written else None
    place = None if seq_id is None else memory.sequences.get(seq_id)
    if seq_id is None or place is None or not place.length or place.on_host:
        return ""
    position = change.written[-1] if change.written and change.seq_ids[0] == seq_id else place.length - 1
    name, size = moment.history.name(seq_id), memory.block_size
    if not place.blocks:
        return f"Token {position} of {name}: start {place.start} + {position} = slot {place.start + position}."
    logical, offset = divmod(position, size)
    block = place.blocks[logical]
    return (
        f"Token {position} of {name}: {position} // {size} = {logical}, table[{logical}] = {block}, "
        f"{block} × {size} + {offset} = slot {block * size + offset}."
    )


def _names(moment: Moment, seq_ids: tuple[int, ...]) -> str:
    return in_words([moment.history.name(seq_id) for seq_id in seq_ids])


def _blocks(blocks: tuple[int, ...]) -> str:
    """`block 3`, `blocks 3 and 5`, `blocks 3, 5, 8 and 20 more`."""
    shown = list(map(str, blocks)) if len(blocks) <= 5 else [*map(str, blocks[:4]), f"{len(blocks) - 4} more"]
    return ("block " if len(blocks) == 1 else "blocks ") + in_words(shown)


def _gave_up(evicted: tuple[int, ...]) -> str:
    return f" No block was free: the prefix cache gave up {_blocks(evicted)}, used longest ago." if evicted else ""


# --- one function for each event ------------------------------------------------------------------------


def _pool_opened(moment: Moment, event: events.PoolOpened) -> str:
    if event.free_order:
        first = ", ".join(map(str, event.free_order[:3]))
        return (
            f"The KV cache opened: {plural(event.num_blocks, 'block')} of {plural(event.block_size, 'slot')}"
            f"{kv_size(moment.history, event.block_size)} each. All blocks are free, to be handed out in this order: "
            f"{first} …"
        )
    piece = f"one piece of {plural(event.num_blocks, 'slot')}"
    return f"The KV cache opened: {piece}, all free. Each sequence gets a region."


def _ranks(moment: Moment, event: events.RanksOpened) -> str:
    held = [
        f"rank {rank} holds {listed(heads, 'head')} with {listed(kv_heads, 'KV head')}"
        for rank, (heads, kv_heads) in enumerate(zip(event.heads, event.kv_heads, strict=True))
    ]
    return (
        f"{plural(len(event.heads), 'rank')} share the model: {in_words(held)}. Each has a pool with the same blocks, "
        "and one block table says for all of them where a token lies."
    )


def _arrived(moment: Moment, event: events.RequestArrived) -> str:
    samples = f" for {len(event.seq_ids)} samples" if len(event.seq_ids) > 1 else ""
    text = prose(moment.history, event.prompt[:12]) + (" …" if len(event.prompt) > 12 else "")
    return (
        f"{_names(moment, event.seq_ids)} arrived: “{text}”, {plural(len(event.prompt), 'token')}{samples}. "
        "The request waits for the next step."
    )


def _admitted(moment: Moment, event: events.SequenceAdmitted) -> str:
    name, total = moment.history.name(event.seq_id), len(moment.state.sequences[event.seq_id].tokens)
    if not event.blocks:
        return f"{name} begins with an empty block table: no block of its prompt is known."
    left = (
        f"{total - event.length} of its {total} tokens are left to compute" if total else "they are not computed again"
    )
    return (
        f"{name} begins as an earlier prompt did: the prefix cache knew {_blocks(event.blocks)}. "
        f"{event.length} tokens have their K and V; {left}."
    )


def _appended(moment: Moment, event: events.TokensAppended) -> str:
    place, name = moment.state.memory.sequences[event.seq_id], moment.history.name(event.seq_id)
    view = moment.state.sequences[event.seq_id]
    if not place.blocks:
        last = place.start + place.length - 1
        slots = f"slot {last}" if event.count == 1 else f"slots {last - event.count + 1} to {last}"
        return f"{name} fills {slots} of its region: {place.length} of {place.size} slots hold a token now."
    size = moment.state.memory.block_size
    filled = (place.length - 1) % size + 1
    first = event.count > 1 or place.length <= view.prompt_len
    if event.copied:
        source, copy = event.copied
        others = tuple(s for s, p in moment.state.memory.sequences.items() if not p.on_host and source in p.blocks)
        needed_by = f"{_names(moment, others)} {'needs' if len(others) == 1 else 'need'}"
        text = f"Copy on write: {name} is to write into block {source}, which {needed_by} as it is. "
        text += f"So {name} gets a copy, block {copy}, and writes there."
    elif event.new_blocks and first:
        where = "" if event.evicted else ", the next on the free list, wherever they lie"
        text = f"{name} gets slots for {plural(event.count, 'token')}: {_blocks(event.new_blocks)}{where}. "
        text += f"The last one has {filled} of {size} slots in use."
    elif event.new_blocks:
        text = f"All blocks of {name} are full, so its next token opens {_blocks(event.new_blocks)}. "
        text += f"At most {size - 1} of its slots can stay empty."
    else:
        slots = "a slot" if event.count == 1 else plural(event.count, "slot")
        text = f"{name} gets {slots} in block {place.blocks[-1]}"
        text += f", which had room: {filled} of {size} slots are in use. No other block is touched."
    return text + _gave_up(event.evicted)


def _truncated(moment: Moment, event: events.SequenceTruncated) -> str:
    name, before = moment.history.name(event.seq_id), moment.change.place_before
    given = 0 if before is None else len(before.blocks) - len(moment.state.memory.sequences[event.seq_id].blocks)
    return f"{name} keeps its first {plural(event.length, 'token')}, and gives back {plural(given, 'block')}."


def _forked(moment: Moment, event: events.SequenceForked) -> str:
    parent, child = moment.history.name(event.parent_id), moment.history.name(event.child_id)
    blocks = len(moment.state.memory.sequences[event.child_id].blocks)
    return (
        f"{child} forks off {parent}: its table points to the same {plural(blocks, 'block')}. Nothing is copied; "
        "each reference count goes up by one."
    )


def _cached(moment: Moment, event: events.BlockCached) -> str:
    known = moment.state.memory.known[event.block_id]
    before = f", which holds that of the block before it ({known.parent[:6]}…)" if known.parent else ""
    return (
        f"Block {event.block_id} is full and computed: the prefix cache knows it from now on as {event.digest[:6]}…, "
        f"the digest of its tokens{before}."
    )


def _moved(moment: Moment, event: events.SwappedOut | events.SwappedIn) -> str:
    blocks = len(event.blocks)
    return f"{plural(blocks, 'block')}{kv_size(moment.history, blocks * moment.state.memory.block_size)}"


def _swapped_out(moment: Moment, event: events.SwappedOut) -> str:
    return (
        "A block is needed and none is left, so the last to arrive gives way: "
        f"{_names(moment, event.seq_ids)} is preempted by swap, {_moved(moment, event)}, to host memory."
    )


def _swapped_in(moment: Moment, event: events.SwappedIn) -> str:
    return (
        f"There is room again: {_names(moment, event.seq_ids)} comes back from the host, {_moved(moment, event)}, "
        f"to other places. Nothing is computed again.{_gave_up(event.evicted)}"
    )


def _freed(moment: Moment, event: events.SequenceFreed) -> str:
    name, before = moment.history.name(event.seq_id), moment.change.place_before
    held = 0 if before is None else len(before.blocks)
    if not moment.state.memory.paged:
        size = 0 if before is None else before.size
        return f"{name} gives its region back: {plural(size, 'slot')} become a hole, joined with the holes next to it."
    freed = sum(1 for block in moment.change.before if not moment.state.memory.ref_count[block])
    cached = sum(1 for block in moment.change.before if block in moment.state.memory.cached)
    kept = f"; {cached} of them stay in the prefix cache" if cached else ""
    shared = f" {held - freed} are shared, and stay in other tables." if held > freed else ""
    if before is not None and before.on_host:
        return f"{name} gives back {plural(held, 'block')} of host memory, without having run again."
    if ended(moment):
        return (
            f"{name} is at its end and gives back {plural(held, 'block')}. {freed} are available again{kept}.{shared}"
        )
    return (
        f"No block is left, so the last to arrive gives way: {name} is preempted by recompute, and gives back "
        f"{plural(held, 'block')}{kept}. The K and V of {name} will be computed again.{shared}"
    )


def _placed(moment: Moment, event: events.RegionPlaced) -> str:
    name, before = moment.history.name(event.seq_id), moment.change.place_before
    view = moment.state.sequences[event.seq_id]
    slots = f"slots {event.start} to {event.start + event.size - 1}"
    if before is None:
        why = "for its whole life, used or not" if moment.state.memory.manager == "standard" else "of today's size"
        tokens = plural(len(view.tokens), "token")
        return f"{name} gets a region of {plural(event.size, 'slot')} {why}: {slots}. {name} has {tokens}."
    if before.start == event.start:
        return f"{name} has outgrown its region, and the hole behind it is large enough: it grows in place, to {slots}."
    return (
        f"{name} has outgrown its region, and another lies behind it: all {before.length} tokens"
        f"{kv_size(moment.history, before.length)} are moved, to {slots}."
    )


def _region_out(moment: Moment, event: events.RegionSwappedOut) -> str:
    name, before = moment.history.name(event.seq_id), moment.change.place_before
    size = 0 if before is None else before.size
    return (
        f"No hole is large enough for the next token, so the last to arrive gives way: {name} is swapped to the host, "
        f"{plural(event.size, 'slot')}{kv_size(moment.history, event.size)}. {size} slots become a hole."
    )


def _region_in(moment: Moment, event: events.RegionSwappedIn) -> str:
    name, length = moment.history.name(event.seq_id), moment.state.memory.sequences[event.seq_id].length
    return (
        f"A hole of {plural(event.size, 'slot')} is there: {name} comes back from the host, "
        f"{plural(length, 'token')}{kv_size(moment.history, length)}, to slot {event.start} and on."
    )


def _planned(moment: Moment, event: events.StepPlanned) -> str:
    history, step = moment.history, moment.step
    decode = [history.name(s) for s, _ in event.chunks if history.spans.code_at(s, step) == "d"]
    prefill = [f"{history.name(s)} ({n})" for s, n in event.chunks if history.spans.code_at(s, step) != "d"]
    does = []
    if prefill:
        does.append(f"prefill of {in_words(prefill)}")
    if decode:
        does.append(f"decode of {in_words(decode) if len(decode) < 8 else plural(len(decode), 'sequence')}")
    total = sum(n for _, n in event.chunks)
    text = f"Step {event.step} computes {plural(total, 'token')} in one batch: {', '.join(does) or 'nothing'}."
    if event.preempted:
        text += f" {_names(moment, event.preempted)} had to make room."
    waiting = [s for s in event.waiting if s not in event.preempted]
    if waiting:
        names = [history.name(s) for s in waiting]
        text += f" {in_words(names) if len(names) < 5 else plural(len(names), 'sequence')} "
        text += f"wait{'s' if len(names) == 1 else ''}{_room(moment)}."
    return text


def _room(moment: Moment) -> str:
    memory = moment.state.memory
    if moment.state.memory.paged:
        cached = f" and {len(memory.cached)} cached" if memory.cached else ""
        return f": {len(memory.free)} free{cached} blocks are too few"
    largest = max((size for _, size in memory.holes()), default=0)
    return f": the largest hole has {plural(largest, 'slot')}"


def _cleared(moment: Moment, event: events.PoolCleared) -> str:
    return (
        "An exception ended the step, and the step was undone: no sequence holds memory, and each will compute its "
        "tokens again."
    )


def _sampled(moment: Moment, event: events.TokenSampled) -> str:
    name, text = moment.history.name(event.seq_id), moment.history.text(event.token_id)
    return f"{name} goes on with “{text}”. The token has no slot yet: the next step computes and stores its K and V."


def _reordered(moment: Moment, event: events.BeamsReordered) -> str:
    name = moment.history.name
    pairs = [f"{name(new)} from {name(old)}" if new != old else name(new) for old, new in event.chosen]
    return (
        f"Beam search keeps the likeliest continuations: {in_words(pairs)}. What the beams have in common stays shared."
    )


def _finished(moment: Moment, event: events.SequenceFinished) -> str:
    view = moment.state.sequences[event.seq_id]
    why = _REASONS.get(event.reason, event.reason)
    return f"{moment.history.name(event.seq_id)} finished after {plural(len(view.tokens), 'token')}: {why}."


_SENTENCES: dict[type[events.Event], Callable[[Moment, Any], str]] = {
    events.PoolOpened: _pool_opened,
    events.RanksOpened: _ranks,
    events.RequestArrived: _arrived,
    events.SequenceAdmitted: _admitted,
    events.TokensAppended: _appended,
    events.SequenceTruncated: _truncated,
    events.SequenceForked: _forked,
    events.BlockCached: _cached,
    events.SwappedOut: _swapped_out,
    events.SwappedIn: _swapped_in,
    events.SequenceFreed: _freed,
    events.RegionPlaced: _placed,
    events.RegionSwappedOut: _region_out,
    events.RegionSwappedIn: _region_in,
    events.StepPlanned: _planned,
    events.PoolCleared: _cleared,
    events.TokenSampled: _sampled,
    events.BeamsReordered: _reordered,
    events.SequenceFinished: _finished,
}
