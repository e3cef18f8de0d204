def my_fit__slots_not_blocks(memory, weights, kv, length, size):
    return (memory - weights) // kv // length


def my_fit__rounds_blocks_down(memory, weights, kv, length, size):
    return (memory - weights) // (kv * size) // max(1, length // size)


def my_fit__forgets_the_weights(memory, weights, kv, length, size):
    return memory // (kv * size) // -(-length // size)


def my_fit__rounds_a_sequence_up_too_far(memory, weights, kv, length, size):
    return (memory - weights) // (kv * size) // (length // size + 1)


def my_fit__a_block_of_one_token(memory, weights, kv, length, size):
    return (memory - weights) // kv // -(-length // size)
