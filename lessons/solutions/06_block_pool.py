def my_release(blocks, ref_count, free):
    for block in reversed(blocks):
        ref_count[block] -= 1
        if ref_count[block] == 0:
            free.append(block)
