def my_share__blocks_rounded_down(lengths, size):
    blocks = sum(max(1, length // size) for length in lengths)
    return sum(lengths) / (blocks * size)


def my_share__mean_of_the_shares(lengths, size):
    each = [length / (-(-length // size) * size) for length in lengths]
    return sum(each) / len(each)


def my_share__all_in_one_row_of_blocks(lengths, size):
    tokens = sum(lengths)
    return tokens / (-(-tokens // size) * size)


def my_share__one_block_more(lengths, size):
    blocks = sum(length // size + 1 for length in lengths)
    return sum(lengths) / (blocks * size)


def my_share__what_is_empty(lengths, size):
    blocks = sum(-(-length // size) for length in lengths)
    return 1 - sum(lengths) / (blocks * size)
