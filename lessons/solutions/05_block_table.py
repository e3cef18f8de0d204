def my_slot_of(block_table, position, block_size):
    block = block_table[position // block_size]
    return block * block_size + position % block_size
