def my_found__without_full_blocks(seen, prompt, size):
    same, most = 0, min(len(seen), len(prompt) - 1)
    while same < most and seen[same] == prompt[same]:
        same += 1
    return same


def my_found__the_last_token_too(seen, prompt, size):
    same, most = 0, min(len(seen), len(prompt))
    while same < most and seen[same] == prompt[same]:
        same += 1
    return same // size * size


def my_found__rounds_up(seen, prompt, size):
    same, most = 0, min(len(seen), len(prompt) - 1)
    while same < most and seen[same] == prompt[same]:
        same += 1
    return -(-same // size) * size


def my_found__goes_on_after_a_difference(seen, prompt, size):
    pairs = zip(seen, prompt[:-1], strict=False)
    same = sum(one == other for one, other in pairs)
    return same // size * size


def my_found__counts_blocks(seen, prompt, size):
    same, most = 0, min(len(seen), len(prompt) - 1)
    while same < most and seen[same] == prompt[same]:
        same += 1
    return same // size


def my_found__the_lengths_only(seen, prompt, size):
    return min(len(seen), len(prompt) - 1) // size * size
