"""How requests are served: a manager, the scheduler's limits, a model and a GPU."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

from ..core.checks import require
from ..core.engine.scheduler import Preemption, Scheduler
from ..core.engine.sequence import Group
from ..core.memory.manager import KVCacheManager
from ..core.memory.standard import Reserve
from ..extras.managers import WATERMARK, Allocator, ManagerName, make_manager
from .hardware import GPU
from .model_config import ModelSpec
from .roofline import CONSTANTS, Constants, Roofline


class PartScheduler(Scheduler):
    """The scheduler, for a part of the running sequences: the simulation plans the others by itself."""

    num_others = 0

    def room_to_return(self, group: Group) -> int:
        return super().room_to_return(group) + self.num_others * self.manager.block_size


@dataclass(frozen=True, slots=True)
class Setup:
    """One way to serve. The defaults are vLLM's where it has such an option."""

    label: str
    gpu: GPU
    model: ModelSpec
    manager: ManagerName = "paged"
    reserve: Reserve = "max"
    allocator: Allocator = "first fit"
    block_size: int = 16
    prefix_cache: bool = False
    preemption: Preemption = "recompute"
    kv_tokens: int | None = None  # None: as many as the weights leave room for
    host_kv_tokens: int | None = None  # None: with swap as many as on the GPU, else 0
    max_model_len: int | None = None  # None: the model's context, or the pool if that is smaller
    max_batch_tokens: int = 2048
    max_batch_seqs: int = 256
    watermark: float = WATERMARK
    constants: Constants = CONSTANTS

    def __post_init__(self) -> None:
        require(max_batch_tokens=(self.max_batch_tokens, 1), max_batch_seqs=(self.max_batch_seqs, 1))

    @property
    def roofline(self) -> Roofline:
        return Roofline(self.gpu, self.model, self.constants)

    @property
    def num_slots(self) -> int:
        """Tokens whose K and V the pool holds. Raises ValueError if the weights leave no room."""
        return self.roofline.num_kv_tokens() if self.kv_tokens is None else self.kv_tokens

    @property
    def usable_slots(self) -> int:
        """`num_slots` of the manager: those in whole blocks."""
        return self.num_slots // self.block_size * self.block_size if self.manager == "paged" else self.num_slots

    @property
    def longest(self) -> int:
        """Prompt and output of one request together, at most."""
        return self.max_model_len or max(1, min(self.model.max_context, self.num_slots))

    def make_manager(self) -> KVCacheManager:
        """Raises ValueError, as extras.managers.make_manager does."""
        host_slots = self.num_slots if self.preemption == "swap" else 0
        return make_manager(
            self.manager,
            self.num_slots,
            max_model_len=self.longest,
            block_size=self.block_size,
            num_host_slots=host_slots if self.host_kv_tokens is None else self.host_kv_tokens,
            reserve=self.reserve,
            allocator=self.allocator,
            watermark=self.watermark,
            prefix_cache=self.prefix_cache,
        )

    def longest_request(self) -> int:
        """Tokens of the longest request that an empty pool holds, up to the model's context."""
        manager, lengths = self.make_manager(), range(1, self.model.max_context + 1)
        return bisect_right(lengths, manager.num_slots, key=lambda length: manager.max_slots_needed(1, length - 1))

    def make_scheduler(self, manager: KVCacheManager) -> PartScheduler:
        return PartScheduler(manager, self.max_batch_tokens, self.max_batch_seqs, self.preemption)
