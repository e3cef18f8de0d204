"""The paged cache that a reader builds: calls to it and to the real manager, and what then lies in the slots.

Any free block is as good as any other, so block ids are not compared. Compared is what they are for: each append
writes a mark for each token into the slot that the cache names, and every sequence must read its own marks back.
"""

from __future__ import annotations

import random
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..core.memory.block_pool import BlockPool, OutOfBlocks
from ..core.memory.paged import PagedManager
from ..views.common.own_code import error_in_words
from .building import Build, Stage
from .grading import Pending, Trail

LONGEST = 99  # the `max_len` of every sequence


class Call(NamedTuple):
    """One call of a method."""

    method: str
    args: tuple[Any, ...] = ()

    def __repr__(self) -> str:
        return f"{self.method}({', '.join(map(repr, self.args))})"

    def on(self, manager: Any) -> Any:
        return getattr(manager, self.method)(*self.args)


@dataclass(frozen=True)
class Calls:
    """A small cache, and what is done to it."""

    num_blocks: int
    block_size: int
    calls: tuple[Call, ...] = field(repr=False)

    def __repr__(self) -> str:
        return f"{self.num_blocks}, {self.block_size}"


class _NoSlotsError(Exception):
    """What a cache answers is no list of slots."""


class _Memory:
    """The slots of one cache: each holds the mark of the token that was written there last."""

    def __init__(self, manager: Any) -> None:
        self.manager = manager
        self.slots: list[tuple[int, int] | None] = [None] * manager.num_slots
        self.marks: dict[int, list[tuple[int, int]]] = {}  # of each sequence: (number of the mark, position)
        self.num_marks = 0
        self.ended = list[int]()

    def do(self, call: Call) -> str:
        """Make the call, write what an engine would write, and say what came of it."""
        try:
            found = call.on(self.manager)
        except OutOfBlocks:
            return f"refused (OutOfBlocks); {self._state()}"
        match call:
            case Call("admit", (seq_id, *_)):
                if type(found) is not int:
                    return f"admit returns {found!r}; an int is expected, the tokens that need not be computed"
                self.marks[seq_id] = []
            case Call("append", (appends,)):
                if not isinstance(found, list):
                    return f"append returns {found!r}; a list of Transfer is expected"
                self._write(found, appends)
                return f"copied: {len(found)}; {self._state()}"
            case Call("fork", (parent, child)):
                self.marks[child] = self.marks[parent].copy()
            case Call("free", (seq_id,)):
                del self.marks[seq_id]
                self.ended.append(seq_id)
            case _:
                self.marks.clear()
        return self._state()

    def _write(self, transfers: list[Any], appends: list[tuple[int, int]]) -> None:
        size = self.manager.block_size
        for transfer in transfers:
            source, destination = transfer.source * size, transfer.destination * size
            self.slots[destination : destination + size] = self.slots[source : source + size]
        for seq_id, count in appends:
            marks = self.marks[seq_id]
            for slot in self._slots(seq_id, len(marks), count):
                marks.append((self.num_marks, len(marks)))
                self.slots[slot] = marks[-1]
                self.num_marks += 1

    def _state(self) -> str:
        """Lengths, blocks and what is read; the first token that is lost, if one is."""
        manager, words, size = self.manager, [], self.manager.block_size
        for seq_id, marks in self.marks.items():
            table = manager.placement(seq_id)
            for position, (slot, mark) in enumerate(zip(self._slots(seq_id, 0, len(marks)), marks, strict=True)):
                if self.slots[slot] != mark:
                    return f"position {position} of sequence {seq_id} (slot {slot}) is lost: {self._holder(slot)}"
                if slot != table[position // size] * size + position % size:
                    return f"position {position} of sequence {seq_id} is in slot {slot}, and its table is {table}"
            words.append(f"{seq_id}: {manager.length(seq_id)} tokens in {len(table)} blocks")
        for seq_id in self.ended:
            with suppress(Exception):  # a sequence that has ended is not known
                if kept := manager.length(seq_id) or manager.placement(seq_id):
                    return f"sequence {seq_id} has ended, and its length or table, {kept}, is still there"
        free = manager.snapshot().free // size
        return f"{free} blocks free; sequences {'; '.join(words) or 'none'}"

    def _slots(self, seq_id: int, first: int, count: int) -> list[int]:
        """What the cache says, if it is a list of slots. Raises _NoSlotsError."""
        slots: list[int] = self.manager.slots(seq_id, first, count) if count else []
        call = f"slots({seq_id}, {first}, {count})"
        if not isinstance(slots, list) or len(slots) != count or any(type(slot) is not int for slot in slots):
            raise _NoSlotsError(f"{call} is {slots}; {count} ints are expected, in a list")
        if outside := [slot for slot in slots if not 0 <= slot < len(self.slots)]:
            raise _NoSlotsError(f"{call} has {outside[0]}; 0 to {len(self.slots) - 1} are there")
        return slots

    def _holder(self, slot: int) -> str:
        mark = self.slots[slot]
        for seq_id, marks in self.marks.items():
            if mark in marks:
                return f"the slot has position {marks.index(mark)} of sequence {seq_id}"
        return "nothing was written there" if mark is None else "the slot has a token of a sequence that ended"


def _trial(cache: Callable[[int, int], Any]) -> Callable[[Calls], Trail]:
    """How a cache, made by `cache(num_blocks, block_size)`, is tried: what each call does, to the first error."""

    def run(case: Calls) -> Trail:
        memory, trail = _Memory(cache(case.num_blocks, case.block_size)), Trail()
        for number, call in enumerate(case.calls, start=1):
            step = f"operation {number}, {call!r}"
            try:
                trail[step] = memory.do(call)
            except Pending:
                raise
            except _NoSlotsError as answer:
                trail[step] = str(answer)
                break
            except Exception as error:
                frames = traceback.extract_tb(error.__traceback__)
                trail[step] = error_in_words(error, next((f.filename for f in frames if f.filename != __file__), ""))
                break
        return trail

    return run


def real_cache(num_blocks: int, block_size: int) -> PagedManager:
    """The package's own."""
    return PagedManager(BlockPool(num_blocks), block_size)


# ---- the cases


def _case(num_blocks: int, *calls: Call) -> tuple[Calls]:
    return (Calls(num_blocks, 4, calls),)


def _admit(seq_id: int, count: int, spare: int = 0) -> Call:
    return Call("admit", (seq_id, range(count), LONGEST, spare))


def _append(*appends: tuple[int, int]) -> Call:
    return Call("append", ([*appends],))


def _begin(seq_id: int, count: int) -> tuple[Call, Call]:
    return _admit(seq_id, count), _append((seq_id, count))


def _fork(parent: int, child: int) -> Call:
    return Call("fork", (parent, child))


def _free(seq_id: int) -> Call:
    return Call("free", (seq_id,))


def random_case(seed: int, num_blocks: int, block_size: int, num_calls: int) -> tuple[Calls]:
    """Calls as an engine makes them, among them some that the real manager refuses."""
    rng, manager = random.Random(seed), real_cache(num_blocks, block_size)
    calls: list[Call] = []
    while len(calls) < num_calls:
        held, new = list(manager.tables), len(calls)  # the number of the call names a new sequence
        kind = rng.choices(("admit", "append", "fork", "free", "clear"), (4, 12, 2, 3, 0.1))[0] if held else "admit"
        if kind == "admit":
            call = _admit(new, rng.randint(1, 3 * block_size), rng.choice((0, 0, block_size)))
        elif kind == "append":
            ids = rng.sample(held, min(len(held), rng.randint(1, 4)))
            call = _append(*((seq_id, rng.choice((1, 1, 1, block_size + 1))) for seq_id in ids))
        elif kind == "clear":
            call = Call("clear")
        else:
            call = _fork(rng.choice(held), new) if kind == "fork" else _free(rng.choice(held))
        calls.append(call)
        try:
            call.on(manager)
        except OutOfBlocks:
            continue
        if kind == "admit":  # an engine computes it in the same step
            calls.append(_append((new, len(call.args[1]))))
            calls[-1].on(manager)
    return (Calls(num_blocks, block_size, tuple(calls)),)


BUILDS = {
    "MyCache": Build(
        "MyCache",
        [
            Stage(
                "a table that grows (lesson 5)",
                [_case(6, *_begin(0, 9)), _case(6, *_begin(0, 3), _append((0, 1)), _append((0, 1)), _append((0, 7)))],
                "how many blocks does the new length need?\n"
                "append: first the length; then blocks while len(table) * block_size is less than the length",
            ),
            Stage(
                "blocks that come back (lesson 6)",
                [_case(5, *_begin(0, 9), *_begin(1, 5), _free(0), *_begin(2, 12), _free(1), _free(2), *_begin(3, 20)),
                 _case(5, *_begin(0, 9), Call("clear"), *_begin(1, 17))],
                "when is a block free?\n"
                "free: each block of the table has one table less; at zero it is free again",
            ),
            Stage(
                "refusals that change nothing (lesson 14)",
                [_case(3, *_begin(0, 8), _admit(1, 5), _admit(1, 4), _append((1, 4)), _append((0, 1)), _append((0, 0))),
                 _case(4, *_begin(0, 4), *_begin(1, 8), _append((0, 4), (1, 1)), _append((0, 4)), _append((1, 1))),
                 _case(4, *_begin(0, 4), _admit(1, 9, 4), _admit(1, 8, 4), _append((1, 8))),
                 _case(4, _admit(0, 16, 8), _append((0, 16)), _free(0), _admit(1, 17))],
                "a refusal leaves everything as it was before the call\n"
                "keep copies of tables, lengths, counts and free blocks; put them back where OutOfBlocks is raised",
            ),
            Stage(
                "forks, and copy on write (lesson 12)",
                [_case(9, *_begin(0, 6), _fork(0, 1), _append((0, 1)), _append((1, 1)), _free(0), _append((1, 2))),
                 _case(9, *_begin(0, 8), _fork(0, 1), _append((0, 1), (1, 1)), _free(0), _free(1), *_begin(2, 36)),
                 _case(9, *_begin(0, 10), _fork(0, 1), _fork(0, 2), _append((0, 1), (1, 1), (2, 1)), _free(1)),
                 _case(4, *_begin(0, 6), _fork(0, 1), *_begin(2, 4), _append((0, 1), (1, 1)), _append((2, 1)))],
                "when does an append write into a block that two tables name?\n"
                "append: the last block is partly filled and in another table, too: copy it first",
            ),
            Stage(
                "random operations",
                [random_case(seed, 8 + 4 * seed, 1 + seed, 150) for seed in range(4)],
                "the operation that is named is the first that differs: what did the calls before it leave?\n"
                "print the tables, ref_count and free_blocks before that operation, and go through it by hand",
            ),
        ],
        _trial(real_cache), _trial, real_cache,
    )
}  # fmt: skip
