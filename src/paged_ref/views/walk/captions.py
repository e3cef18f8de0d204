"""What a thread does at one access of the kernel walk, and why: one or two sentences for each kernel line.

A sentence is found by a piece of the kernel's source line, so it moves with the code; a test proves that each
line that touches memory has one.
"""

from __future__ import annotations

from typing import NamedTuple

from .run import LETTERS, KernelRun


class Caption(NamedTuple):
    """What the sentences may name."""

    thread: int
    num_threads: int  # of the CUDA block
    seq: str
    token: int
    head: int
    kv_head: int
    array: str
    first: int  # index of the access
    last: int  # index of the access
    slot: int  # of a cache access, or the one that a table leads to; else -1
    position: int  # of the token in that slot
    block: int
    offset: int
    block_size: int
    num_keys: int
    key: int  # the key of this thread in this tile
    tile: int  # first key of the tile
    half: int  # threads that are still at work in a reduction


def caption(run: KernelRun, position: int) -> Caption:
    """What there is to say of one access."""
    access, sizes = run.access(position), run.sizes
    token, head = access.block[0], access.block[1]
    slot = run.slot(position)
    held = run.owner[slot][1] if slot is not None else None
    block_size, num_threads = sizes.block_size, sizes.num_threads
    # A tile costs the same number of barriers each time: 4, and 2 for each halving of the threads.
    tile = max(0, access.round - 1) // (4 + 2 * (num_threads.bit_length() - 1)) * num_threads
    thread = access.thread
    if access.array == "block_tables":
        slot = run.tables[token][access.index[-1]] * block_size + (tile + thread) % block_size
    elif access.array == "starts":
        slot = run.tables[token][0] + tile + thread
    return Caption(
        thread=thread, num_threads=num_threads, seq=LETTERS[token], token=token, head=head,
        kv_head=head // (sizes.num_heads // sizes.num_kv_heads), array=access.array,
        first=access.index[0], last=access.index[-1], slot=-1 if slot is None else slot,
        position=-1 if held is None else held,
        block=-1 if slot is None else slot // block_size, offset=-1 if slot is None else slot % block_size,
        block_size=block_size, num_keys=sizes.tokens[token], key=tile + thread, tile=tile,
        half=abs(access.index[0] - thread) if access.array == "work" else 0,
    )  # fmt: skip


# (piece of the source line, array or "" for any, the sentence)
_SENTENCES: tuple[tuple[str, str, str], ...] = (
    (
        "while query_start_loc", "",
        "Whose token is this? Thread {thread} looks for the sequence that token {token} belongs to: {seq}. Every thread "
        "looks for itself: the same address for all lanes is one sector, cheaper than a barrier.",
    ),
    (
        "query_len =", "",
        "Thread {thread} works out how many query tokens {seq} has in this step: one, as in every decode step.",
    ),
    (
        "query_position =", "",
        "Thread {thread} works out where {seq}'s query stands in its sequence, and so how many keys it sees: {num_keys}. "
        "Causal: a query sees the keys up to its own.",
    ),
    (
        "float32(query[", "query",
        "Thread {thread} fetches element {last} of the query of head {head}. Neighbouring threads fetch neighbouring "
        "elements, so the warp's loads fall into few sectors.",
    ),
    (
        "float32(query[", "q",
        "Thread {thread} puts element {last} of the query, scaled, into shared memory: each thread needs all of it, and "
        "reads it from there once for each key instead of from global memory.",
    ),
    (
        "acc[d] = float32(0)", "",
        "Thread {thread} clears the sum of dimension {last}: shared memory starts out as garbage.",
    ),
    (
        "slot_of(", "",
        "Thread {thread} asks {seq}'s block table where its key {key} lies: entry {key} // {block_size} = {last} says block "
        "{block}, so slot {block} * {block_size} + {key} % {block_size} = {slot}. This read is all that paging adds.",
    ),
    (
        "starts[seq] + position", "",
        "Thread {thread} adds its key's number, {key}, to the start of {seq}'s region: slot {slot}. No table; but the "
        "region had to be reserved in one piece before its length was known.",
    ),
    (
        "slots[thread] = slot", "",
        "Thread {thread} notes where key {first} of the tile lies, in shared memory: in the step of the values every thread "
        "needs every key's slot, and none has to look it up again.",
    ),
    (
        "score +=", "q",
        "Scores: thread {thread} reads element {last} of the query from shared memory, to multiply it with the same element "
        "of its key, number {key}.",
    ),
    (
        "score +=", "keys",
        "Scores: thread {thread} owns key {position} of {seq}; it reads element {last} of K in slot {slot} (block {block}, "
        "offset {offset}) and adds q*K to its score. A thread for each key: none needs another's result yet.",
    ),
    (
        "work[thread] = score", "",
        "Thread {thread} lays its score out for the others (minus infinity if it has no key): together they look for the "
        "tile's largest, so that no exp overflows.",
    ),
    (
        "max(work[thread], work[thread + half])", "",
        "Largest score: thread {thread} compares its number with that of thread t + {half_word} and keeps the larger. Each "
        "round halves the threads at work: {rounds} rounds for {num_threads} numbers, not {steps} steps.",
    ),
    (
        "new_highest =", "",
        "Every thread reads the tile's largest score from work[0]. They must all have read it before the next step "
        "overwrites work: a barrier follows.",
    ),
    (
        "weights[thread] = weight", "",
        "Thread {thread} writes the softmax weight of its key, exp(score - largest), for all to use in the step of the "
        "values. It is divided by the total only at the very end.",
    ),
    (
        "work[thread] = weight", "",
        "Thread {thread} lays the same weight out once more: the sum will destroy work, and weights must live on.",
    ),
    (
        "work[thread] += work[thread + half]", "",
        "Sum of the weights: thread {thread} adds the number of thread t + {half_word} to its own, and half as many "
        "threads go on.",
    ),
    (
        "total = total * shrink", "",
        "Every thread takes the tile's sum from work[0] into its own total, after shrinking what earlier tiles gave: "
        "the online softmax.",
    ),
    (
        "mixed = acc[d] * shrink", "",
        "Values: thread {thread} takes up dimension {last} where the last tile left it. Now a thread has a dimension, not a "
        "key.",
    ),
    (
        "mixed +=", "weights",
        "Values: thread {thread} reads the weight of key {first} of the tile. All threads read the same one at once: shared "
        "memory hands it to the whole warp in one go.",
    ),
    (
        "mixed +=", "slots",
        "Values: thread {thread} reads where key {first} of the tile lies. The slot was looked up once, in the step of the "
        "scores; naive and paged are the same from here on.",
    ),
    (
        "mixed +=", "values",
        "Values: thread {thread} reads element {last} of V in slot {slot} ({seq}'s token {position}: block {block}, offset "
        "{offset}). Neighbouring threads read neighbouring elements of one row: few sectors.",
    ),
    (
        "acc[d] = mixed", "",
        "Thread {thread} puts the sum of dimension {last} back. Nobody else touches it, so it needs no barrier of its own.",
    ),
    (
        "out[token, head, d] =", "acc",
        "Thread {thread} reads the finished sum of dimension {last}, to divide it by the total of the weights: only now does "
        "the softmax become one.",
    ),
    (
        "out[token, head, d] =", "out",
        "Thread {thread} writes element {last} of the answer for {seq}, head {head}. Each element is written once, by one "
        "thread.",
    ),
    (
        "lse[token, head] =", "",
        "Thread {thread}, alone, writes the logarithm of the softmax's denominator: with it, answers over parts of a "
        "sequence can be merged later.",
    ),
)  # fmt: skip


def sentence(run: KernelRun, position: int) -> str:
    """What the thread does at this access, and why. Raises LookupError where no sentence is written for the line."""
    source, array = run.code.text(int(run.line[position])), run.info(position).name
    for piece, wanted, words in _SENTENCES:
        if piece in source and wanted in ("", array):
            return words.format(**_named(caption(run, position)))
    raise LookupError(f"no sentence for {source.strip()!r} and the array {array}")


def _named(caption: Caption) -> dict[str, object]:
    half, n = str(caption.half) if caption.half else "half", caption.num_threads
    return {**caption._asdict(), "half_word": half, "rounds": n.bit_length() - 1, "steps": n - 1}
