"""Swaps on a stream of their own: run here on streams made of Python, in every order that the events allow."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from support.streams import pretend_gpu, run

from paged_ref.core.memory.manager import Transfer
from paged_ref.tuned import copies, kv
from paged_ref.tuned.kv import TunedKV


@pytest.mark.parametrize("max_pitch", [copies.MAX_PITCH, 10])
@pytest.mark.parametrize("seed", range(20))
def test_no_block_is_reused_before_its_copy(seed: int, max_pitch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    compute = pretend_gpu(monkeypatch, copies, kv)
    monkeypatch.setattr(copies, "MAX_PITCH", max_pitch)
    storage = TunedKV(3, 6, 2, 1, 4, "float32", num_host_blocks=5)
    first = np.random.default_rng(seed).standard_normal(storage.device.shape).astype(np.float32)
    seen = []

    def write(value: Any) -> Callable[[], None]:
        return lambda: storage.device.__setitem__(slice(None), value)

    compute.put(write(first))
    storage.apply([Transfer("swap_out", 1, 3, 2), Transfer("swap_out", 5, 0)])
    compute.put(write(-1))  # the next step: it takes all blocks
    storage.apply([Transfer("swap_in", 3, 4, 2)])
    storage.apply([Transfer("swap_in", 0, 0), Transfer("swap_out", 3, 0)])
    compute.put(lambda: seen.append(storage.device.copy()))
    swaps = storage.copies._stream
    run([compute, swaps], random.Random(seed))
    (device,) = seen
    np.testing.assert_array_equal(device[:, :, [4, 5, 0]], first[:, :, [1, 2, 5]])
    assert (device[:, :, [1, 2, 3]] == -1).all()
    assert (storage.host[:, :, 0] == -1).all()
    np.testing.assert_array_equal(storage.host[:, :, 3:5], first[:, :, 1:3])
    assert np.isnan(storage.host[:, :, 1:3]).all()
