def my_leaving(layers, count):
    pages = sorted(range(len(layers)), key=lambda page: layers[page])
    return pages[:count]
