"""Takes one ordering of copies and computation away at a time, and runs what needs it: StreamRace must say so.

PYTHONPATH=src:tests python -m strict_gpu tests/strict_gpu/mutants.py      prints JSON: by mutant what was said
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from paged_ref.core.device import xp
from paged_ref.core.memory.manager import Transfer
from paged_ref.tuned.copies import CopyStream
from paged_ref.tuned.kv import TunedKV
from strict_gpu import flows, order
from strict_gpu.order import StreamRace


def swaps() -> None:
    """Swaps with work before and after them, and no wait by the host."""
    kv = TunedKV(2, 8, 4, 2, 16, "float32", num_host_blocks=8)
    kv.device[...] = 1
    kv.apply([Transfer("swap_out", 0, 4, 2)])
    kv.device[...] = 2
    kv.apply([Transfer("swap_in", 4, 0, 2)])
    kv.device[...] += 1
    kv.synchronize()
    assert (kv.host[:, :, 4:6] == 1).all()


def pages() -> None:
    """Pages that leave the device and come back, read by the host too."""
    from paged_ref.beyond_device.storage import PageStorage

    storage = PageStorage(2, 4, 8, (4, 1, 8), "float32")
    storage.device[...] = 1
    storage.apply([Transfer("swap_out", 0, 0)])
    storage.wait()
    storage.device[:, 0] = 2
    storage.apply([Transfer("swap_in", 0, 1)])
    storage.wait()
    storage.device[:, 1] += 1
    storage.synchronize()
    assert (storage.host[:, 0] == 1).all()


def staging() -> None:
    """Attention over blocks that stream through two halves of the staging blocks."""
    import cupyx

    from paged_ref.beyond_device.attention import TwoCaches, streamed_attention

    rng = np.random.default_rng(0)
    hosts = [cupyx.empty_pinned((16, 4, 1, 16), np.float32) for _ in range(2)]
    for host in hosts:
        host[:] = rng.standard_normal(host.shape)
    keys, values = (xp.asarray(rng.standard_normal((6, 4, 1, 16)).astype(np.float32)) for _ in range(2))
    table = np.arange(16)[None]
    query = xp.asarray(rng.standard_normal((1, 2, 16)).astype(np.float32))
    caches = TwoCaches(keys, values, hosts[0], hosts[1], range(2, 6))
    for _ in range(2):
        lens, loc = np.array([64]), np.array([0, 1])
        streamed_attention(query, caches, np.full_like(table, -1), table, lens, loc)


# The file whose call is taken away, the method of CopyStream, and what runs then.
MUTANTS: dict[str, tuple[str, str, Callable[[], Any]]] = {
    "a swap does not wait for what was computed before": ("tuned/copies.py", "begin", swaps),
    "what is computed does not wait for the swap": ("tuned/kv.py", "wait", swaps),
    "the host reads its pool without a wait": ("tuned/kv.py", "synchronize", swaps),
    "a page moves while it is computed on": ("tuned/copies.py", "begin", pages),
    "a page is read before it arrives": ("beyond_device/storage.py", "wait", pages),
    "the host reads a page without a wait": ("beyond_device/storage.py", "synchronize", pages),
    "a half is written while it is read": ("beyond_device/attention.py", "begin", staging),
    "a half is read before it arrives": ("beyond_device/attention.py", "wait", staging),
    "activations leave before they are computed": ("training/activations.py", "begin", flows.training),
    "activations are read before they are back": ("training/activations.py", "wait", flows.training),
    "an LLM computes before its swap is done": ("tuned/kv.py", "wait", flows.swap),
    "an LLM reads pages before they arrive": ("beyond_device/storage.py", "wait", flows.long_contexts),
}


@contextmanager
def without(file: str, method: str) -> Iterator[None]:
    """Inside, the calls of this method in this file do nothing."""
    real = getattr(CopyStream, method)

    def maybe(self: CopyStream, *args: Any, **options: Any) -> None:
        if not sys._getframe(1).f_code.co_filename.replace("\\", "/").endswith(file):
            real(self, *args, **options)

    setattr(CopyStream, method, maybe)
    try:
        yield
    finally:
        setattr(CopyStream, method, real)


def said(file: str, method: str, run: Callable[[], Any]) -> str:
    """What the stand-in says of a mutant; "" where it sees nothing."""
    order.forget()
    try:
        with without(file, method):
            run()
    except StreamRace as race:
        return str(race)
    return ""


if __name__ == "__main__":
    for run in (swaps, pages, staging):
        run()  # nothing is said while nothing is taken away
    print(json.dumps({name: said(*mutant) for name, mutant in MUTANTS.items()}, indent=1))
