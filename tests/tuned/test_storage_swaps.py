"""Swaps on a stream of their own: run here on streams made of Python, in every order that the events allow."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest

from paged_ref.core.memory.manager import Transfer
from paged_ref.tuned import copies, kv
from paged_ref.tuned.kv import TunedKV


class Event:
    def __init__(self, disable_timing: bool = False) -> None:
        self.done = False


class Stream:
    """Work in order. Nothing runs before `run` lets it; as on a GPU, putting work in never waits."""

    everywhere: ClassVar[dict[int, Stream]] = {}

    def __init__(self, non_blocking: bool = False) -> None:
        self.ptr, self.work = id(self), []  # type: ignore[var-annotated]
        Stream.everywhere[self.ptr] = self

    def put(self, work: Callable[[], Any]) -> None:
        self.work.append(lambda: work() or True)

    def record(self, event: Event) -> Event:
        self.put(lambda: setattr(event, "done", True))
        return event

    def wait_event(self, event: Event) -> None:
        self.work.append(lambda: event.done)


def run(streams: list[Stream], rng: random.Random) -> None:
    """All work of all streams: in a random order, in which each stream keeps its own and waits for its events."""
    while any(stream.work for stream in streams):
        stream = rng.choice([stream for stream in streams if stream.work])
        if stream.work[0]():
            stream.work.pop(0)


def memcpy_2d(to: int, to_pitch: int, at: int, pitch: int, width: int, height: int, kind: int, stream: int) -> None:
    def copy() -> None:
        for row in range(height):
            ctypes.memmove(to + row * to_pitch, at + row * pitch, width)

    assert width <= min(pitch, to_pitch)
    Stream.everywhere[stream].put(copy)


@pytest.fixture
def compute(monkeypatch: pytest.MonkeyPatch) -> Stream:
    """The stream on which the model computes, while copies.py takes it for a GPU's."""
    stream = Stream()
    runtime = SimpleNamespace(memcpy2DAsync=memcpy_2d, memcpyDeviceToHost=2, memcpyHostToDevice=1)
    cuda = SimpleNamespace(Event=Event, Stream=Stream, runtime=runtime, get_current_stream=lambda: stream)
    gpu = SimpleNamespace(cuda=cuda, full=np.full, nan=np.nan, asarray=np.asarray)
    monkeypatch.setattr(copies, "xp", gpu)
    monkeypatch.setattr(copies, "on_gpu", True)
    monkeypatch.setattr(kv, "pinned", lambda shape, dtype, fill: np.full(shape, fill, dtype))
    return stream


@pytest.mark.parametrize("max_pitch", [copies.MAX_PITCH, 10])
@pytest.mark.parametrize("seed", range(20))
def test_no_block_is_reused_before_its_copy(
    compute: Stream, seed: int, max_pitch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
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
