"""Copies between device and host that run beside the computation."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..core.device import Array, on_gpu, xp


class CopyStream:
    """On a GPU, a stream of its own for copies from and to page-locked memory. On a CPU, plain copies.

    Order: a copy sees all that the computation was given before `begin`, and the computation that is given
    after `wait` sees all copies. Neither makes the host wait.
    """

    def __init__(self) -> None:
        self._stream: Any = xp.cuda.Stream(non_blocking=True) if on_gpu else None

    def begin(self) -> None:
        """What is copied now may depend on anything computed so far."""
        if self._stream is not None:
            self._stream.wait_event(xp.cuda.get_current_stream().record())

    def wait(self) -> None:
        """What is computed now may depend on anything copied so far, and may write where copies read."""
        if self._stream is not None:
            xp.cuda.get_current_stream().wait_event(self._stream.record())

    def out(self, device: Array, host: np.ndarray) -> None:
        """Contiguous arrays of one shape."""
        if self._stream is None:
            np.copyto(host, device)
        else:
            device.get(stream=self._stream, out=host, blocking=False)

    def back(self, host: np.ndarray, device: Array) -> None:
        """Contiguous arrays of one shape."""
        if self._stream is None:
            np.copyto(device, host)
        else:
            device.set(host, stream=self._stream)
