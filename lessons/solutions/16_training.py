def my_moved_out(layers, budget):
    held, moved_out = [], []
    for page in range(len(layers)):
        if len(held) == budget:
            moved_out.append(min(held, key=lambda page: layers[page]))
            held.remove(moved_out[-1])
        held.append(page)
    return moved_out
