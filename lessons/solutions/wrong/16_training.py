def my_leaving__the_highest_layer(layers, count):
    pages = sorted(range(len(layers)), key=lambda page: -layers[page])
    return pages[:count]


def my_leaving__who_came_first(layers, count):
    return list(range(count))


def my_leaving__layers_not_pages(layers, count):
    return sorted(layers)[:count]


def my_leaving__the_last_saved_first(layers, count):
    pages = sorted(
        range(len(layers)), key=lambda page: (layers[page], -page)
    )
    return pages[:count]


def my_leaving__all_of_them(layers, count):
    return sorted(range(len(layers)), key=lambda page: layers[page])
