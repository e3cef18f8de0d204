import numpy as np


def my_parts__cut_by_outputs(x, weight, size):
    return [x @ part.T for part in np.split(weight, [1])][:size]


def my_parts__every_rank_has_all_inputs(x, weight, size):
    return [x @ weight.T for _ in range(size)]


def my_parts__every_second_input(x, weight, size):
    return [
        x[:, rank::size] @ weight[:, rank::size].T for rank in range(size)
    ]


def my_parts__the_whole_product(x, weight, size):
    return x @ weight.T


def my_parts__the_parts_already_summed(x, weight, size):
    columns = np.split(np.arange(x.shape[1]), size)
    return sum(x[:, part] @ weight[:, part].T for part in columns)
