"""Attention backends as the parameters of tests that run a whole model."""

from __future__ import annotations

from typing import Any

import pytest

from paged_ref.core.attention.attention import backends
from paged_ref.core.device import on_gpu

ON_HOST = ("cpu", "cpu-simd", "trace")


def of_models(*names: str) -> list[Any]:
    """Those of the backends that work here. A model's arrays are where the device is: on a GPU, no backend that reads
    host memory can run it; without one, no backend of a GPU is there."""
    skipped = pytest.mark.skipif(on_gpu, reason="a GPU is in use; this backend reads host memory")
    found = []
    for name in names:
        if name in backends():
            marks = [pytest.mark.gpu] if name.startswith("cuda") else [skipped] if name in ON_HOST else []
            found.append(pytest.param(name, marks=marks))
    return found
