def my_pow2_region(prompt_len, max_output):
    size = 1
    while size < max_output:
        size *= 2
    return prompt_len + size
