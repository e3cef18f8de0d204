"""The KV of contexts longer than the device: attention over pages that stream in, or over the pages that matter.

The keys and values of a layer are written to pages; for this, other pages may be evicted to the host. Then attention
runs over all pages of each sequence, wherever they lie (attention.py). With a budget, attention runs over the pages
whose bound says that they matter to this query (relevance.py); these pages are brought to the device and stay there.

To the kernel each KV head of each sequence is a sequence of its own, with its own table: `HeadPages` below.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..core.attention.attention import Addresses
from ..core.device import Array, to_host, xp
from ..core.engine.scheduler import StepPlan
from ..core.memory.manager import Transfer
from ..core.model.config import ModelConfig
from ..core.model.llama import StepInputs
from .attention import Check, TwoCaches, streamed_attention
from .observation import HeadPages, Observation, attention_mass
from .relevance import Attend, Extremes, budget_of, choose, shares
from .storage import PageStorage
from .streaming import StreamingManager

if TYPE_CHECKING:
    from ..timeline.events import Log


@dataclass(slots=True)
class Counters:
    """Since the beginning, or since `StreamedKV.counters` was replaced by a new one."""

    tokens: int = 0  # computed
    attended: int = 0  # pages that attention read
    resident: int = 0  # of these, on the device before attention asked for them
    bytes_in: int = 0  # from the host: brought in to stay, or streamed
    bytes_out: int = 0  # to the host: evicted pages

    @property
    def hit_rate(self) -> float:
        return self.resident / max(1, self.attended)


class Chunk(NamedTuple):
    """What a step computes of one sequence."""

    seq_id: int
    first: int  # position
    num_tokens: int


class Written(NamedTuple):
    """The slots that one batch of writes fills: arrays with an entry for each slot of one KV head."""

    pages: np.ndarray
    seq_ids: np.ndarray
    heads: np.ndarray
    positions: np.ndarray
    blocks: np.ndarray  # on the device
    offsets: np.ndarray  # in the block


class StreamedKV:
    """The keys and values of all layers, partly on the device; what the model and the engine ask of memory."""

    def __init__(
        self, config: ModelConfig, manager: StreamingManager, storage: PageStorage, *, num_staging: int,
        attend: Attend, full_layers: int | None, backend: str, log: Log | None,
    ) -> None:  # fmt: skip
        """The last `num_staging` device blocks of `storage` are for streaming; 0: tiles (CPU only).

        `attend` and `full_layers` are those of LongOptions. A budget is for each layer and KV head, and holds for steps
        of one token: prompts, and layers with a sliding window, attend to all that they see. The first layers spread
        their attention so wide that no choice is a good one. `log` receives a PagesAttended for the layer and query
        head of `watch`.
        """
        self.config, self.manager, self.storage = config, manager, storage
        self.budget = attend
        self.full_layers = max(1, config.num_layers // 16) if full_layers is None else full_layers
        if not 0 <= self.full_layers <= config.num_layers:
            raise ValueError(
                f"full_layers is {self.full_layers}; 0 to the model's {config.num_layers} layers are allowed"
            )
        self.backend = backend
        self.log = log
        self.watch: tuple[int, int] | None = None  # (layer, query head) whose attention is logged
        self.observe: Callable[[Observation], None] | None = None  # called for each layer; then all keys are read
        self.counters = Counters()
        # Whether a layer attends to what matters, and not to all.
        self._chooses = [
            attend != "all" and window is None and layer >= self.full_layers
            for layer, window in enumerate(config.sliding_windows)
        ]
        self._extremes: dict[int, dict[int, Extremes]] = {}  # by sequence, by layer
        num_device = int(storage.device.shape[1])
        whole = None if storage.whole is None else (storage.whole[0], storage.whole[1])
        staging = range(num_device - num_staging, num_device)
        (keys, values), (host_keys, host_values) = storage.device, storage.host
        self._caches = TwoCaches(keys, values, host_keys, host_values, staging, whole)
        # Views of what the manager knows of each page: they change with it.
        self._device_block = np.frombuffer(manager.residency.device_of, dtype=np.int64)
        self._host_block = np.frombuffer(manager.residency.host_of, dtype=np.int64)
        self._priority = np.frombuffer(manager.priority)
        self._chunks: list[Chunk] = []
        self._loc = np.zeros(1, dtype=np.int64)  # [num_seqs + 1] cumulative counts of tokens

    @property
    def page_bytes(self) -> int:
        return self.storage.page_bytes

    @property
    def device_bytes(self) -> int:
        """All that attention holds on the device: pages, staging blocks and bounds."""
        bounds = sum(layer.nbytes for layers in self._extremes.values() for layer in layers.values())
        return int(self.storage.device.nbytes) + bounds

    # --- a step --------------------------------------------------------------------------------------

    def begin_step(self, plan: StepPlan, inputs: StepInputs | None = None) -> None:
        """Prepare for the chunks of `plan`. Nothing of `inputs` is needed: pages have no slots."""
        self._chunks = [Chunk(seq.seq_id, seq.num_computed, count) for seq, count in plan.chunks]
        self._loc = np.concatenate([[0], np.cumsum([chunk.num_tokens for chunk in self._chunks])])
        self.counters.tokens += int(self._loc[-1])
        for seq_id in self._extremes.keys() - self.manager.tables.keys():
            del self._extremes[seq_id]

    def attend(
        self, layer: int, query: Array, key: Array, value: Array, addresses: Addresses | None, window: int | None
    ) -> Array:
        """Write this step's `key, value [num_tokens, num_kv_heads, head_size]` of the layer, then attend:
        `query [num_tokens, num_heads, head_size]` to an answer of the same shape. `addresses` are not needed."""
        num_tokens, num_kv_heads = query.shape[0], self.config.num_kv_heads
        self.write(layer, key, value)
        # [num_tokens, num_kv_heads, group_size, head_size]
        grouped = query.reshape(num_tokens, num_kv_heads, -1, self.config.head_size)
        reads = self._select(layer, grouped, window)
        # [num_kv_heads * num_tokens, group_size, head_size]: one KV head after another
        by_head = xp.ascontiguousarray(grouped.transpose(1, 0, 2, 3)).reshape(-1, *grouped.shape[2:])
        out = self._attention(layer, by_head, reads, window)
        out = out.reshape(num_kv_heads, num_tokens, *grouped.shape[2:]).transpose(1, 0, 2, 3)
        return xp.ascontiguousarray(out).reshape(query.shape)

    # --- writing -------------------------------------------------------------------------------------

    def write(self, layer: int, keys: Array, values: Array) -> None:
        """Write the step's keys and values of the layer, `[num_tokens, num_kv_heads, head_size]`, to their pages.

        If these are more than the device holds, they are written and evicted one batch after another.
        """
        size, num_kv_heads = self.manager.block_size, self.config.num_kv_heads
        wanted: list[tuple[int, int, int]] = []  # sequence, KV head, logical block
        item_of = np.empty(keys.shape[:2], dtype=np.int64)  # [num_tokens, num_kv_heads]: index into `wanted`
        for row, (seq_id, first, count) in zip(self._loc.tolist(), self._chunks, strict=False):
            blocks = np.arange(first, first + count) // size  # [count]
            num_blocks = int(blocks[-1] - blocks[0]) + 1
            in_head = blocks - blocks[0]
            item_of[row : row + count] = len(wanted) + in_head[:, None] + np.arange(num_kv_heads) * num_blocks
            begin = int(blocks[0])
            wanted += [(seq_id, head, begin + b) for head in range(num_kv_heads) for b in range(num_blocks)]
            if self._chooses[layer]:
                self._bounds_of(seq_id, layer).write(first, keys[row : row + count])
        positions = np.concatenate([np.arange(first, first + count) for _, first, count in self._chunks])
        seq_ids = np.repeat([chunk.seq_id for chunk in self._chunks], np.diff(self._loc))
        batch = self.manager.residency.device.num_blocks
        for begin in range(0, len(wanted), batch):
            pages, transfers = self.manager.prepare(layer, wanted[begin : begin + batch])
            self._apply(transfers)
            here = (item_of >= begin) & (item_of < begin + batch)
            tokens, heads = np.nonzero(here)
            page_of = np.array(pages)[item_of[here] - begin]
            blocks, offsets = self._device_block[page_of], positions[tokens] % size
            where = (xp.asarray(blocks), xp.asarray(offsets), 0)
            source = (xp.asarray(tokens), xp.asarray(heads))
            self._caches.keys[where], self._caches.values[where] = keys[source], values[source]
            self._wrote(layer, Written(page_of, seq_ids[tokens], heads, positions[tokens], blocks, offsets))

    def _bounds_of(self, seq_id: int, layer: int) -> Extremes:
        layers = self._extremes.setdefault(seq_id, {})
        if layer not in layers:
            layers[layer] = Extremes(self.config.num_kv_heads, self.config.head_size, self.manager.block_size)
        return layers[layer]

    def _apply(self, transfers: Sequence[Transfer]) -> None:
        if not transfers:
            return
        bytes_out, bytes_in = self.storage.apply(transfers)
        self.storage.wait()
        self.counters.bytes_out += bytes_out
        self.counters.bytes_in += bytes_in

    # --- choosing ------------------------------------------------------------------------------------

    def _all_pages(self, layer: int, window: int | None) -> list[HeadPages]:
        """All pages that the layer sees: [num_kv_heads * num_seqs], one KV head after another."""
        size = self.manager.block_size
        reads = []
        for head in range(self.config.num_kv_heads):
            for seq_id, first, count in self._chunks:
                pages = np.array(self.manager.tables[seq_id].pages[layer][head], dtype=np.int64)
                begin = 0 if window is None else max(0, first - window + 1) // size
                reads.append(HeadPages(np.arange(begin, len(pages)), pages[begin:], first + count - begin * size))
        return reads

    def _select(self, layer: int, query: Array, window: int | None) -> list[HeadPages]:
        """What each KV head of each sequence reads. Chosen pages are brought to the device, if they fit there.

        `query [num_tokens, num_kv_heads, group_size, head_size]`; the answer is in the order of `_all_pages`.
        """
        every = self._all_pages(layer, window)
        reads, wanted = every.copy(), []
        for s, (seq_id, _, count) in enumerate(self._chunks):
            num_blocks = len(every[s].pages)
            budget = budget_of(self.budget, num_blocks)
            if self._chooses[layer] and count == 1 and budget < num_blocks:
                scores = self._scores(seq_id, layer, query[int(self._loc[s])])
                for head, blocks in enumerate(choose(scores, budget)):
                    row = head * len(self._chunks) + s
                    reads[row] = self._chosen(every[row], blocks, scores[head])
                    wanted += reads[row].pages.tolist()
        self.counters.attended += sum(len(read.pages) for read in reads)
        self.counters.resident += sum(int((self._device_block[read.pages] >= 0).sum()) for read in reads)
        self._observe(layer, query, window, every, reads)
        if wanted and self.manager.evict == "relevance":
            wanted = self._worth_loading(np.array(wanted, dtype=np.int64))
        if len(wanted) <= self.manager.residency.device.num_blocks:  # else all of them stream
            self._apply(self.manager.residency.need(wanted))
        return reads

    def _chosen(self, every: HeadPages, blocks: np.ndarray, scores: np.ndarray) -> HeadPages:
        """`blocks` of a sequence's pages. Their new priority makes the pages that were chosen last leave last."""
        size, pages = self.manager.block_size, every.pages
        if self.manager.evict == "relevance":
            self._priority[pages] = scores
            self._priority[pages[blocks]] += 1
        empty_slots = len(pages) * size - every.num_keys  # of the most recent block, which is always chosen
        return HeadPages(blocks, pages[blocks], len(blocks) * size - empty_slots)

    def _worth_loading(self, wanted: np.ndarray) -> list[int]:
        """The wanted pages that are on the device, plus the pages with a higher priority than the page that they would
        evict. All others are streamed through staging, so that one layer does not evict the next layer's pages."""
        away = wanted[self._device_block[wanted] < 0]
        away = away[np.argsort(-self._priority[away])]
        others = np.setdiff1d(np.flatnonzero(self._device_block >= 0), wanted)
        free = np.full(self.manager.residency.device.num_free, -np.inf)
        least = np.concatenate([free, np.sort(self._priority[others])])[: len(away)]
        # Falling against rising priorities: the pages that are worth it come first.
        count = int((self._priority[away[: len(least)]] > least).sum())
        return [*wanted[self._device_block[wanted] >= 0].tolist(), *away[:count].tolist()]

    def _scores(self, seq_id: int, layer: int, query: Array) -> np.ndarray:
        """[num_kv_heads, num_blocks]: what the bounds promise a query [num_kv_heads, group_size, head_size]."""
        return shares(self._extremes[seq_id][layer].bounds(query), self.config.head_size**-0.5)

    # --- attention -----------------------------------------------------------------------------------

    def _attention(self, layer: int, query: Array, reads: Sequence[HeadPages], window: int | None) -> Array:
        """`query [num_kv_heads * num_tokens, group_size, head_size]`, and an answer of the same shape."""
        num_tokens = int(self._loc[-1])
        device = np.full((len(reads), max(len(read.pages) for read in reads)), -1)
        host = device.copy()
        for read, here, away in zip(reads, device, host, strict=True):
            here[: len(read.pages)] = self._device_block[read.pages]
            away[: len(read.pages)] = self._host_block[read.pages]
        self.counters.bytes_in += int(((device < 0) & (host >= 0)).sum()) * self.page_bytes
        starts = np.arange(self.config.num_kv_heads)[:, None] * num_tokens + self._loc[:-1]
        out, _ = streamed_attention(
            query, self._caches, device, host, np.array([read.num_keys for read in reads]),
            np.append(starts.ravel(), len(query)), sliding_window=window, backend=self.backend,
            check=self._check(layer, reads),
        )  # fmt: skip
        return out

    # --- what a sanitizer overrides ------------------------------------------------------------------

    def _wrote(self, layer: int, written: Written) -> None:
        """These slots of the layer now hold their keys and values."""

    def _check(self, layer: int, reads: Sequence[HeadPages]) -> Check | None:
        """What attention calls before it reads. `reads` are in the order of `_all_pages`."""
        return None

    # --- observing -----------------------------------------------------------------------------------

    def _observe(
        self, layer: int, query: Array, window: int | None, every: Sequence[HeadPages], reads: Sequence[HeadPages]
    ) -> None:
        """Read all keys, and report what share of the attention each block has. Does nothing unless it is wanted."""
        head = self.watch[1] if self.log and self.watch and self.watch[0] == layer else None
        if self.observe is None and head is None:
            return
        num_seqs = len(self._chunks)
        for s, (seq_id, _, _) in enumerate(self._chunks):
            last = query[int(self._loc[s + 1]) - 1]  # [num_kv_heads, group_size, head_size]
            pages = every[s::num_seqs]  # [num_kv_heads]
            mass = np.stack(
                [attention_mass(to_host(q), self._keys_of(p), p, window) for q, p in zip(last, pages, strict=True)]
            )
            scores = self._scores(seq_id, layer, last) if self._chooses[layer] else mass.mean(axis=1)
            chosen = [read.blocks for read in reads[s::num_seqs]]
            resident = [p.blocks[self._device_block[p.pages] >= 0] for p in pages]
            observation = Observation(seq_id, layer, mass, scores, chosen, resident)
            if self.observe:
                self.observe(observation)
            if self.log and head is not None:
                self.log(observation.event(head))

    def _keys_of(self, read: HeadPages) -> np.ndarray:
        """[len(read.pages), block_size, 1, head_size] float32, from wherever each page lies."""
        here, away = self._device_block[read.pages], self._host_block[read.pages]
        self.storage.synchronize()
        keys = np.empty((len(read.pages), *self._caches.host_keys.shape[1:]), dtype=np.float32)
        keys[here >= 0] = to_host(self._caches.keys[xp.asarray(here[here >= 0])])
        keys[here < 0] = self._caches.host_keys[away[here < 0]]
        return keys
