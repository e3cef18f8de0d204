def my_pow2_region__rounds_the_whole_length(prompt_len, max_output):
    return 1 << (prompt_len + max_output - 1).bit_length()


def my_pow2_region__doubles_once_too_often(prompt_len, max_output):
    size = 1
    while size <= max_output:
        size *= 2
    return prompt_len + size


def my_pow2_region__rounds_down(prompt_len, max_output):
    return prompt_len + (1 << (max_output.bit_length() - 1))


def my_pow2_region__forgets_the_prompt(prompt_len, max_output):
    return 1 << (max_output - 1).bit_length()


def my_pow2_region__reserves_the_limit(prompt_len, max_output):
    return prompt_len + max_output
