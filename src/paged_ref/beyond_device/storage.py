"""What lies in pages: the only place that moves a page between device and host."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from ..core.device import Array, on_gpu, xp
from ..core.memory.manager import Transfer
from ..tuned.copies import CopyStream, pinned


class PageStorage:
    """Blocks of one shape, `num_planes` arrays of them: K and V are two planes. Everything is NaN at first.

    `device [num_planes, num_device_blocks, *shape]`, `host [num_planes, num_host_blocks, *shape]`. On a CPU both are
    parts of one array, `whole`, so that a compiled loop reaches both. On a GPU they are two memories, and `whole` is
    None.
    """

    def __init__(
        self, num_planes: int, num_device_blocks: int, num_host_blocks: int, shape: tuple[int, ...], dtype: str
    ) -> None:
        self.whole: np.ndarray | None = None
        self.device: Array
        self.host: np.ndarray
        if on_gpu:
            self.device = xp.full((num_planes, num_device_blocks, *shape), xp.nan, dtype=dtype)
            self.host = pinned((num_planes, num_host_blocks, *shape), dtype)
        else:
            self.whole = np.full((num_planes, num_device_blocks + num_host_blocks, *shape), np.nan, dtype=dtype)
            self.device, self.host = self.whole[:, :num_device_blocks], self.whole[:, num_device_blocks:]
        self._copies = CopyStream()

    @property
    def page_bytes(self) -> int:
        return int(self.device[:, :1].nbytes)

    def apply(self, transfers: Sequence[Transfer]) -> tuple[int, int]:
        """Begin to make these copies, in their order. Call `wait` before computing on their blocks. Returns how many
        bytes go out to the host, and how many come in."""
        self._copies.swap(joined(transfers), self.device, self.host)
        num_out = sum(transfer.count for transfer in transfers if transfer.kind == "swap_out")
        num_in = sum(transfer.count for transfer in transfers) - num_out
        return num_out * self.page_bytes, num_in * self.page_bytes

    def wait(self) -> None:
        """What is computed from now on sees all copies."""
        self._copies.wait()

    def synchronize(self) -> None:
        """Make the host wait for all copies. Call before reading `host`."""
        self._copies.synchronize()


def joined(transfers: Iterable[Transfer]) -> Iterator[Transfer]:
    """The same copies, with neighbours on both sides in one."""
    last: Transfer | None = None
    for transfer in transfers:
        if last is None:
            last = transfer
        elif (last.kind, last.source + last.count, last.destination + last.count) == (
            transfer.kind, transfer.source, transfer.destination,
        ):  # fmt: skip
            last = Transfer(last.kind, last.source, last.destination, last.count + transfer.count)
        else:
            yield last
            last = transfer
    if last is not None:
        yield last
