"""Readings of the GPU from its driver: load, memory, and traffic over the host link.

The readings come through NVML (nvidia-ml-py, which the CUDA extras bring). Without a GPU, a driver or the package
there are none: the monitor shows a run on any machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

EVERY = 1.0  # seconds between two readings: NVML's own sample period is up to a second


@dataclass(frozen=True, slots=True)
class GPUReading:
    """None: this GPU does not report the number."""

    name: str
    busy: int | None  # percent of the last sample period in which a kernel ran
    memory_busy: int | None  # percent of it in which the memory was read or written
    memory_used: int | None  # bytes
    memory_total: int | None
    to_gpu: int | None  # bytes/s over the host link
    from_gpu: int | None


class GPUMeter:
    """Reads GPU 0, at most once in `EVERY` seconds. `why_not` says why there are no readings."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.why_not = ""
        self._clock = clock
        self._read_at = float("-inf")
        self._reading: GPUReading | None = None
        self._nvml: Any = None
        try:
            import pynvml
        except ImportError:
            self.why_not = "not read: the extras cuda12 and cuda13 bring nvidia-ml-py"
            return
        try:
            pynvml.nvmlInit()
            self._handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        except pynvml.NVMLError as error:
            self.why_not = f"none to read ({error})"
            return
        self._nvml = pynvml

    def read(self) -> GPUReading | None:
        """The last reading, or a new one when it is too old; None where there is no GPU to read."""
        if self._nvml is not None and self._clock() - self._read_at >= EVERY:
            self._reading = self._read()
            self._read_at = self._clock()
        return self._reading

    def _read(self) -> GPUReading:
        nvml = self._nvml
        name = self._ask(nvml.nvmlDeviceGetName) or "GPU"
        rates = self._ask(nvml.nvmlDeviceGetUtilizationRates)
        memory = self._ask(nvml.nvmlDeviceGetMemoryInfo)
        to_gpu = self._ask(nvml.nvmlDeviceGetPcieThroughput, nvml.NVML_PCIE_UTIL_RX_BYTES)
        from_gpu = self._ask(nvml.nvmlDeviceGetPcieThroughput, nvml.NVML_PCIE_UTIL_TX_BYTES)
        return GPUReading(
            name=name.decode() if isinstance(name, bytes) else str(name),  # bytes before nvidia-ml-py 12
            busy=None if rates is None else int(rates.gpu),
            memory_busy=None if rates is None else int(rates.memory),
            memory_used=None if memory is None else int(memory.used),
            memory_total=None if memory is None else int(memory.total),
            to_gpu=None if to_gpu is None else 1024 * int(to_gpu),  # NVML counts in KB/s
            from_gpu=None if from_gpu is None else 1024 * int(from_gpu),
        )

    def _ask(self, function: Callable[..., Any], *more: int) -> Any:
        try:
            return function(self._handle, *more)
        except self._nvml.NVMLError:  # some GPUs, and all MIG slices, refuse some questions
            return None
