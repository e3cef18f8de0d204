from paged_ref.core.device import xp


def my_gather(cache, block_tables, seq_lens):
    shape = len(seq_lens), int(max(seq_lens)), *cache.shape[2:]
    dense = xp.zeros(shape, cache.dtype)
    for seq, seq_len in enumerate(seq_lens):
        rows = cache[block_tables[seq]].reshape(-1, *cache.shape[2:])
        dense[seq, :seq_len] = rows[:seq_len]
    return dense
