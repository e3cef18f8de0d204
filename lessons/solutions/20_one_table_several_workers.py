import numpy as np


def my_parts(x, weight, size):
    columns = np.split(np.arange(x.shape[1]), size)
    return [x[:, part] @ weight[:, part].T for part in columns]
