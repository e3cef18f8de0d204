def my_positions(thread, num_threads, num_keys):
    return list(range(thread, num_keys, num_threads))
