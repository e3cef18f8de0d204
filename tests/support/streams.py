"""CUDA streams, events and device arrays made of Python, which run work in every order that the events allow."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest

from paged_ref.core.device import on_gpu
from paged_ref.tuned import copies


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


class DeviceArray(np.ndarray):
    """An array that is copied from and to on a stream, as CuPy's are."""

    def get(self, stream: Stream, out: np.ndarray, blocking: bool) -> None:
        assert not blocking
        stream.put(lambda: np.copyto(out, self))

    def set(self, host: np.ndarray, stream: Stream) -> None:
        stream.put(lambda: np.copyto(self, host))


def run(streams: list[Stream], rng: random.Random) -> None:
    """All work of all streams: in a random order, in which each stream keeps its own and waits for its events.

    Streams are of different speed, so that one can be far ahead of the others.
    """
    speeds = [10 ** rng.uniform(-1, 1) for _ in streams]
    while any(stream.work for stream in streams):
        (stream,) = rng.choices(streams, [speed * bool(s.work) for s, speed in zip(streams, speeds, strict=True)])
        if stream.work[0]():
            stream.work.pop(0)


def memcpy_2d(to: int, to_pitch: int, at: int, pitch: int, width: int, height: int, kind: int, stream: int) -> None:
    def copy() -> None:
        for row in range(height):
            ctypes.memmove(to + row * to_pitch, at + row * pitch, width)

    assert width <= min(pitch, to_pitch)
    assert max(pitch, to_pitch) <= copies.MAX_PITCH, "refused by CUDA, whatever the height"
    Stream.everywhere[stream].put(copy)


def memcpy(to: int, at: int, width: int, kind: int, stream: int) -> None:
    Stream.everywhere[stream].put(lambda: ctypes.memmove(to, at, width))


def pretend_gpu(monkeypatch: pytest.MonkeyPatch, *modules: Any) -> Stream:
    """Make these modules believe in a GPU; returns the stream on which the model computes."""
    if on_gpu:
        pytest.skip("a GPU is in use: here streams are made of Python, and arrays lie in host memory")
    compute = Stream()
    runtime = SimpleNamespace(memcpy2DAsync=memcpy_2d, memcpyAsync=memcpy, memcpyDeviceToHost=2, memcpyHostToDevice=1)
    cuda = SimpleNamespace(Event=Event, Stream=Stream, runtime=runtime, get_current_stream=lambda: compute)

    def full(shape: tuple[int, ...], value: float, dtype: str) -> np.ndarray:
        return np.full(shape, value, dtype).view(DeviceArray)

    gpu = SimpleNamespace(cuda=cuda, full=full, nan=np.nan, asarray=np.asarray)
    stand_ins = {
        "xp": gpu, "on_gpu": True, "module_of": lambda array: gpu,
        "pinned": lambda shape, dtype, fill=np.nan: np.full(shape, fill, dtype),
    }  # fmt: skip
    for module in modules:
        for name, value in stand_ins.items():
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)
    return compute
