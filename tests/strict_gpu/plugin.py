"""`pytest -p strict_gpu.plugin`: the tests run with the stand-in in place."""

from __future__ import annotations

import pytest

import strict_gpu
from strict_gpu import memory, order

strict_gpu.install()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown() -> None:
    """One test's operations and free memory are nothing to the next."""
    order.forget()
    memory.pool.free_all_blocks()
