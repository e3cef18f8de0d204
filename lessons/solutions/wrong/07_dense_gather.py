import numpy as np


def padded(rows, seq_lens):
    shape = len(seq_lens), max(seq_lens), *rows[0].shape[1:]
    dense = np.zeros(shape, rows[0].dtype)
    for seq, (row, seq_len) in enumerate(zip(rows, seq_lens, strict=True)):
        dense[seq, :seq_len] = row[:seq_len]
    return dense


def by_slot(cache):
    return cache.reshape(-1, *cache.shape[2:])


def my_gather__keeps_the_whole_last_block(cache, block_tables, seq_lens):
    rows = [by_slot(cache[table]) for table in block_tables]
    return np.stack(rows)[:, : max(seq_lens)]


def my_gather__all_as_long_as_the_table(cache, block_tables, seq_lens):
    size = block_tables.shape[1] * cache.shape[1]
    rows = [by_slot(cache[table]) for table in block_tables]
    dense = np.zeros((len(rows), size, *cache.shape[2:]), cache.dtype)
    for seq, seq_len in enumerate(seq_lens):
        dense[seq, :seq_len] = rows[seq][:seq_len]
    return dense


def my_gather__takes_the_blocks_as_they_lie(cache, block_tables, seq_lens):
    rows = [by_slot(cache[np.sort(table)]) for table in block_tables]
    return padded(rows, seq_lens)


def my_gather__takes_entries_for_slots(cache, block_tables, seq_lens):
    rows = []
    for table, seq_len in zip(block_tables, seq_lens, strict=True):
        rows.append(by_slot(cache)[np.resize(table, seq_len)])
    return padded(rows, seq_lens)


def my_gather__the_first_table_for_all(cache, block_tables, seq_lens):
    rows = [by_slot(cache[block_tables[0]]) for _ in block_tables]
    return padded(rows, seq_lens)


def my_gather__ignores_the_tables(cache, block_tables, seq_lens):
    return padded([by_slot(cache) for _ in block_tables], seq_lens)
