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


def my_merge__weights_are_the_lse(a, lse_a, b, lse_b):
    top = max(lse_a, lse_b)
    share = lse_a / (lse_a + lse_b) if lse_b > -100 else 1.0
    lse = top + log(exp(lse_a - top) + exp(lse_b - top))
    return share * a + (1 - share) * b, lse


def my_merge__adds_the_lse(a, lse_a, b, lse_b):
    top = max(lse_a, lse_b)
    weight_a, weight_b = exp(lse_a - top), exp(lse_b - top)
    total = weight_a + weight_b
    return (weight_a * a + weight_b * b) / total, lse_a + lse_b
