def my_first_fit__takes_the_best_fit(holes, size):
    fits = [(room, start) for start, room in holes if room >= size]
    return min(fits)[1] if fits else None


def my_first_fit__wants_one_slot_too_many(holes, size):
    for start, room in holes:
        if room > size:
            return start
    return None


def my_first_fit__takes_the_last(holes, size):
    starts = [start for start, room in holes if room >= size]
    return starts[-1] if starts else None


def my_first_fit__looks_at_the_first_hole_only(holes, size):
    return holes[0][0] if holes and holes[0][1] >= size else None
