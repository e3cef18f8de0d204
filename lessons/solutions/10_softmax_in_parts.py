from math import exp, log


def my_merge(a, lse_a, b, lse_b):
    top = max(lse_a, lse_b)
    weight_a, weight_b = exp(lse_a - top), exp(lse_b - top)
    total = weight_a + weight_b
    return (weight_a * a + weight_b * b) / total, top + log(total)
