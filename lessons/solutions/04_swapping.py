def my_first_fit(holes, size):
    for start, room in holes:
        if room >= size:
            return start
    return None
