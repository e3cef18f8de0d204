"""What a user chooses for contexts longer than the device, checked, and the parts that it makes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..core.checks import plural, require
from ..core.device import on_gpu
from ..core.model.config import ModelConfig
from ..interop.model_memory import require_kv_memory
from ..kernels import why_not
from .kv import StreamedKV
from .page_sanitizer import SanitizedStreamedKV
from .relevance import Attend, check_attend
from .storage import PageStorage
from .streaming import Eviction, StreamingManager

if TYPE_CHECKING:
    from ..timeline.events import Log

# Two pieces: long enough that the bus takes longer than the host, which launches five kernels and copies for each.
STAGING_BYTES = (128 if on_gpu else 8) << 20


@dataclass(frozen=True, slots=True)
class LongOptions:
    """How to keep contexts longer than the device. A block is of all layers and KV heads, as everywhere; a page is the
    part of one layer and one KV head.

    `attend`: "all", or how many blocks a query attends to (an int), or which share of them (a float). `evict`: "lru",
    "sliding" or "relevance"; by default "lru", and "relevance" where `attend` is not "all". The first `full_layers`
    attend to all blocks in any case (default: one in sixteen, at least one). `staging_pages` are for streaming.
    """

    device_blocks: int
    host_blocks: int
    # Device pages set aside for streaming. Default: 0 on a CPU whose compiled loop reads host memory in tiles, else a
    # quarter of the device, at most STAGING_BYTES.
    staging_pages: int | None = None
    attend: Attend = "all"
    evict: Eviction | None = None
    full_layers: int | None = None

    def make(
        self, config: ModelConfig, block_size: int, dtype: str, max_batch_tokens: int, backend: str, sanitize: bool,
        log: Log | None,
    ) -> tuple[StreamingManager, StreamedKV]:  # fmt: skip
        """The manager and the KV. Raises ValueError with the argument, the value and the bound."""
        require(block_size=(block_size, 1), max_batch_tokens=(max_batch_tokens, 1))
        require(device_blocks=(self.device_blocks, 1), host_blocks=(self.host_blocks, 0))
        sizes = ("device_blocks", self.device_blocks), ("host_blocks", self.host_blocks)
        require_kv_memory(config, dtype, dtype, *sizes, unit=block_size)
        check_attend(self.attend)
        per_block = config.num_layers * config.num_kv_heads
        num_pages, host_pages = self.device_blocks * per_block, self.host_blocks * per_block
        page_bytes = 2 * block_size * config.head_size * np.dtype(dtype).itemsize
        staging = self._num_staging(num_pages, page_bytes, block_size, backend)
        _check_windows(config.sliding_windows, staging, block_size, max_batch_tokens)
        evict = self.evict or ("lru" if self.attend == "all" else "relevance")
        shape = (config.num_layers, config.num_kv_heads, block_size)
        manager = StreamingManager(*shape, num_pages - staging, host_pages, evict, log)
        storage = PageStorage(2, num_pages, host_pages, (block_size, 1, config.head_size), dtype)
        kind = SanitizedStreamedKV if sanitize else StreamedKV
        kv = kind(
            config, manager, storage, num_staging=staging, attend=self.attend, full_layers=self.full_layers,
            backend=backend, log=log,
        )  # fmt: skip
        return manager, kv

    def _num_staging(self, num_pages: int, page_bytes: int, block_size: int, backend: str) -> int:
        """Device pages for streaming, of the `num_pages` that there are."""
        staging = self.staging_pages
        if staging is None:
            reads_tiles = not on_gpu and backend in ("auto", "cpu-simd") and why_not("cpu-simd") is None
            staging = 0 if reads_tiles else max(1, min(num_pages // 4, STAGING_BYTES // page_bytes))
        elif staging < 1:
            raise ValueError(f"staging_pages is {staging}; at least 1 is needed, a page of one layer and KV head")
        if staging >= num_pages:
            raise ValueError(
                f"device_blocks is {self.device_blocks}, which is {plural(num_pages, 'page')}; with {staging} of them "
                "for staging, none is left to write new tokens to"
            )
        return staging


def _check_windows(
    sliding_windows: tuple[int | None, ...], staging: int, block_size: int, max_batch_tokens: int
) -> None:
    """Raise ValueError if a layer's window, in the largest step, does not fit the staging pages."""
    windows = [window for window in sliding_windows if window is not None]
    widest = (max(windows, default=0) + max_batch_tokens) // block_size + 2
    if windows and 0 < staging < widest:
        raise ValueError(
            f"{plural(staging, 'page')} for staging; a sliding window of {max(windows)} tokens, and steps of up to "
            f"{max_batch_tokens}, need {widest} at the same time (staging_pages, max_batch_tokens)"
        )
