"""A `transformers.Cache` in blocks: one pool of blocks for all layers, and one block table for each row of the batch.

What it shares with vLLM: K and V as `[num_blocks, block_size, num_kv_heads, head_size]`, reference counts, copy on
write, forks that copy nothing, one table for all layers, caches that share a pool. Where its limit is: `generate`
decides what runs. So there is no continuous batching and no preemption: a full pool raises OutOfBlocks; a row that has
ended goes on taking blocks until the whole batch has; each beam and each sample computes the prompt for itself (beams
share blocks from the first reorder on); blocks behind a sliding window stay.

A batch has columns, which transformers counts, and padding among them. A padded place is in a column but has no slot,
so a row's positions in the cache are those of its tokens alone, and a window counts tokens.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from ..core.checks import plural, require
from ..core.memory.block_pool import BlockPool, OutOfBlocks
from ..core.memory.paged import PagedManager
from ..extras.arguments import whole_number
from ..extras.memory_limit import require_memory
from .cache_api import copy_blocks

BLOCK_BYTES = 64  # that the books keep of a block
NAME = "paged_ref"  # of the attention, for `attn_implementation`


class KVPool:
    """Blocks that several caches of one model can share."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        num_blocks, block_size = whole_number("num_blocks", num_blocks), whole_number("block_size", block_size)
        require(num_blocks=(num_blocks, 1), block_size=(block_size, 1))
        require_memory(f"num_blocks is {num_blocks}, which", BLOCK_BYTES * num_blocks)
        self.manager = PagedManager(BlockPool(num_blocks), block_size)
        self.num_blocks, self.block_size = num_blocks, block_size
        self.layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # K and V, made when the first of them comes
        self._ids = itertools.count()

    @property
    def blocks_in_use(self) -> int:
        """Blocks in the tables of all caches of this pool. A shared block counts once."""
        return self.num_blocks - self.manager.pool.num_free

    def layer(self, index: int, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of a layer, `[num_blocks, block_size, num_kv_heads, head_size]`, with the dtype and device of its
        first `key`. Raises ValueError for the `key` of another model."""
        row = key[0, :, 0]
        if index not in self.layers:
            if key.device.type == "cpu":  # of a GPU, torch says it
                num_layers = len(self.layers) + 1
                what = (
                    f"num_blocks is {self.num_blocks}, in blocks of {self.block_size} tokens, for {num_layers} layers"
                )
                num_bytes = 2 * num_layers * self.num_blocks * self.block_size * row.nbytes
                require_memory(f"{what}: a KV cache of this size", num_bytes)
            # NaN: a read of a slot that was never written shows
            keys = row.new_full((self.num_blocks, self.block_size, *row.shape), torch.nan)
            self.layers[index] = keys, keys.clone()
        held = self.layers[index][0][0, 0]
        if (row.shape, row.dtype, row.device) != (held.shape, held.dtype, held.device):
            ours, theirs = (f"{x.dtype} {list(x.shape)} on {x.device}" for x in (held, row))
            raise ValueError(f"K of layer {index} is {theirs}; the pool has {ours}. Another model needs another pool")
        return self.layers[index]

    def new_row(self, parent: int | None = None) -> int:
        """An empty sequence, or a fork of `parent`, which shares its blocks."""
        row = next(self._ids)
        if parent is None:
            self.manager.admit(row, (), 0)
        else:
            self.manager.fork(parent, row)
        return row

    def append(self, rows: Sequence[int], counts: Sequence[int]) -> None:
        """Make room for more tokens of each row, and copy the blocks that must not be written in place. All or none:
        raises OutOfBlocks, and changes nothing, without room."""
        try:
            transfers = self.manager.append(list(zip(rows, counts, strict=True)))
        except OutOfBlocks as error:
            raise OutOfBlocks(
                f"no room for {plural(sum(counts), 'new token')} in {plural(len(rows), 'row')}: in use, of blocks of "
                f"{self.block_size}, are {self.blocks_in_use} of {self.num_blocks} ({error})"
            ) from None
        pairs = [(transfer.source, transfer.destination) for transfer in transfers]
        for keys, values in self.layers.values() if pairs else ():
            copy_blocks(keys, values, pairs)

    def free(self, rows: list[int]) -> None:
        """Give back what the rows hold, and empty the list."""
        while rows:
            self.manager.free(rows.pop())


class Packing:
    """The tokens of a batch one after another, without padding, as the kernels take them."""

    def __init__(self, real: torch.Tensor, device: torch.device) -> None:
        """`real`: bool [num_rows, count], False for padding."""
        real = real.cpu()
        self.shape = real.shape
        self.counts: list[int] = real.sum(1).tolist()
        self.real = None if bool(real.all()) else real.flatten().to(device)
        self.query_start_loc = ints([0, *itertools.accumulate(self.counts)], device)

    def pack(self, states: torch.Tensor) -> torch.Tensor:
        """`[num_rows, num_heads, count, head_size]` to `[num_tokens, num_heads, head_size]`."""
        rows = states.detach().transpose(1, 2).flatten(0, 1)
        return rows if self.real is None else rows[self.real]

    def unpack(self, packed: torch.Tensor) -> torch.Tensor:
        """`[num_tokens, num_heads, head_size]` to `[num_rows, count, num_heads, head_size]`, with 0 for padding."""
        if self.real is not None:
            rows = packed.new_zeros(len(self.real), *packed.shape[1:])
            rows[self.real] = packed
            packed = rows
        return packed.unflatten(0, self.shape)


def ints(values: Sequence[Any], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """What all layers share in one run of the model over the columns from `start` to `end`."""

    first: PagedLayer  # the layer that began it
    start: int
    end: int
    packing: Packing  # of the new columns
    slots: torch.Tensor  # [num_tokens] of the new tokens
    block_tables: torch.Tensor  # [num_rows, max_blocks]
    seq_lens: torch.Tensor  # [num_rows]


class SealedError(ValueError, AttributeError):
    """Also an AttributeError, so that `hasattr` answers False, with which libraries tell tensors from other things."""


class Sealed:
    """What a model carries to its attention and must not open. An attention that does gets an error, not wrong keys."""

    def __getattr__(self, name: str) -> NoReturn:
        raise SealedError(
            "the model opens K, V or the mask before its attention does, or runs another attention: call "
            f'model.set_attn_implementation("{NAME}") first; where that was done, {NAME} cannot serve this model'
        )

    def __getitem__(self, key: Any) -> NoReturn:
        self.__getattr__("")

    @classmethod
    def __torch_function__(cls, *args: Any, **kwargs: Any) -> NoReturn:
        Sealed().__getattr__("")


class NewKV(Sealed):
    """K and V of this step, which the cache hands to the model in place of tensors."""

    def __init__(self, layer: PagedLayer, key: torch.Tensor, value: torch.Tensor) -> None:
        self.layer, self.key, self.value = layer, key, value  # [num_rows, num_kv_heads, count, head_size]
        self.step: Step | None = None  # since when K and V lie in the pool


class PagedLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers has no types
    """One layer's part of what transformers asks of a cache."""

    is_sliding = False  # every layer keeps all columns; the kernel applies the window
    is_croppable = True

    def __init__(self, cache: PagedCache) -> None:
        super().__init__()
        self.cache = cache  # weakly, so that the blocks go back as soon as the cache is dropped
        self.index = len(cache.layers)
        self.columns = 0  # written

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing: the pool makes K and V of the layer."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Changes nothing. The attention writes, as it alone is told what is padding."""
        return (NewKV(self, key_states, value_states),) * 2

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.columns + query_length, 0

    def get_seq_length(self) -> int:
        return self.cache.columns

    def get_max_length(self) -> int:
        return -1  # none


class PagedCache(Cache):  # type: ignore[misc]
    """`model.generate(..., cache=PagedCache(num_blocks=256))`, after `register()` and
    `model.set_attn_implementation("paged_ref")`.

    `num_blocks` blocks of `block_size` tokens are for all rows together; each layer keeps them as two arrays of the
    model's dtype. `pool=other.pool` shares them with another cache. `copy.deepcopy(cache)` is a fork: it shares all
    blocks, and copies one only when it is written. The blocks go back to the pool with `reset()`, with `crop(-n)`, or
    when the cache is dropped. Raises OutOfBlocks where the pool is full; the cache then is as before that step.
    """

    def __init__(
        self, num_blocks: int | None = None, block_size: int | None = None, *, pool: KVPool | None = None
    ) -> None:
        """`block_size` is 16 unless it is given."""
        if pool is None and num_blocks is not None:
            pool = KVPool(num_blocks, 16 if block_size is None else block_size)
        elif (num_blocks, block_size) != (None, None) or not isinstance(pool, KVPool):
            raise ValueError("PagedCache needs either num_blocks and block_size (16), or pool=other.pool alone")
        cache: Any = weakref.proxy(self)
        super().__init__(layer_class_to_replicate=functools.partial(PagedLayer, cache))
        self.pool = pool
        self.rows: list[int] = []  # the sequence of each row of the batch
        self.real = torch.zeros(0, 0, dtype=torch.bool)  # [num_rows, columns]: False is padding
        self._step: Step | None = None
        weakref.finalize(self, pool.free, self.rows)

    def __repr__(self) -> str:
        size = f"{self.pool.num_blocks} blocks of {self.pool.block_size}"
        return f"PagedCache({len(self.rows)} rows, {self.columns} columns, {self.blocks_in_use} of {size})"

    def __bool__(self) -> bool:
        return True  # len() counts layers, of which a new cache has none

    @property
    def blocks_in_use(self) -> int:
        """Blocks in the tables of this cache. One that several rows share counts once."""
        return len({block for row in self.rows for block in self.pool.manager.placement(row)})

    @property
    def columns(self) -> int:
        """Columns that all layers have. A run that was interrupted counts for nothing."""
        return min((layer.columns for layer in self.layers if layer.columns), default=0)

    def has_previous_state(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise ValueError("layers that keep another state than K and V (convolutions, linear attention) cannot be paged")

    get_conv_state = update_conv_state = get_recurrent_state = update_recurrent_state = has_previous_state
    update_indexer = has_previous_state

    # --- a run of the model ------------------------------------------------------------------------------

    def step(self, layer: PagedLayer, real: torch.Tensor, count: int, device: torch.device) -> Step:
        """The step that `layer` is in, begun if this is its first layer. `real [num_rows, columns]` is the mask, of
        all columns up to the end of the `count` new ones."""
        step = self._step
        if step is None or layer is step.first or layer.columns != step.start:
            step = self._step = self._begin(layer, real.cpu(), count, device)
        return step

    def _begin(self, layer: PagedLayer, real: torch.Tensor, count: int, device: torch.device) -> Step:
        start, manager = self.columns, self.pool.manager
        self._keep(start)
        self._check(layer, real, start, count)
        packing = Packing(real[:, start:], device)
        if not start:
            self.pool.free(self.rows)
            self.rows.extend(self.pool.new_row() for _ in packing.counts)
            self.real = real[:, :0]
        firsts = [manager.length(row) for row in self.rows]
        self.pool.append(self.rows, packing.counts)
        self.real = real.clone()  # the caller may write into the mask
        slots = [slot for at in zip(self.rows, firsts, packing.counts, strict=True) for slot in manager.slots(*at)]
        tables = [manager.placement(row) for row in self.rows]
        widest = max(1, *map(len, tables))
        tables = [table + [-1] * (widest - len(table)) for table in tables]
        arrays = (ints(values, device) for values in (slots, tables, [manager.length(row) for row in self.rows]))
        return Step(layer, start, start + count, packing, *arrays)

    def _check(self, layer: PagedLayer, real: torch.Tensor, start: int, count: int) -> None:
        if start and real.shape[0] != len(self.rows):
            raise ValueError(
                f"the batch has {plural(real.shape[0], 'row')}; the cache has {len(self.rows)}. Call "
                "cache.reset() before another batch, or cache.batch_repeat_interleave(n) to go on n times from each row"
            )
        if layer.columns != start:
            raise ValueError(
                f"layer {layer.index} has {plural(layer.columns, 'column')}; the cache has {start}. Its first run "
                "did not get to the last layer, or was that of another model; call cache.reset()"
            )
        if real.shape[1] != start + count:
            raise ValueError(
                f"the attention mask has {plural(real.shape[1], 'column')}; the cache has {start}, with {count} more. "
                "Give the mask of the whole sequence (and not use_cache=False), or call cache.reset() before another"
            )
        if start and not torch.equal(real[:, :start], self.real):
            raise ValueError("the attention mask hides other columns of the past than when they were written")

    def _keep(self, columns: int) -> None:
        """Forget all columns from `columns` on."""
        for row, length in zip(self.rows, self.real[:, :columns].sum(1).tolist(), strict=True):
            self.pool.manager.truncate(row, length)
        self.real, self._step = self.real[:, :columns], None
        for layer in self.layers:
            layer.columns = min(layer.columns, columns)

    # --- rows and columns move: rejected tokens, beams, candidates, forks ---------------------------------------

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last columns, given as a negative number, as transformers does."""
        if whole_number("tokens_to_remove", tokens_to_remove) > 0:
            raise ValueError(f"tokens_to_remove is {tokens_to_remove}; a negative number is expected")
        self._keep(max(0, self.columns + tokens_to_remove))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Row i goes on from old row `indices[i]`. Rows that go on from one old row share its blocks."""
        chosen, old = torch.arange(len(self.rows))[torch.as_tensor(indices).cpu()], self.rows.copy()
        self.rows[:] = [self.pool.new_row(old[i]) for i in chosen.tolist()]
        self.real, self._step = self.real[chosen], None
        self.pool.free(old)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        if self.rows:
            self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.batch_select_indices(torch.arange(len(self.rows)).repeat_interleave(repeats))

    def __deepcopy__(self, memo: Any = None) -> PagedCache:
        fork = PagedCache(pool=self.pool)
        self._keep(self.columns)
        fork.rows.extend(self.pool.new_row(row) for row in self.rows)
        fork.real = self.real
        for layer in self.layers:
            fork.layers.append(fork.layer_class_to_replicate())
            fork.layers[-1].columns = layer.columns
        return fork

    __copy__ = __deepcopy__

    def reset(self) -> None:
        """Give back all blocks. The cache is as new."""
        self.pool.free(self.rows)
        self.layers.clear()
        self.real, self._step = self.real[:0, :0], None
