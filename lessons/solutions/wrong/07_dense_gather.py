import numpy as np


def my_gather__keeps_the_whole_last_block(cache, block_table, seq_len):
    return cache[block_table].reshape(-1, *cache.shape[2:])


def my_gather__takes_the_blocks_as_they_lie(cache, block_table, seq_len):
    return cache[np.sort(block_table)].reshape(-1, *cache.shape[2:])[
        :seq_len
    ]


def my_gather__takes_entries_of_the_table_for_slots(
    cache, block_table, seq_len
):
    slots = np.resize(block_table, seq_len)
    return cache.reshape(-1, *cache.shape[2:])[slots]


def my_gather__ignores_the_table(cache, block_table, seq_len):
    return cache.reshape(-1, *cache.shape[2:])[:seq_len]
