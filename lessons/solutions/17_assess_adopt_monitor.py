def my_fit(memory, weights, kv, length, size):
    blocks = (memory - weights) // (kv * size)
    return blocks // -(-length // size)
