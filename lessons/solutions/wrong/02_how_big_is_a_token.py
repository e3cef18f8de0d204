def my_kv_bytes_per_token__counts_the_query_heads(config, itemsize):
    return (
        2
        * config.num_layers
        * config.num_heads
        * config.head_size
        * itemsize
    )


def my_kv_bytes_per_token__forgets_the_values(config, itemsize):
    return (
        config.num_layers
        * config.num_kv_heads
        * config.head_size
        * itemsize
    )


def my_kv_bytes_per_token__is_of_one_layer(config, itemsize):
    return 2 * config.num_kv_heads * config.head_size * itemsize


def my_kv_bytes_per_token__counts_elements(config, itemsize):
    return 2 * config.num_layers * config.num_kv_heads * config.head_size


def my_kv_bytes_per_token__rounds_the_heads(config, itemsize):
    shared = config.num_heads // config.num_kv_heads
    return 2 * config.num_layers * shared * config.head_size * itemsize
