def my_runs(block_table, seq_len, block_size):
    runs = []
    for begin in range(0, seq_len, block_size):
        block = block_table[begin // block_size]
        runs.append((block * block_size, min(block_size, seq_len - begin)))
    return runs
