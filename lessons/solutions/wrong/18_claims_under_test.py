def my_ratio__without_blocks(lengths, longest, size):
    return longest * len(lengths) / sum(lengths)


def my_ratio__blocks_rounded_down(lengths, longest, size):
    blocks = sum(max(1, length // size) for length in lengths)
    return longest * len(lengths) / (blocks * size)


def my_ratio__the_other_way_round(lengths, longest, size):
    blocks = sum(-(-length // size) for length in lengths)
    return blocks * size / (longest * len(lengths))


def my_ratio__mean_of_the_ratios(lengths, longest, size):
    each = [longest / (-(-length // size) * size) for length in lengths]
    return sum(each) / len(each)


def my_ratio__all_in_one_row_of_blocks(lengths, longest, size):
    tokens = sum(lengths)
    return longest * len(lengths) / (-(-tokens // size) * size)


def my_ratio__one_block_more(lengths, longest, size):
    blocks = sum(length // size + 1 for length in lengths)
    return longest * len(lengths) / (blocks * size)


def my_ratio__one_region(lengths, longest, size):
    return longest / sum(-(-length // size) * size for length in lengths)
