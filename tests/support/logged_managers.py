"""Managers with a log, in few words."""

from __future__ import annotations

from collections.abc import Sequence

from paged_ref.core.memory.block_pool import BlockPool
from paged_ref.extras.host_swap import SwappablePagedManager
from paged_ref.extras.prefix_cache import CachingBlockPool
from paged_ref.timeline.events import Log
from paged_ref.timeline.logged import LoggedManager


def logged_paged(
    log: Log,
    num_blocks: int,
    block_size: int,
    *,
    free_order: Sequence[int] | None = None,
    num_host_blocks: int = 0,
    watermark: int = 0,
    prefix_cache: bool = False,
) -> LoggedManager:
    """A paged manager with all that it can have."""
    pool = (CachingBlockPool if prefix_cache else BlockPool)(num_blocks, free_order)
    return LoggedManager(SwappablePagedManager(pool, block_size, num_host_blocks, watermark), log)
