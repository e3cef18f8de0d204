from paged_ref.extras.prefix_cache import block_digests


def my_keys(tokens, size, parent=b""):
    keys = []
    for start in range(0, len(tokens) - size + 1, size):
        parent = next(
            block_digests(tokens[start : start + size], size, parent)
        )
        keys.append(parent)
    return keys
