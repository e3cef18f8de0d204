# mypy: ignore-errors
"""The loop of the backend `cpu-simd`, compiled by Numba. Its order, from the outside in, and why:

    item   a few queries of one sequence in all heads, or more of them in one KV head, with the keys that they may see.
           Threads share the items.
     tile    32 keys. Their slots are looked up once, and this is all that paging costs.
      keys     4 or 8 keys at a time, in all heads: memory is read in the order in which it lies, which the hardware
               follows with its own prefetches.
       block     R query heads of one token, which share a KV head: each K row is read once for all of them. LANES
                 sums, of R rows by LANES // R keys, are what fits in the registers.

A long prompt's items are of one KV head: `attend_copied` copies their tiles first, so that all their blocks find K and
V in L1. All others are `attend_in_place`'s. For a block both add up in the same order, so the bits are the same.

The softmax is online, one step for each tile (Milakov and Gimelshein 2018), so scores are kept for one tile only.
They lie key by key, [TILE, R] for a block, so that the softmax of R rows is arithmetic of whole vectors.

Memory is reached through pointers, and places are counted in elements. cpu_vectors.py has the vectors.
"""

from __future__ import annotations  # noqa: I001  (names of the vectors, several a line)

import math

import numpy as np
from numba import njit

from .cpu_items import (
    BEGIN, COPIED, COUNT, END, END_HEAD, FLOAT, HEAD, LOWEST, PART, PARTS, POSITION, QUERY, SEQ, TO,
)  # fmt: skip
from .cpu_machine import FIELDS, LANES, TILE
from .cpu_vectors import (
    add, add_products, add_weighted, any_greater, exp, fold_maximum, fold_sum, hide, key_numbers, keys_together, load,
    load_rows, maximum, multiply, no_sums, offset, prefetch, splat, store, store_rows, subtract, sum_each, take_next,
)  # fmt: skip

part = njit(inline="always")  # Numba copies a part into its caller before it compiles: LLVM sees one function, once

# The numbers of a call: of a step first, then of all calls with the same shapes. Strides are in elements: of a block, a
# slot, a head.
(
    NUM_ITEMS, WINDOW, MAX_BLOCKS, PLAIN, NUM_HEADS, GROUP_SIZE, HEAD_SIZE, TOKEN_BLOCKS, ITEM_BLOCKS, BLOCK_SIZE,
    PASS_KEYS, LINES, KEY_BLOCK, KEY_SLOT, KEY_HEAD, VALUE_BLOCK, VALUE_SLOT, VALUE_HEAD,
) = range(18)  # fmt: skip


# --- a tile's places ----------------------------------------------------------------------------------------------


@part
def slots(key_at, value_at, table, first, last, sizes):
    """Where the rows of the tile at key `first` begin: slot_of, times the strides. Past the end, the last key is
    repeated: a short tile then needs no loops of its own, and reads only its keys."""
    block_size, key_slot, value_slot = sizes[BLOCK_SIZE], sizes[KEY_SLOT], sizes[VALUE_SLOT]
    block, slot, t, count = first // block_size, first % block_size, 0, min(TILE, last - first)
    while t < count:
        key, value = (
            table[block] * sizes[KEY_BLOCK] + slot * key_slot,
            table[block] * sizes[VALUE_BLOCK] + slot * value_slot,
        )
        for _ in range(min(count - t, block_size - slot)):
            key_at[t], value_at[t] = key, value
            key, value, t = key + key_slot, value + value_slot, t + 1
        block, slot = block + 1, 0
    for t in range(count, TILE):
        key_at[t], value_at[t] = key_at[count - 1], value_at[count - 1]


@part
def prefetch_rows(cache, at, first, count, head, lines):
    """Prefetch head number `head`'s share, `lines` cache lines, of each of the tile's `count` rows from `first` on."""
    for line in range(head * lines, (head + 1) * lines):
        for t in range(first, first + count):
            prefetch(cache, at[t], line)


# --- a block: R rows ----------------------------------------------------------------------------------------------


@part
def dots(scores, query, size, keys, at, head, first, last, rows):
    """scores [TILE, R] = the products of R query rows with the tile's keys from `first` to before `last`."""
    for t in range(first, last, LANES // len(rows)):
        sums = no_sums()
        for d in range(0, size, LANES):
            sums = add_products(sums, rows, query, d, size, keys, at, t, head + d)
        store(scores, t * len(rows), sum_each(sums))


@part
def adjust(scores, position, first, end, window, softcap, slope, rows):
    """From products to scores: softcap, ALiBi, and -inf for the keys of the tile at `first` that the query at
    `position` does not see."""
    if softcap > 0:
        for i in range(TILE * len(rows)):
            scores[i] = softcap * math.tanh(scores[i] / softcap)
    last, earliest = splat(FLOAT(min(position, end - 1) - first)), splat(FLOAT(position - window - first))
    distance = splat(FLOAT(first - position))
    for t in range(0, TILE, LANES // len(rows)):
        key = add(key_numbers(rows), splat(FLOAT(t)))
        score = add(load(scores, t * len(rows)), multiply(slope, add(key, distance)))
        store(scores, t * len(rows), hide(score, key, earliest, last))


@part
def softmax(weights, highest, total, mixed, size, rows):
    """From scores to weights, e**(score - the highest so far). What was summed before shrinks to that scale."""
    old = load(highest, 0)
    top = old
    for i in range(0, TILE * len(rows), LANES):
        top = maximum(load(weights, i), top)
    top = fold_maximum(top, rows)
    base = maximum(top, splat(LOWEST))
    if any_greater(top, old):
        shrink = exp(subtract(old, base))
        store(highest, 0, shrink)  # for a moment: row r's is number r
        for r in range(len(rows)):
            for d in range(r * size, (r + 1) * size, LANES):
                store(mixed, d, multiply(load(mixed, d), splat(highest[r])))
        store(highest, 0, top)
        store(total, 0, multiply(load(total, 0), shrink))
    now = splat(FLOAT(0))
    for i in range(0, TILE * len(rows), LANES):
        weight = exp(subtract(load(weights, i), base))
        store(weights, i, weight)
        now = add(now, weight)
    store(total, 0, add(load(total, 0), fold_sum(now, rows)))


@part
def mix(mixed, size, weights, values, at, head, first, last, rows, columns):
    """R rows of `mixed` += weights * values, for the tile's keys from `first` to before `last`, one key or a few at a
    time."""
    for d in range(0, size, len(columns) * LANES):
        sums = load_rows(mixed, d, size, rows, columns)
        for t in range(first, last, keys_together(rows, columns)):
            sums = add_weighted(sums, rows, columns, weights, values, at, t, head + d)
        store_rows(mixed, d, size, rows, columns, sums)


# --- an item: its blocks are those of (KV head, token, rows), in this order ---------------------------------------
# Numba takes a tenth of a second for each call of a part, so there is one call where there could be two.


@part
def begin(item, sizes, scale, query, key_scales, sinks, state, rows):
    """Before the first key: queries are copied and scaled, and only sinks are seen. A sink is a key without a value."""
    queries, mixed, _, highest, total = state
    size, b = sizes[HEAD_SIZE], 0
    for head in range(item[HEAD], item[END_HEAD]):
        for token in range(item[QUERY], item[QUERY] + item[COUNT]):
            for i in range(sizes[TOKEN_BLOCKS]):
                for r in range(len(rows)):
                    in_group, to = i * len(rows) + r, (b * len(rows) + r) * size
                    row = token * sizes[NUM_HEADS] + head * sizes[GROUP_SIZE] + in_group
                    for d in range(0, size, LANES):
                        x = splat(FLOAT(0))  # a row that the group lacks
                        if in_group < sizes[GROUP_SIZE]:
                            x = multiply(multiply(load(query, row * size + d), splat(scale)), splat(key_scales[head]))
                        store(queries, to + d, x)
                        store(mixed, to + d, splat(FLOAT(0)))
                sink = splat(FLOAT(-np.inf))
                if item[PART] == 0:
                    sink = load(sinks, (head * sizes[TOKEN_BLOCKS] + i) * LANES)
                store(highest, b * LANES, sink)
                store(total, b * LANES, exp(subtract(sink, maximum(sink, splat(LOWEST)))))
                b += 1


@part
def score(item, sizes, since, keys, key_at, values, value_at, state, rows):
    """The products of the item's queries from number `since` on with the tile's keys. The values are prefetched."""
    queries, _, weights, _, _ = state
    size, keys_now = sizes[HEAD_SIZE], max(sizes[PASS_KEYS], LANES // len(rows))
    for t in range(0, TILE, keys_now):
        coming, at, next_t = keys, key_at, t + keys_now
        if next_t == TILE:
            coming, at, next_t = values, value_at, 0
        for head in range(item[HEAD], item[END_HEAD]):
            prefetch_rows(coming, at, next_t, keys_now, head, sizes[LINES])
            end = (head - item[HEAD] + 1) * item[COUNT] * sizes[TOKEN_BLOCKS]  # after the head's last block
            for b in range(end - (item[COUNT] - since) * sizes[TOKEN_BLOCKS], end):
                of_block, scores = offset(queries, b * len(rows) * size), offset(weights, b * len(rows) * TILE)
                dots(scores, of_block, size, keys, key_at, head * sizes[KEY_HEAD], t, t + keys_now, rows)


@part
def weigh(item, sizes, token, head_block, first, softcap, slopes, scores, b, state, rows):
    """From products to weights, for the tile at key `first` and block b, which is of the token-th query, and has number
    `head_block` of all heads' blocks."""
    _, mixed, _, highest, total = state
    position, sums = item[POSITION] + token, offset(mixed, b * len(rows) * sizes[HEAD_SIZE])
    all_seen = first + TILE <= min(item[END], position + 1) and first > position - sizes[WINDOW]
    if not all_seen or sizes[PLAIN] == 0:
        slope = load(slopes, head_block * LANES)
        adjust(scores, position, first, item[END], sizes[WINDOW], softcap, slope, rows)
    softmax(scores, offset(highest, b * LANES), offset(total, b * LANES), sums, sizes[HEAD_SIZE], rows)


@part
def weigh_all(item, sizes, since, first, softcap, slopes, state, rows):
    """`weigh` for all blocks, of the item's queries from number `since` on."""
    for head in range(item[HEAD], item[END_HEAD]):
        b = ((head - item[HEAD]) * item[COUNT] + since) * sizes[TOKEN_BLOCKS]
        for token in range(since, item[COUNT]):
            for i in range(sizes[TOKEN_BLOCKS]):
                scores, head_block = offset(state[2], b * len(rows) * TILE), head * sizes[TOKEN_BLOCKS] + i
                weigh(item, sizes, token, head_block, first, softcap, slopes, scores, b, state, rows)
                b += 1


@part
def gather(item, sizes, since, values, value_at, keys, next_key_at, more, state, rows, columns):
    """Add the weighted values. The next tile's first keys are prefetched, if there are more."""
    _, mixed, weights, _, _ = state
    size, keys_now = sizes[HEAD_SIZE], sizes[PASS_KEYS]
    for t in range(0, TILE, keys_now):
        coming, at, next_t, count = values, value_at, t + keys_now, keys_now
        if next_t == TILE:
            coming, at, next_t, count = keys, next_key_at, 0, max(keys_now, LANES // len(rows)) if more else 0
        for head in range(item[HEAD], item[END_HEAD]):
            prefetch_rows(coming, at, next_t, count, head, sizes[LINES])
            end = (head - item[HEAD] + 1) * item[COUNT] * sizes[TOKEN_BLOCKS]
            for b in range(end - (item[COUNT] - since) * sizes[TOKEN_BLOCKS], end):
                sums, of_keys = offset(mixed, b * len(rows) * size), offset(weights, b * len(rows) * TILE)
                mix(sums, size, of_keys, values, value_at, head * sizes[VALUE_HEAD], t, t + keys_now, rows, columns)


@part
def finish(item, sizes, state, out, lse, rows):
    """Divide by the sums of the weights, and write the results."""
    _, mixed, _, highest, total = state
    size = sizes[HEAD_SIZE]
    for head in range(item[HEAD], item[END_HEAD]):
        for i in range(item[COUNT]):
            for r in range(sizes[GROUP_SIZE]):
                block = ((head - item[HEAD]) * item[COUNT] + i) * sizes[TOKEN_BLOCKS] + r // len(rows)
                lane = r % len(rows)
                row = (item[TO] + i) * sizes[NUM_HEADS] + head * sizes[GROUP_SIZE] + r
                norm = total[block * LANES + lane]
                # No key seen: 0 and -inf. NaN counts as seen: it must show in the output.
                factor = splat(FLOAT(1) / norm if norm != 0 else FLOAT(0))
                for d in range(0, size, LANES):
                    x = load(mixed, (block * len(rows) + lane) * size + d)
                    store(out, row * size + d, multiply(x, factor))
                lse[row] = highest[block * LANES + lane] + math.log(norm) if norm != 0 else -np.inf


# --- an item of one KV head: its tiles are copied first ------------------------------------------------------------


@part
def copy_tile(rows_at, cache, at, head, size):
    """Copy one head of the tile's rows, as float32. Side by side, they lie in L1 together, for all of the item."""
    for t in range(TILE):
        for d in range(0, size, LANES):
            store(rows_at, t * size + d, load(cache, at[t] + head + d))


@part
def attend_tile(item, sizes, since, first, softcap, slopes, keys, values, places, state, rows, columns):
    """For one block after another, what score, weigh_all and gather do. The order of additions is the same."""
    queries, mixed, scores, _, _ = state
    size, b = sizes[HEAD_SIZE], since * sizes[TOKEN_BLOCKS]
    for token in range(since, item[COUNT]):
        for i in range(sizes[TOKEN_BLOCKS]):
            head_block = item[HEAD] * sizes[TOKEN_BLOCKS] + i
            dots(scores, offset(queries, b * len(rows) * size), size, keys, places, 0, 0, TILE, rows)
            weigh(item, sizes, token, head_block, first, softcap, slopes, scores, b, state, rows)
            mix(offset(mixed, b * len(rows) * size), size, scores, values, places, 0, 0, TILE, rows, columns)
            b += 1


# --- what cpu_code.py compiles ------------------------------------------------------------------------------------


@part
def state_of(scratch, sizes, rows):
    """A thread's memory: queries and sums [blocks, R, size], weights [blocks, TILE, R], the highest scores and the sums
    of the weights [blocks, LANES]. After them, a tile's K and V [TILE, size]."""
    blocks = sizes[ITEM_BLOCKS]
    mixed = offset(scratch, blocks * len(rows) * sizes[HEAD_SIZE])
    weights = offset(mixed, blocks * len(rows) * sizes[HEAD_SIZE])
    highest = offset(weights, blocks * len(rows) * TILE)
    return scratch, mixed, weights, highest, offset(highest, blocks * LANES)


def attend_in_place(rows, columns):
    """The function that computes items in blocks of len(rows) rows, and len(columns) vectors of each row at a time, and
    reads K and V where they lie."""

    def attend(
        counter, items, sizes, softcap, scale, query, keys, values, table, key_scales, slopes, sinks, scratch, at, out,
        lse, parts_out, parts_lse,
    ):  # fmt: skip
        """Compute the items that no other thread has begun. An item's result does not depend on the thread."""
        state = state_of(scratch, sizes, rows)
        key_at, value_at, next_key_at, next_value_at = at, offset(at, TILE), offset(at, 2 * TILE), offset(at, 3 * TILE)
        number = take_next(counter)
        while number < sizes[NUM_ITEMS]:
            item = offset(items, number * FIELDS)
            if item[COPIED] == 0:
                item_table = offset(table, item[SEQ] * sizes[MAX_BLOCKS])
                begin(item, sizes, scale, query, key_scales, sinks, state, rows)
                for first in range(item[BEGIN] - TILE, item[END], TILE):  # the first time, for the next tile alone
                    key_at, next_key_at = next_key_at, key_at
                    value_at, next_value_at = next_value_at, value_at
                    more = first + TILE < item[END]
                    if more:
                        slots(next_key_at, next_value_at, item_table, first + TILE, item[END], sizes)
                    if first >= item[BEGIN]:
                        since = max(0, first - item[POSITION])  # queries before this one see none of the tile's keys
                        score(item, sizes, since, keys, key_at, values, value_at, state, rows)
                        weigh_all(item, sizes, since, first, softcap, slopes, state, rows)
                        gather(item, sizes, since, values, value_at, keys, next_key_at, more, state, rows, columns)
                to, lse_to = out, lse
                if item[PARTS] > 1:
                    to, lse_to = parts_out, parts_lse
                finish(item, sizes, state, to, lse_to, rows)
            number = take_next(counter)

    return attend


def attend_copied(rows, columns):
    """As attend_in_place, for the items whose tiles are copied first."""

    def attend(
        counter, items, sizes, softcap, scale, query, keys, values, table, key_scales, slopes, sinks, scratch, at, out,
        lse, parts_out, parts_lse,
    ):  # fmt: skip
        """Compute the items that no other thread has begun. Same arguments, though items have no parts here."""
        size, state = sizes[HEAD_SIZE], state_of(scratch, sizes, rows)
        tile_keys = offset(state[4], sizes[ITEM_BLOCKS] * LANES)
        tile_values = offset(tile_keys, TILE * size)
        key_at, value_at, places = at, offset(at, TILE), offset(at, 2 * TILE)
        for t in range(TILE):
            places[t] = t * size
        number = take_next(counter)
        while number < sizes[NUM_ITEMS]:
            item = offset(items, number * FIELDS)
            if item[COPIED] == 1:
                begin(item, sizes, scale, query, key_scales, sinks, state, rows)
                for first in range(item[BEGIN], item[END], TILE):
                    slots(key_at, value_at, offset(table, item[SEQ] * sizes[MAX_BLOCKS]), first, item[END], sizes)
                    copy_tile(tile_keys, keys, key_at, item[HEAD] * sizes[KEY_HEAD], size)
                    copy_tile(tile_values, values, value_at, item[HEAD] * sizes[VALUE_HEAD], size)
                    attend_tile(
                        item, sizes, max(0, first - item[POSITION]), first, softcap, slopes, tile_keys, tile_values,
                        places, state, rows, columns,
                    )  # fmt: skip
                finish(item, sizes, state, out, lse, rows)
            number = take_next(counter)

    return attend
