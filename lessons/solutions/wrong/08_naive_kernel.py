def my_positions__gives_each_thread_a_run(thread, num_threads, num_keys):
    each = -(-num_keys // num_threads)
    return list(range(thread * each, min(num_keys, (thread + 1) * each)))


def my_positions__takes_the_first_tile_only(thread, num_threads, num_keys):
    return [thread] if thread < num_keys else []


def my_positions__goes_past_the_last_key(thread, num_threads, num_keys):
    tiles = -(-num_keys // num_threads)
    return [tile * num_threads + thread for tile in range(tiles)]
