"""Who keeps what the layers save for backward."""

from __future__ import annotations

from .network import Saved


class Keep:
    """All of it stays on the device, as training does without further thought."""

    recompute = False

    def __init__(self) -> None:
        self._saved: dict[int, Saved] = {}

    def save(self, layer: int, saved: Saved) -> None:
        self._saved[layer] = saved

    def load(self, layer: int) -> Saved:
        return self._saved[layer]

    def release(self, layer: int) -> None:
        del self._saved[layer]
