def my_append__writes_in_place(blocks, ref_count, free):
    return []


def my_append__copies_always(blocks, ref_count, free):
    old, new = blocks[-1], free.pop()
    ref_count[old] -= 1
    ref_count[new] = 1
    blocks[-1] = new
    return [(old, new)]


def my_append__keeps_counting_the_old(blocks, ref_count, free):
    if ref_count[blocks[-1]] == 1:
        return []
    old, new = blocks[-1], free.pop()
    ref_count[new] = 1
    blocks[-1] = new
    return [(old, new)]


def my_append__frees_what_others_hold(blocks, ref_count, free):
    if ref_count[blocks[-1]] == 1:
        return []
    old, new = blocks[-1], free.pop()
    ref_count[old], ref_count[new] = 0, 1
    free.append(old)
    blocks[-1] = new
    return [(old, new)]


def my_append__forgets_the_table(blocks, ref_count, free):
    if ref_count[blocks[-1]] == 1:
        return []
    old, new = blocks[-1], free.pop()
    ref_count[old] -= 1
    ref_count[new] = 1
    return [(old, new)]
