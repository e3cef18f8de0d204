"""How long work takes on a GPU, by the GPU's own clock.

Many calls are recorded as one CUDA graph, so that a kernel's time does not contain the time between two launches,
which the host needs; calls that cannot be recorded are launched one by one. The launch overhead, which is the time
that the host takes for one call, is measured separately.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

from ..core.device import xp
from .batch import Call

Library = Literal["cupy", "torch"]  # whose current stream the calls work on
COPY_BYTES = 1 << 30  # several times any L2
TOTAL = 2e-3  # seconds of work in one graph, about: an event's own half microsecond is then nothing


@dataclass(frozen=True)
class Timing:
    seconds: float  # of one call on the device, median
    launch_seconds: float  # of one call on the host, without waiting for the device
    graph: bool  # False where `seconds` contains launches


class GpuClock:
    """Times calls that work on CuPy's or torch's current stream."""

    def __init__(self) -> None:
        properties = xp.cuda.runtime.getDeviceProperties(xp.cuda.Device().id)
        self.l2_bytes = int(properties["l2CacheSize"])

    def free_bytes(self) -> int:
        """Device memory that is left."""
        xp.get_default_memory_pool().free_all_blocks()
        if "torch" in sys.modules:  # torch's pool still holds the memory of the last shape's peers
            sys.modules["torch"].cuda.empty_cache()
        return int(xp.cuda.Device().mem_info[0])

    def time(self, calls: Sequence[Call], library: Library = "cupy", rounds: int = 15) -> Timing:
        """The time of one call, from rounds over `calls`, which do the same work on different memory."""
        for call in calls:
            call()  # compiles
        launch = self._launch_seconds(calls)
        once = self._elapsed(lambda: [call() for call in calls], library) / len(calls)
        work = list(calls) * max(1, min(200, round(TOTAL / max(once, 1e-7))) // len(calls))
        recorded = self._recorded(work, library)
        run = recorded or (lambda: [call() for call in work])
        run()
        rounds = max(3, min(rounds, round(1 / max(once * len(work), 1e-9))))  # no more than about a second
        return Timing(
            median(self._elapsed(run, library) for _ in range(rounds)) / len(work), launch, recorded is not None
        )

    def copy_bandwidth(self) -> float:
        """Bytes a second, read and written together, of a device-to-device copy."""
        source, target = (xp.full(COPY_BYTES // 4, value, dtype="uint32") for value in (1, 2))
        timing = self.time([lambda: target.data.copy_from_device_async(source.data, COPY_BYTES)])
        return 2 * COPY_BYTES / timing.seconds

    def _launch_seconds(self, calls: Sequence[Call]) -> float:
        times = []
        for i in range(10):
            xp.cuda.Device().synchronize()  # an empty queue: a full one would make the host wait for room
            began = time.perf_counter()
            calls[i % len(calls)]()
            times.append(time.perf_counter() - began)
        return median(times)

    def _elapsed(self, run: Call, library: Library) -> float:
        """Seconds between two events around `run`."""
        if library == "torch":
            import torch

            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        else:
            begin, end = xp.cuda.Event(), xp.cuda.Event()
        begin.record()
        run()
        end.record()
        end.synchronize()
        milliseconds = begin.elapsed_time(end) if library == "torch" else xp.cuda.get_elapsed_time(begin, end)
        return float(milliseconds) / 1e3

    def _recorded(self, work: Sequence[Call], library: Library) -> Call | None:
        """All calls as one graph; None where recording fails, because a call waits for the device."""
        xp.cuda.Device().synchronize()
        try:
            return _torch_graph(work) if library == "torch" else _cupy_graph(work)
        except Exception:
            xp.cuda.Device().synchronize()
            return None


def _torch_graph(work: Sequence[Call]) -> Call:
    import torch

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in work:
            call()
    return graph.replay  # type: ignore[no-any-return]


def _cupy_graph(work: Sequence[Call]) -> Call:
    stream = xp.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        try:
            for call in work:
                call()
        finally:
            graph = stream.end_capture()
    return lambda: graph.launch()  # on the current stream
