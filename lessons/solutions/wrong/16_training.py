def leaving(layers, budget, key, own=False):
    """The pages that move out, the smallest key first."""
    held, moved_out = [], []
    for page in range(len(layers)):
        held += [page] if own else []
        if len(held) == budget + own:
            moved_out.append(min(held, key=key))
            held.remove(moved_out[-1])
        held += [] if own else [page]
    return moved_out


def my_moved_out__the_highest_layer(layers, budget):
    return leaving(layers, budget, lambda page: -layers[page])


def my_moved_out__the_first_saved(layers, budget):
    return leaving(layers, budget, lambda page: page)


def my_moved_out__the_last_saved_of_equals(layers, budget):
    return leaving(layers, budget, lambda page: (layers[page], -page))


def my_moved_out__the_new_page_may_leave(layers, budget):
    return leaving(layers, budget, lambda page: layers[page], own=True)


def my_moved_out__one_place_less(layers, budget):
    return leaving(layers, budget - 1, lambda page: layers[page])


def my_moved_out__layers_for_pages(layers, budget):
    pages = leaving(layers, budget, lambda page: layers[page])
    return [layers[page] for page in pages]


def my_moved_out__sorted_at_the_end(layers, budget):
    pages = sorted(range(len(layers)), key=lambda page: layers[page])
    return pages[: max(0, len(layers) - budget)]
