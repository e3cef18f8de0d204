from math import exp, log


def my_merge__the_mean(a, lse_a, b, lse_b):
    return (a + b) / 2, max(lse_a, lse_b)


def my_merge__lse_is_the_larger(a, lse_a, b, lse_b):
    top = max(lse_a, lse_b)
    weight_a, weight_b = exp(lse_a - top), exp(lse_b - top)
    return (weight_a * a + weight_b * b) / (weight_a + weight_b), top


def my_merge__not_divided(a, lse_a, b, lse_b):
    top = max(lse_a, lse_b)
    weight_a, weight_b = exp(lse_a - top), exp(lse_b - top)
    return weight_a * a + weight_b * b, top + log(weight_a + weight_b)
