def my_move(holes, region, length, wanted):
    start, size = region
    for hole, room in holes:
        if hole == start + size and room >= wanted - size:
            return None
    for hole, room in holes:
        if room >= wanted:
            return start, hole, length
