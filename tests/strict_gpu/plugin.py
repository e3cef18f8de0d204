"""`pytest -p strict_gpu.plugin`: the tests run with the stand-in in place."""

from __future__ import annotations

import pytest

import strict_gpu
from strict_gpu import order

strict_gpu.install()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown() -> None:
    order.forget()
