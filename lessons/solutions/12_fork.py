def my_append(blocks, ref_count, free):
    copies = []
    if ref_count[blocks[-1]] > 1:
        copies.append((blocks[-1], free.pop()))
        ref_count[blocks[-1]] -= 1
        blocks[-1] = copies[0][1]
        ref_count[blocks[-1]] = 1
    return copies
