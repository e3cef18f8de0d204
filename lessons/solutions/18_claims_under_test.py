def my_ratio(lengths, longest, size):
    reserved = longest * len(lengths)
    held = sum(-(-length // size) * size for length in lengths)
    return reserved / held
