def my_kv_bytes_per_token(config, itemsize):
    numbers = config.num_layers * config.num_kv_heads * config.head_size
    return 2 * numbers * itemsize
