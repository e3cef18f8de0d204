# mypy: ignore-errors
"""The loop of the backend `cpu-simd`, compiled by Numba. Its order, from the outside in, and why:

    item   a few queries of one sequence, with the keys that they may see. Threads share the items.
     tile    32 keys. Their slots are looked up once, and this is all that paging costs.
      keys     4 keys at a time, in all heads: memory is read in the order in which it lies, which the hardware follows
               with its own prefetches. (Where many queries share the keys, the item has one head, and the tile's rows
               are copied together, since each is read many times.)
       block     R query heads of one token, which share a KV head: each K row is read once for all of them. LANES
                 sums, of R rows by LANES // R keys, are what fits in the registers.

The softmax is online, one step for each tile (Milakov and Gimelshein 2018), so scores are kept for one tile only.
They lie key by key, [TILE, R] for a block, so that the softmax of R rows is arithmetic of whole vectors.

Memory is reached through pointers, and places are counted in elements. cpu_vectors.py has the vectors.
"""

from __future__ import annotations  # noqa: I001  (names of the vectors, several a line)

import math

import numpy as np
from numba import njit

from .cpu_machine import LANES, PART_KEYS, TILE
from .cpu_vectors import (
    add, add_products, add_weighted, any_greater, exp, fold_maximum, hide, key_numbers, load, load_rows, maximum,
    multiply, no_sums, offset, prefetch, repeat, scale_rows, splat, store, store_rows, subtract, sum_each, sum_keys,
    take_next,
)  # fmt: skip

FLOAT = np.float32
LOWEST = FLOAT(-3.0e38)  # stands for -inf, since -inf - -inf would be NaN
part = njit(inline="always")  # written into its caller before anything is compiled: LLVM sees one function, once

# One piece of work: `count` queries of sequence `seq` from row `query` on, the first at `position` in its sequence,
# over the keys from `begin` to before `end`, in `heads` KV heads from `head` on. Where a query's keys are split, this
# is part `part` of `parts`, and its result goes to the rows from `to` on of the partial results; else to the queries'
# own rows.
SEQ, QUERY, COUNT, POSITION, BEGIN, END, HEAD, HEADS, PART, PARTS, TO, FIELDS = range(12)  # FIELDS: how many
# The numbers of a call. Strides are in elements: of a block, a slot, a head, a number.
(
    NUM_ITEMS, NUM_HEADS, NUM_KV_HEADS, GROUP_SIZE, HEAD_SIZE, PADDED, WINDOW, BLOCK_SIZE, MAX_BLOCKS, IN_PLACE,
    PASS_KEYS, LINES, PLAIN, KEY_BLOCK, KEY_SLOT, KEY_HEAD, KEY_STEP, VALUE_BLOCK, VALUE_SLOT, VALUE_HEAD, VALUE_STEP,
    MOST_BLOCKS, TOKEN_BLOCKS,
) = range(23)  # fmt: skip


@part
def slots(key_at, value_at, table, first, last, sizes):
    """Where the rows of the tile at key `first` begin: slot_of, times the strides. Past the end, the last key is
    repeated: a short tile then needs no loops of its own, and reads only its keys."""
    block, offset = first // sizes[BLOCK_SIZE], first % sizes[BLOCK_SIZE]
    for t in range(TILE):
        if first + t < last:
            key_at[t] = table[block] * sizes[KEY_BLOCK] + offset * sizes[KEY_SLOT]
            value_at[t] = table[block] * sizes[VALUE_BLOCK] + offset * sizes[VALUE_SLOT]
            offset += 1
            if offset == sizes[BLOCK_SIZE]:
                block, offset = block + 1, 0
        else:
            key_at[t], value_at[t] = key_at[t - 1], value_at[t - 1]


@part
def prefetch_rows(cache, at, first, count, head, lines):
    """Prefetch the head-th few cache lines of the tile's rows from number `first` on, `count` rows."""
    for line in range(head * lines, (head + 1) * lines):
        for t in range(first, first + count):
            prefetch(cache, at[t], line)


@part
def copy_rows(copy, cache, at, head, step, size, padded):
    """Copy one head of a tile to copy [TILE, padded], from any stride. What lies beyond `size` stays 0."""
    for t in range(TILE):
        for d in range(size):
            copy[t * padded + d] = cache[at[t] + head + d * step]


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
        store(highest, 0, top)
        store(total, 0, multiply(load(total, 0), shrink))
        for d in range(0, size, LANES):
            store_rows(mixed, d, size, rows, scale_rows(load_rows(mixed, d, size, rows, (0,)), rows, shrink))
    for i in range(0, TILE * len(rows), LANES):
        store(weights, i, exp(subtract(load(weights, i), base)))
    store(total, 0, add(load(total, 0), sum_keys(weights, rows)))


@part
def mix(mixed, size, weights, values, at, head, first, last, rows, columns):
    """R rows of `mixed` += weights * values, for the tile's keys from `first` to before `last`, key by key."""
    for d in range(0, size, len(columns) * LANES):
        sums = load_rows(mixed, d, size, rows, columns)
        for t in range(first, last):
            sums = add_weighted(sums, rows, weights, t * len(rows), values, at[t] + head + d)
        store_rows(mixed, d, size, rows, sums)


# --- the phases of an item. Its block number b is of (head, token, rows), in this order ---------------------------


@part
def begin(item, sizes, sinks, state, rows):
    """Before the first key: only sinks are seen. A sink is a key without a value."""
    mixed, _, highest, total = state
    block_size = len(rows) * sizes[PADDED]
    for b in range(item[HEADS] * item[COUNT] * sizes[TOKEN_BLOCKS]):
        sink = splat(FLOAT(-np.inf))
        if item[PART] == 0:
            kv_head = item[HEAD] + b // (item[COUNT] * sizes[TOKEN_BLOCKS])
            head = kv_head * sizes[GROUP_SIZE] + b % sizes[TOKEN_BLOCKS] * len(rows)
            sink = repeat(sinks, head, rows)
        store(highest, b * LANES, sink)
        store(total, b * LANES, exp(subtract(sink, maximum(sink, splat(LOWEST)))))
        for d in range(b * block_size, (b + 1) * block_size, LANES):
            store(mixed, d, splat(FLOAT(0)))


@part
def score(item, sizes, since, query, keys, at, t, dot_keys, head, place, weights, rows):
    """The products of KV head `head` with the tile's keys from t on, for the item's queries from number `since` on.
    The head's numbers begin at `place` in each row."""
    size, num_blocks = sizes[PADDED], sizes[TOKEN_BLOCKS]
    b = ((head - item[HEAD]) * item[COUNT] + since) * num_blocks
    for token in range(item[QUERY] + since, item[QUERY] + item[COUNT]):
        row = token * sizes[NUM_HEADS] + head * sizes[GROUP_SIZE]
        for _ in range(num_blocks):
            scores = offset(weights, b * len(rows) * TILE)
            dots(scores, offset(query, row * size), size, keys, at, place, t, t + dot_keys, rows)
            row, b = row + len(rows), b + 1


@part
def weigh(item, sizes, since, first, softcap, slopes, state, rows):
    """From products to weights, for the whole tile at key `first`, all heads, and the queries from `since` on."""
    mixed, weights, highest, total = state
    size, num_blocks, end = sizes[PADDED], sizes[TOKEN_BLOCKS], item[END]
    for head in range(item[HEAD], item[HEAD] + item[HEADS]):
        b = ((head - item[HEAD]) * item[COUNT] + since) * num_blocks
        for position in range(item[POSITION] + since, item[POSITION] + item[COUNT]):
            seen = first + TILE <= min(end, position + 1) and first > position - sizes[WINDOW]
            for sub in range(num_blocks):
                scores = offset(weights, b * len(rows) * TILE)
                if not seen or sizes[PLAIN] == 0:
                    slope = repeat(slopes, head * sizes[GROUP_SIZE] + sub * len(rows), rows)
                    adjust(scores, position, first, end, sizes[WINDOW], softcap, slope, rows)
                sums = offset(mixed, b * len(rows) * size)
                softmax(scores, offset(highest, b * LANES), offset(total, b * LANES), sums, size, rows)
                b += 1


@part
def finish(item, sizes, state, out, lse, rows):
    """Divide by the sums of the weights, and write the results."""
    mixed, _, highest, total = state
    size = sizes[PADDED]
    for i in range(item[HEADS] * item[COUNT]):
        head, token = item[HEAD] + i // item[COUNT], item[TO] + i % item[COUNT]
        for r in range(sizes[GROUP_SIZE]):
            block, lane = i * sizes[TOKEN_BLOCKS] + r // len(rows), r % len(rows)
            row = token * sizes[NUM_HEADS] + head * sizes[GROUP_SIZE] + r
            norm = total[block * LANES + lane]
            # No key seen: 0 and -inf. NaN counts as seen: it must show in the output.
            factor = FLOAT(1) / norm if norm != 0 else FLOAT(0)
            for d in range(0, size, LANES):
                x = load(mixed, (block * len(rows) + lane) * size + d)
                store(out, row * size + d, multiply(x, splat(factor)))
            lse[row] = highest[block * LANES + lane] + math.log(norm) if norm != 0 else -np.inf


def attend_items(rows, columns):
    """The function that computes items in blocks of len(rows) rows, and len(columns) vectors of each row at a time."""

    def attend(
        counter, items, sizes, softcap, query, keys, values, table, slopes, sinks, scratch, copy, at, out, lse,
        parts_out, parts_lse,
    ):  # fmt: skip
        """Compute the items that no other thread has begun. An item's result does not depend on the thread."""
        size, most = sizes[PADDED], sizes[MOST_BLOCKS]
        weights = offset(scratch, most * len(rows) * size)
        highest = offset(weights, most * len(rows) * TILE)
        # [blocks, R, size], [blocks, TILE, R], [blocks, LANES], [blocks, LANES]
        state = scratch, weights, highest, offset(highest, most * LANES)
        key_at, value_at, copy_at = at, offset(at, TILE), offset(at, 2 * TILE)
        next_key_at, next_value_at = offset(at, 3 * TILE), offset(at, 4 * TILE)
        for t in range(TILE):
            copy_at[t] = t * size
        number = take_next(counter)
        while number < sizes[NUM_ITEMS]:
            item = offset(items, number * FIELDS)
            in_place = sizes[IN_PLACE] != 0 and item[HEADS] == sizes[NUM_KV_HEADS]
            mix_keys = sizes[PASS_KEYS] if in_place else TILE
            dot_keys = max(mix_keys, LANES // len(rows))
            heads = range(item[HEAD], item[HEAD] + item[HEADS])
            head_blocks = item[COUNT] * sizes[TOKEN_BLOCKS]
            item_table = offset(table, item[SEQ] * sizes[MAX_BLOCKS])
            k, k_at, v, v_at = keys, copy_at, values, copy_at
            if not in_place:
                k, v = copy, copy
            begin(item, sizes, sinks, state, rows)
            if item[BEGIN] < item[END]:
                slots(next_key_at, next_value_at, item_table, item[BEGIN], item[END], sizes)
            for first in range(item[BEGIN], item[END], TILE):
                key_at, next_key_at = next_key_at, key_at
                value_at, next_value_at = next_value_at, value_at
                if in_place:
                    k_at, v_at = key_at, value_at
                more = first + TILE < item[END]
                if more:
                    slots(next_key_at, next_value_at, item_table, first + TILE, item[END], sizes)
                since = max(0, first - item[POSITION])  # queries before this one see none of the tile's keys

                for t in range(0, TILE, dot_keys):
                    for head in heads:
                        place = head * sizes[KEY_HEAD]
                        if not in_place:
                            copy_rows(copy, keys, key_at, place, sizes[KEY_STEP], sizes[HEAD_SIZE], size)
                            place = 0
                        elif t + dot_keys < TILE:
                            prefetch_rows(keys, key_at, t + dot_keys, dot_keys, head, sizes[LINES])
                        else:
                            prefetch_rows(values, value_at, 0, mix_keys, head, sizes[LINES])
                        score(item, sizes, since, query, k, k_at, t, dot_keys, head, place, weights, rows)

                weigh(item, sizes, since, first, softcap, slopes, state, rows)

                for t in range(0, TILE, mix_keys):
                    for head in heads:
                        place = head * sizes[VALUE_HEAD]
                        if not in_place:
                            copy_rows(copy, values, value_at, place, sizes[VALUE_STEP], sizes[HEAD_SIZE], size)
                            place = 0
                        elif t + mix_keys < TILE:
                            prefetch_rows(values, value_at, t + mix_keys, mix_keys, head, sizes[LINES])
                        elif more:
                            prefetch_rows(keys, next_key_at, 0, dot_keys, head, sizes[LINES])
                        start = (head - item[HEAD]) * head_blocks
                        for b in range(start + since * sizes[TOKEN_BLOCKS], start + head_blocks):
                            sums, of_keys = offset(scratch, b * len(rows) * size), offset(weights, b * len(rows) * TILE)
                            mix(sums, size, of_keys, v, v_at, place, t, t + mix_keys, rows, columns)

            result, result_lse = (out, lse) if item[PARTS] == 1 else (parts_out, parts_lse)
            finish(item, sizes, state, result, result_lse, rows)
            number = take_next(counter)

    return attend


def plan(found, items, seq_lens, query_start_loc, num_seqs, window, num_kv_heads, most_queries, few_queries):
    """Fill `items`. found [3] = how many there are, the rows of partial results, and the query-key products."""
    count, split_rows, products = 0, 0, 0
    for s in range(num_seqs):
        query_len = query_start_loc[s + 1] - query_start_loc[s]
        few = query_len <= few_queries
        for first in range(0, query_len, few_queries if few else most_queries):
            queries = query_len if few else min(most_queries, query_len - first)
            position = seq_lens[s] - query_len + first
            begin, end = max(0, position - window + 1), max(0, position + queries)
            parts = max(1, -(-(end - begin) // PART_KEYS)) if few else 1
            heads = num_kv_heads if few else 1
            products += queries * max(0, end - begin)
            for part in range(parts):
                for head in range(0, num_kv_heads, heads):
                    item = offset(items, count * FIELDS)
                    item[SEQ], item[QUERY], item[COUNT], item[POSITION] = (
                        s,
                        query_start_loc[s] + first,
                        queries,
                        position,
                    )
                    item[BEGIN] = begin + part * PART_KEYS
                    item[END] = min(end, item[BEGIN] + PART_KEYS) if parts > 1 else end
                    item[HEAD], item[HEADS], item[PART], item[PARTS] = head, heads, part, parts
                    item[TO] = split_rows if parts > 1 else item[QUERY]
                    count += 1
                if parts > 1:
                    split_rows += queries
    found[0], found[1], found[2] = count, split_rows, products


def merge(items, num_items, num_heads, size, parts_out, parts_lse, out, lse):
    """Join the parts of each split query, as merge_states does: a part weighs e**lse."""
    for i in range(num_items):
        item = offset(items, i * FIELDS)
        if item[PART] == 0 and item[PARTS] > 1:
            rows = item[COUNT] * num_heads  # of a part; the next part begins as many rows further
            for r in range(rows):
                first, last = item[TO] * num_heads + r, item[TO] * num_heads + r + item[PARTS] * rows
                target = item[QUERY] * num_heads + r
                top = FLOAT(-np.inf)
                for row in range(first, last, rows):
                    top = max(top, parts_lse[row])
                total = FLOAT(0)
                for d in range(size):
                    out[target * size + d] = FLOAT(0)
                for row in range(first, last, rows):
                    weight = FLOAT(math.exp(parts_lse[row] - top)) if top != -np.inf else FLOAT(0)
                    total += weight
                    for d in range(size):
                        out[target * size + d] += weight * parts_out[row * size + d]
                for d in range(size):
                    out[target * size + d] /= total if total != 0 else FLOAT(1)
                lse[target] = top + math.log(total) if total != 0 else FLOAT(-np.inf)


def bounds(wrong, seq_lens, query_start_loc, table, num_seqs, max_blocks, num_tokens, num_blocks, block_size):
    """wrong[0] = 1 if a length, a query count or a block id is out of bounds."""
    if query_start_loc[0] != 0 or query_start_loc[num_seqs] != num_tokens:
        wrong[0] = 1
    for s in range(num_seqs):
        needed = (seq_lens[s] + block_size - 1) // block_size
        if seq_lens[s] < 0 or query_start_loc[s + 1] < query_start_loc[s] or needed > max_blocks:
            wrong[0] = 1
        else:
            for b in range(s * max_blocks, s * max_blocks + needed):
                if table[b] < 0 or table[b] >= num_blocks:
                    wrong[0] = 1
