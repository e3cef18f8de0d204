def my_share(lengths, size):
    blocks = sum(-(-length // size) for length in lengths)
    return sum(lengths) / (blocks * size)
