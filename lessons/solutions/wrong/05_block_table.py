def my_slot_of__without_the_table(block_table, position, block_size):
    return position


def my_slot_of__forgets_the_offset(block_table, position, block_size):
    return block_table[position // block_size] * block_size


def my_slot_of__takes_the_block_for_its_first_slot(
    block_table, position, block_size
):
    return block_table[position // block_size] + position % block_size


def my_slot_of__counts_from_the_first_block(
    block_table, position, block_size
):
    return block_table[0] * block_size + position


def my_slot_of__divides_twice(block_table, position, block_size):
    block = block_table[position // block_size]
    return block * block_size + position // block_size
