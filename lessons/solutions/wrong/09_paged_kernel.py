def my_runs__takes_the_last_block_as_full(block_table, seq_len, block_size):
    count = -(-seq_len // block_size)
    return [
        (block * block_size, block_size) for block in block_table[:count]
    ]


def my_runs__gives_blocks_for_slots(block_table, seq_len, block_size):
    begins = range(0, seq_len, block_size)
    blocks = block_table[: len(begins)]
    return [
        (block, min(block_size, seq_len - begin))
        for block, begin in zip(blocks, begins, strict=True)
    ]


def my_runs__forgets_the_last_block(block_table, seq_len, block_size):
    return [
        (block * block_size, block_size)
        for block in block_table[: seq_len // block_size]
    ]


def my_runs__has_an_empty_run_after_a_full_block(
    block_table, seq_len, block_size
):
    return [
        (
            block_table[i] * block_size,
            min(block_size, seq_len - i * block_size),
        )
        for i in range(min(seq_len // block_size + 1, len(block_table)))
    ]


def my_runs__in_the_order_of_the_slots(block_table, seq_len, block_size):
    begins = range(0, seq_len, block_size)
    return sorted(
        (
            block_table[begin // block_size] * block_size,
            min(block_size, seq_len - begin),
        )
        for begin in begins
    )
