import numpy as np


def my_attention__does_not_scale(q, keys, values):
    weights = np.exp(keys @ q)
    return weights / weights.sum() @ values


def my_attention__divides_by_the_size_and_not_its_root(q, keys, values):
    weights = np.exp(keys @ q / len(q))
    return weights / weights.sum() @ values


def my_attention__weights_do_not_sum_to_one(q, keys, values):
    return np.exp(keys @ q / np.sqrt(len(q))) @ values


def my_attention__without_softmax(q, keys, values):
    scores = keys @ q / np.sqrt(len(q))
    return scores / scores.sum() @ values


def my_attention__leaves_out_the_new_token(q, keys, values):
    weights = np.exp(keys[:-1] @ q / np.sqrt(len(q)))
    return weights @ values[:-1] / max(weights.sum(), 1e-9)
