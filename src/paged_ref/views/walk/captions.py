"""What a thread does at one access of the kernel walk, and why: one or two sentences for each kernel line.

A sentence is found by a piece of the kernel's source line, so it moves with the code; a test proves that each
line that touches memory has one.
"""

from __future__ import annotations

from typing import Any

from .kernel_run import KernelRun
from .own_kernel import OwnRun
from .sizes import LETTERS


def sentence(run: KernelRun, position: int) -> str:
    """What the thread does at this access, and why. Raises LookupError where no sentence is written for the line."""
    if isinstance(run, OwnRun):
        return run.sentence(position)
    source, array = run.code.text(int(run.line[position])), run.info(position).name
    for (piece, wanted), words in _SENTENCES.items():
        if piece in source and wanted in ("", array):
            if run.name == "naive":  # a region has slots, and no blocks
                words = words.replace(f" ({_IN_BLOCK})", "").replace(f": {_IN_BLOCK}", "")
            return words.format(**caption(run, position))
    raise LookupError(f"no sentence for {source.strip()!r} and the array {array}")


def caption(run: KernelRun, position: int) -> dict[str, Any]:
    """What the sentences may name. -1: the access has none."""
    access, sizes = run.access(position), run.sizes
    token, head, _ = access.block
    thread, num_threads, first = access.thread, sizes.num_threads, access.index[0]
    slot, key = run.slot_named(position), run.key(position)
    held = None if slot is None else run.owner.get(slot, (token, None))[1]
    block, offset = (-1, -1) if slot is None else divmod(slot, sizes.block_size)
    half = abs(first - thread) if access.array == "work" else 0  # threads that are still at work in a reduction
    return {
        "thread": thread, "num_threads": num_threads, "rounds": num_threads.bit_length() - 1, "steps": num_threads - 1,
        "half_word": half or "half", "seq": LETTERS[token], "token": token, "head": head,
        "first": first, "last": access.index[-1],  # of the indices of the access
        "slot": -1 if slot is None else slot, "block": block, "offset": offset, "block_size": sizes.block_size,
        "position": -1 if held is None else held,  # of the token in the slot
        "num_keys": sizes.tokens[token], "key": key,  # the key of this thread in this tile
    }  # fmt: skip


_IN_BLOCK = "block {block}, offset {offset}"
# (piece of the source line, array or "" for any) -> the sentence
_SENTENCES = {
    ("while query_start_loc", ""): (
        "Thread {thread} looks for the sequence that token {token} belongs to: {seq}. Every thread searches for "
        "itself: all lanes read the same address, which is one sector and costs less than a barrier."
    ),
    ("query_len =", ""): (
        "Thread {thread} computes how many query tokens {seq} has in this step: one, as in every decode step."
    ),
    ("query_position =", ""): (
        "Thread {thread} computes the position of {seq}'s query in the sequence, and so how many keys the query sees: "
        "{num_keys}. Causal: a query sees the keys up to its own."
    ),
    ("float32(query[", "query"): (
        "Thread {thread} fetches element {last} of the query of head {head}. Neighbouring threads fetch neighbouring "
        "elements, so the warp's loads fall into few sectors."
    ),
    ("float32(query[", "q"): (
        "Thread {thread} puts element {last} of the query, scaled, into shared memory: each thread needs the whole "
        "query, and reads it from there once for each key instead of from global memory."
    ),
    ("acc[d] = float32(0)", ""): (
        "Thread {thread} clears the sum of dimension {last}: shared memory begins with arbitrary values."
    ),
    ("slot_of(", ""): (
        "Thread {thread} looks up in {seq}'s block table where key {key} lies: entry {key} // {block_size} = {last} "
        "says block {block}, so slot {block} * {block_size} + {key} % {block_size} = {slot}. This read is all that "
        "paging adds."
    ),
    ("starts[seq] + position", ""): (
        "Thread {thread} adds the number of its key, {key}, to the start of {seq}'s region: slot {slot}. No table; "
        "but the region had to be reserved in one piece before the length of {seq} was known."
    ),
    ("slots[thread] = slot", ""): (
        "Thread {thread} notes in shared memory where key {first} of the tile lies: in the step of the values every "
        "thread needs every key's slot, and no thread has to look the slot up again."
    ),
    ("score +=", "q"): (
        "Scores: thread {thread} reads element {last} of the query from shared memory, to multiply it with the same "
        "element of key {key}."
    ),
    ("score +=", "keys"): (
        "Scores: thread {thread} owns key {position} of {seq}, reads element {last} of K in slot {slot} (block "
        "{block}, offset {offset}) and adds q*K to the score. One thread for each key: no thread needs another's "
        "result yet."
    ),
    ("work[thread] = score", ""): (
        "Thread {thread} shows its score to the others (minus infinity if it has no key): together the threads look "
        "for the tile's largest score, so that no exp overflows."
    ),
    ("max(work[thread], work[thread + half])", ""): (
        "Largest score: thread {thread} compares its number with that of thread t + {half_word} and keeps the larger. "
        "Each round halves the threads at work: {rounds} rounds for {num_threads} numbers, not {steps} steps."
    ),
    ("new_highest =", ""): (
        "Every thread reads the tile's largest score from work[0]. All must have read it before the next step "
        "overwrites work: a barrier follows."
    ),
    ("weights[thread] = weight", ""): (
        "Thread {thread} writes the softmax weight of its key, exp(score - largest), which every thread uses in the "
        "step of the values. The division by the total comes only at the very end."
    ),
    ("work[thread] = weight", ""): (
        "Thread {thread} writes the same weight once more, into work: the sum overwrites work, and the weights are "
        "still needed."
    ),
    ("work[thread] += work[thread + half]", ""): (
        "Sum of the weights: thread {thread} adds the number of thread t + {half_word} to its own, and half as many "
        "threads go on."
    ),
    ("total = total * shrink", ""): (
        "Every thread adds the tile's sum from work[0] to its own total, after shrinking what earlier tiles gave: the "
        "online softmax."
    ),
    ("mixed = acc[d] * shrink", ""): (
        "Values: thread {thread} goes on with dimension {last} where the last tile left it. From here on a thread has "
        "a dimension, not a key."
    ),
    ("mixed +=", "weights"): (
        "Values: thread {thread} reads the weight of key {first} of the tile. All threads read the same weight at the "
        "same time: one read of shared memory serves the whole warp."
    ),
    ("mixed +=", "slots"): (
        "Values: thread {thread} reads where key {first} of the tile lies. The slot was looked up once, in the step "
        "of the scores; naive and paged are the same from here on."
    ),
    ("mixed +=", "values"): (
        "Values: thread {thread} reads element {last} of V in slot {slot} ({seq}'s token {position}: block {block}, "
        "offset {offset}). Neighbouring threads read neighbouring elements of one row: few sectors."
    ),
    ("acc[d] = mixed", ""): (
        "Thread {thread} puts the sum of dimension {last} back. No other thread uses this sum, so no barrier is needed."
    ),
    ("out[token, head, d] =", "acc"): (
        "Thread {thread} reads the finished sum of dimension {last}, to divide it by the total of the weights. Only "
        "this division completes the softmax."
    ),
    ("out[token, head, d] =", "out"): (
        "Thread {thread} writes element {last} of the answer for {seq}, head {head}. Each element is written once, by "
        "one thread."
    ),
    ("lse[token, head] =", ""): (
        "Only thread {thread} writes the logarithm of the softmax's denominator: with it, answers over parts of a "
        "sequence can be merged later."
    ),
}
