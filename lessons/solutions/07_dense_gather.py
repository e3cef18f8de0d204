def my_gather(cache, block_table, seq_len):
    pages = cache[block_table]
    return pages.reshape(-1, *cache.shape[2:])[:seq_len]
