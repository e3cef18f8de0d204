def my_found(seen, prompt, size):
    same, most = 0, min(len(seen), len(prompt) - 1)
    while same < most and seen[same] == prompt[same]:
        same += 1
    return same // size * size
