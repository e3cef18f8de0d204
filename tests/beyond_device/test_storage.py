"""Pages move in the order of their transfers, and on a GPU no block is used again before its copy is made."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from support.streams import pretend_gpu, run

from paged_ref.beyond_device import storage as module
from paged_ref.beyond_device.storage import PageStorage, joined
from paged_ref.core.device import to_host
from paged_ref.core.memory.manager import Transfer
from paged_ref.tuned import copies


def test_a_page_that_leaves_and_returns_is_the_same() -> None:
    storage = PageStorage(2, 2, 2, (1, 1, 2), "float32")
    storage.device[:] = np.arange(2, dtype=np.float32).reshape(1, 2, 1, 1, 1)
    storage.apply([Transfer("swap_out", 1, 0), Transfer("swap_in", 0, 0)])
    storage.wait()
    assert to_host(storage.device[:, 0]).ravel().tolist() == [1, 1, 1, 1]


def test_neighbours_on_both_sides_are_copied_together() -> None:
    transfers = [Transfer("swap_out", 3, 0), Transfer("swap_out", 4, 1, 2), Transfer("swap_out", 6, 4)]
    transfers += [Transfer("swap_in", 7, 5), Transfer("swap_in", 9, 6)]
    wanted = [Transfer("swap_out", 3, 0, 3), Transfer("swap_out", 6, 4)]
    assert list(joined(transfers)) == [*wanted, *transfers[3:]]
    assert list(joined([])) == []


@pytest.mark.parametrize("max_pitch", [copies.MAX_PITCH, 10])
@pytest.mark.parametrize("seed", range(20))
def test_no_block_is_used_again_before_its_copy(seed: int, max_pitch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copies, "MAX_PITCH", max_pitch)
    compute = pretend_gpu(monkeypatch, module, copies)
    storage = PageStorage(2, 6, 5, (2, 4), "float32")
    first = np.random.default_rng(seed).standard_normal(storage.device.shape).astype(np.float32)
    seen: list[Any] = []

    def write(value: Any) -> Callable[[], None]:
        return lambda: storage.device.__setitem__(slice(None), value)

    def move(transfers: list[Transfer]) -> None:
        storage.apply(transfers)
        storage.wait()

    compute.put(write(first))
    move([Transfer("swap_out", 1, 3), Transfer("swap_out", 2, 4), Transfer("swap_out", 5, 0)])
    compute.put(write(-1))  # other pages take all blocks
    move([Transfer("swap_in", 3, 4), Transfer("swap_in", 4, 5)])
    move([Transfer("swap_in", 0, 0), Transfer("swap_out", 3, 0)])
    compute.put(lambda: seen.append(np.array(storage.device)))
    run([compute, storage._copies._stream], random.Random(seed))
    (device,) = seen
    np.testing.assert_array_equal(device[:, [4, 5, 0]], first[:, [1, 2, 5]])
    assert (device[:, [1, 2, 3]] == -1).all()
    assert (storage.host[:, 0] == -1).all()
    np.testing.assert_array_equal(storage.host[:, 3:5], first[:, 1:3])
    assert np.isnan(storage.host[:, 1:3]).all()
