"""Sizes held against the memory that there is."""

from __future__ import annotations

import os

import pytest

from paged_ref.extras import memory_limit
from paged_ref.extras.memory_limit import machine_memory, require_memory


def test_what_fits_is_allowed_and_what_does_not_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_limit, "machine_memory", lambda: 16_000_000_000)
    require_memory("blocks is 5: a pool of this size", 16_000_000_000)
    with pytest.raises(
        ValueError, match=r"^blocks is 6: a pool of this size needs 16\.1 GB; this machine has 16\.0 GB$"
    ):
        require_memory("blocks is 6: a pool of this size", 16_100_000_000)


def test_what_a_gpu_holds_is_held_against_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_limit, "machine_memory", lambda: 16_000_000_000)
    monkeypatch.setattr(memory_limit, "gpu_memory", lambda: 80_000_000_000)
    monkeypatch.setattr(memory_limit, "on_gpu", True)
    require_memory("x", 70_000_000_000, device=True)
    with pytest.raises(ValueError, match=r"^x needs 90\.0 GB; this GPU has 80\.0 GB$"):
        require_memory("x", 90_000_000_000, device=True)
    with pytest.raises(ValueError, match=r"this machine has 16\.0 GB"):
        require_memory("x", 70_000_000_000)


def test_the_memory_of_this_machine_is_that_of_its_container_at_most() -> None:
    assert 1 << 26 < machine_memory() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
