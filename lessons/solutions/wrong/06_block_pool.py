def my_release__the_first_block_first(blocks, ref_count, free):
    for block in blocks:
        ref_count[block] -= 1
        if ref_count[block] == 0:
            free.append(block)


def my_release__frees_what_others_hold(blocks, ref_count, free):
    for block in reversed(blocks):
        ref_count[block] -= 1
        free.append(block)


def my_release__sets_the_count_to_zero(blocks, ref_count, free):
    for block in reversed(blocks):
        ref_count[block] = 0
        free.append(block)


def my_release__forgets_the_count(blocks, ref_count, free):
    free.extend(reversed(blocks))


def my_release__frees_one_too_early(blocks, ref_count, free):
    for block in reversed(blocks):
        if ref_count[block] <= 2:
            free.append(block)
        ref_count[block] -= 1


def my_release__at_the_wrong_end(blocks, ref_count, free):
    for block in reversed(blocks):
        ref_count[block] -= 1
        if ref_count[block] == 0:
            free.insert(0, block)


def my_release__never_frees(blocks, ref_count, free):
    for block in reversed(blocks):
        ref_count[block] -= 1
