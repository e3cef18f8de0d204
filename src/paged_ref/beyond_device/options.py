"""What a user chooses for contexts longer than the device, checked and made into the parts that do it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..core.device import on_gpu
from ..core.memory.kv import PageStorage
from ..core.model.config import ModelConfig
from ..kernels import why_not
from ..timeline.events import Log
from .long_context import LongContext
from .page_sanitizer import PageSanitizer
from .relevance import Attend, check_attend
from .streaming import Eviction, StreamingManager

STAGING_BYTES = 8 << 20  # two pieces of 4 MiB: long enough for the bus


@dataclass(frozen=True, slots=True)
class LongOptions:
    """How to keep contexts longer than the device. Blocks are of all layers and KV heads, as everywhere; a page is
    one layer's and one head's part of a block."""

    device_blocks: int
    host_blocks: int
    staging_pages: int | None = None  # of the device's; None: none where the host can be read in tiles, else a quarter
    attend: Attend = "all"
    evict: Eviction | None = None  # None: "relevance" with a budget, else "lru"
    full_layers: int | None = None

    def make(
        self, config: ModelConfig, block_size: int, dtype: str, max_batch_tokens: int, backend: str, sanitize: bool,
        log: Log | None,
    ) -> LongContext:  # fmt: skip
        """The manager, the storage and the attention. Raises ValueError with the argument, the value and the bound."""
        sizes = {"block_size": (block_size, 1), "max_batch_tokens": (max_batch_tokens, 1)}
        sizes |= {"device_blocks": (self.device_blocks, 1), "host_blocks": (self.host_blocks, 0)}
        for name, (value, least) in sizes.items():
            if value < least:
                raise ValueError(f"{name} is {value}; at least {least} is needed")
        check_attend(self.attend)
        per_block = config.num_layers * config.num_kv_heads
        num_pages = self.device_blocks * per_block
        tiles = not on_gpu and backend in ("auto", "cpu") and why_not("cpu") is None
        staging = self.staging_pages
        if staging is None:
            page_bytes = 2 * block_size * config.head_size * np.dtype(dtype).itemsize
            staging = 0 if tiles else max(1, min(num_pages // 4, STAGING_BYTES // page_bytes))
        elif staging < 1:
            raise ValueError(
                f"staging_pages is {staging}; at least 1 is needed, a page of {block_size} tokens "
                "of one layer and KV head"
            )
        if staging >= num_pages:
            raise ValueError(
                f"device_blocks is {self.device_blocks}, which is {num_pages} pages; with {staging} of them for "
                "staging, none is left to write new tokens to"
            )
        windows = [window for window in config.sliding_windows if window is not None]
        widest = (max(windows, default=0) + max_batch_tokens) // block_size + 2
        if windows and 0 < staging < widest:
            raise ValueError(
                f"{staging} pages are for staging; a sliding window of {max(windows)} tokens, and steps of up to "
                f"{max_batch_tokens}, need {widest} at once (staging_pages, max_batch_tokens)"
            )
        evict = self.evict or ("lru" if self.attend == "all" else "relevance")
        host_pages = self.host_blocks * per_block
        shape = (config.num_layers, config.num_kv_heads, block_size)
        manager = StreamingManager(*shape, num_pages - staging, host_pages, evict, log)
        storage = PageStorage(num_pages, host_pages, block_size, config.head_size, dtype)
        return LongContext(
            config, manager, storage, max_batch_tokens=max_batch_tokens, num_staging=staging, attend=self.attend,
            full_layers=self.full_layers, backend=backend, log=log,
            sanitizer=PageSanitizer(manager, storage) if sanitize else None,
        )  # fmt: skip
