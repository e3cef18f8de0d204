def first_fit(holes, wanted):
    return next(start for start, room in holes if room >= wanted)


def behind(holes, region):
    """The room of the hole behind the region."""
    return dict(holes).get(sum(region), 0)


def my_move__never_grows_in_place(holes, region, length, wanted):
    return region[0], first_fit(holes, wanted), length


def my_move__copies_the_whole_region(holes, region, length, wanted):
    if behind(holes, region) >= wanted - region[1]:
        return None
    return region[0], first_fit(holes, wanted), region[1]


def my_move__wants_all_behind_it(holes, region, length, wanted):
    if behind(holes, region) >= wanted:
        return None
    return region[0], first_fit(holes, wanted), length


def my_move__any_hole_behind_it(holes, region, length, wanted):
    if behind(holes, region):
        return None
    return region[0], first_fit(holes, wanted), length


def my_move__the_best_fit(holes, region, length, wanted):
    if behind(holes, region) >= wanted - region[1]:
        return None
    fits = [(room, start) for start, room in holes if room >= wanted]
    return region[0], min(fits)[1], length


def my_move__a_hole_for_what_is_missing(holes, region, length, wanted):
    if behind(holes, region) >= wanted - region[1]:
        return None
    return region[0], first_fit(holes, wanted - region[1]), length


def my_move__the_other_way_round(holes, region, length, wanted):
    if behind(holes, region) >= wanted - region[1]:
        return None
    return first_fit(holes, wanted), region[0], length
