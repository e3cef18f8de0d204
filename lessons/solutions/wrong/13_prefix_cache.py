from paged_ref.extras.prefix_cache import block_digests


def link(parent, tokens):
    return next(block_digests(tokens, len(tokens), parent))


def my_keys__without_the_parent(tokens, size, parent=b""):
    starts = range(0, len(tokens) - size + 1, size)
    return [link(b"", tokens[start : start + size]) for start in starts]


def my_keys__all_have_the_first_parent(tokens, size, parent=b""):
    starts = range(0, len(tokens) - size + 1, size)
    return [link(parent, tokens[start : start + size]) for start in starts]


def my_keys__the_last_block_though_not_full(tokens, size, parent=b""):
    keys = []
    for start in range(0, len(tokens), size):
        parent = link(parent, tokens[start : start + size])
        keys.append(parent)
    return keys


def my_keys__forgets_the_last_full_block(tokens, size, parent=b""):
    keys = []
    for start in range(0, len(tokens) - size, size):
        parent = link(parent, tokens[start : start + size])
        keys.append(parent)
    return keys


def my_keys__one_key_for_all(tokens, size, parent=b""):
    full = len(tokens) // size * size
    return [link(parent, tokens[:full])] if full else []
