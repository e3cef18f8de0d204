"""How many threads NumPy's BLAS may use in a step.

Threads that wait for each other take longer than a small product takes on one thread: on two busy cores a step of the
embedded model took 55 ms with two BLAS threads and 2 ms with one.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from ..core.model.config import ModelConfig

SMALL = 1 << 18  # numbers in a weight matrix: up to here, one thread is as fast as several
SETTINGS = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS")


def limit_for(config: ModelConfig) -> Callable[[], AbstractContextManager[object]]:
    """What a step of this model runs in: one BLAS thread where its products are small. A number of threads that the
    environment names stays as it is, and so do all where threadpoolctl is not installed."""
    if config.hidden_size * config.intermediate_size > SMALL or any(name in os.environ for name in SETTINGS):
        return nullcontext
    try:
        from threadpoolctl import ThreadpoolController
    except ImportError:
        return nullcontext
    blas = ThreadpoolController().select(user_api="blas")
    return lambda: blas.limit(limits=1)
