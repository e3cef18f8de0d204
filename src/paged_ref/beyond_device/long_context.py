"""Contexts longer than the device: attention over pages that stream in, or over the pages that matter.

`LongContext` stands where the model's attention and its caches stand otherwise. The model writes the step's keys of a
layer to one small buffer; from there they go to pages (memory/streaming.py), some of which make room by leaving for the
host. Then attention runs over all pages of each sequence, wherever they are (kernels/out_of_core.py), or, with a
budget, over the pages whose bound says that they matter to this query (memory/relevance.py), which are brought to
the device and stay there.

To the kernel each KV head of each sequence is a sequence of its own, with its own table: a row below.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..core.device import Array, to_host, xp
from ..core.memory.kv import PageStorage
from ..core.memory.manager import Transfer
from ..core.model.config import ModelConfig
from ..core.model.llama import StepInputs
from ..timeline.events import Log, PagesAttended
from .attention import TwoCaches, streamed_attention
from .page_sanitizer import PageSanitizer
from .relevance import Attend, Extremes, budget_of, check_attend, choose, shares
from .streaming import StreamingManager


@dataclass(slots=True)
class Counters:
    """Since the beginning, or since `LongContext.counters` was replaced by a new one."""

    tokens: int = 0  # computed
    attended: int = 0  # pages that attention read
    resident: int = 0  # of these, on the device when they were asked for
    bytes_in: int = 0  # from the host: brought in to stay, or streamed
    bytes_out: int = 0  # to the host: pages that had to leave

    @property
    def hit_rate(self) -> float:
        return self.resident / max(1, self.attended)


class _Row(NamedTuple):
    """What one KV head of one sequence reads: pages in the order of their blocks, and how many keys in all."""

    blocks: np.ndarray  # logical
    pages: np.ndarray
    num_keys: int


class Observation(NamedTuple):
    """What attention of one layer read for the last token of a sequence, beside what it would have read of all."""

    seq_id: int
    layer: int
    mass: np.ndarray  # [num_kv_heads, group_size, num_blocks] the true share of each block
    scores: np.ndarray  # [num_kv_heads, num_blocks] the share that its bound promises
    chosen: list[np.ndarray]  # for each KV head: logical blocks
    resident: list[np.ndarray]  # for each KV head: those of all logical blocks that were on the device when asked for


class LongContext:
    """Iterate over it for each layer's (key, value) buffer, and call it as the layer's attention."""

    def __init__(
        self,
        config: ModelConfig,
        manager: StreamingManager,
        storage: PageStorage,
        *,
        max_batch_tokens: int,
        num_staging: int,
        attend: Attend = "all",
        full_layers: int | None = None,
        backend: str = "auto",
        sanitizer: PageSanitizer | None = None,
        log: Log | None = None,
    ) -> None:
        """The last `num_staging` device blocks of `storage` are for streaming; 0: tiles (CPU only).

        `attend` is "all", a budget in blocks, or a share of a sequence's blocks, for each layer and KV head; it holds
        for steps of one token. The first `full_layers` attend to all (default: one in sixteen, at least one): their
        attention is spread so wide that no choice is a good one. Prompts, and layers with a sliding window, attend
        to all that they see.
        """
        check_attend(attend)
        self.config, self.manager, self.storage = config, manager, storage
        self.attend = attend
        self.full_layers = max(1, config.num_layers // 16) if full_layers is None else full_layers
        if not 0 <= self.full_layers <= config.num_layers:
            raise ValueError(
                f"full_layers is {self.full_layers}; 0 to the model's {config.num_layers} layers can be had"
            )
        self.backend = backend
        self.sanitizer = sanitizer
        self.log = log
        self.watch: tuple[int, int] | None = None  # (layer, query head) whose attention is logged
        self.observe: Callable[[Observation], None] | None = None  # told of each layer, at the cost of reading all
        self.counters = Counters()
        self._extremes: dict[int, dict[int, Extremes]] = {}  # by sequence, by layer
        num_device = int(storage.device.shape[2])
        keys, values = storage.layers[0]
        whole = None if storage.whole is None else (storage.whole[0, 0], storage.whole[0, 1])
        staging = range(num_device - num_staging, num_device)
        self._caches = TwoCaches(keys, values, storage.host[0, 0], storage.host[0, 1], staging, whole)
        shape = (1, max_batch_tokens, config.num_kv_heads, config.head_size)
        self._buffer = (xp.empty(shape, dtype=keys.dtype), xp.empty(shape, dtype=keys.dtype))
        self._chunks: Sequence[tuple[int, int, int]] = ()  # sequence, first position, number of tokens
        self._loc = np.zeros(1, dtype=np.int64)  # [num_seqs + 1] cumulative counts of tokens
        self._layer = 0

    @property
    def page_bytes(self) -> int:
        return 2 * self._caches.block_size * self.config.head_size * int(self._caches.keys.itemsize)

    @property
    def device_bytes(self) -> int:
        """All that attention holds on the device: pages, staging, the step's buffer, and the bounds."""
        bounds = sum(layer.nbytes for layers in self._extremes.values() for layer in layers.values())
        return int(self.storage.device.nbytes) + 2 * int(self._buffer[0].nbytes) + bounds

    # --- a step --------------------------------------------------------------------------------------

    def begin_step(self, chunks: Sequence[tuple[int, int, int]]) -> None:
        """What the next step computes: (sequence, first position, number of tokens), in the order of its rows."""
        self.manager.begin_step(chunks)
        self._chunks = chunks
        self._loc = np.concatenate([[0], np.cumsum([count for _, _, count in chunks])])
        self.counters.tokens += int(self._loc[-1])
        for seq_id in self._extremes.keys() - self.manager.tables.keys():
            del self._extremes[seq_id]

    def __iter__(self) -> Iterator[tuple[Array, Array]]:
        """Each layer's buffer, when the model comes to the layer."""
        for layer in range(self.config.num_layers):
            self._layer = layer
            yield self._buffer

    def __len__(self) -> int:
        return self.config.num_layers

    def __call__(
        self,
        query: Array,
        key_cache: Array,
        value_cache: Array,
        inputs: StepInputs | None,
        *,
        sliding_window: int | None,
    ) -> Array:
        """Attention of this layer: `query [num_tokens, num_heads, head_size]` after its keys and values were written
        to the buffer, `[1, max_batch_tokens, num_kv_heads, head_size]`. Of `inputs` nothing is needed: begin_step
        has said all."""
        num_tokens, num_kv_heads = query.shape[0], self.config.num_kv_heads
        self.write(key_cache[0, :num_tokens], value_cache[0, :num_tokens])
        # [num_kv_heads * num_tokens, group_size, head_size]: one KV head after another
        grouped = query.reshape(num_tokens, num_kv_heads, -1, self.config.head_size)
        by_head = xp.ascontiguousarray(grouped.transpose(1, 0, 2, 3)).reshape(-1, *grouped.shape[2:])
        rows = self._rows(grouped)
        out = self._attention(by_head, rows, sliding_window)
        out = out.reshape(num_kv_heads, num_tokens, *grouped.shape[2:]).transpose(1, 0, 2, 3)
        return xp.ascontiguousarray(out).reshape(query.shape)

    # --- writing -------------------------------------------------------------------------------------

    def write(self, keys: Array, values: Array) -> None:
        """The step's keys and values of this layer, `[num_tokens, num_kv_heads, head_size]`, to their pages. If these
        are more than the device holds, they come and go one batch after another."""
        manager, size = self.manager, self._caches.block_size
        wanted: list[tuple[int, int, int]] = []
        item_of = np.empty(keys.shape[:2], dtype=np.int64)  # [num_tokens, num_kv_heads]: which of `wanted`
        for row, (seq_id, first, count) in zip(self._loc.tolist(), self._chunks, strict=False):
            blocks = np.arange(first, first + count) // size - first // size  # [count]
            heads = np.arange(self.config.num_kv_heads) * (int(blocks[-1]) + 1)
            item_of[row : row + count] = len(wanted) + blocks[:, None] + heads
            wanted += ((seq_id, *item) for item in manager.pages_to_write(self._layer, seq_id, first, count))
            if self._chooses:
                layers = self._extremes.setdefault(seq_id, {})
                if self._layer not in layers:
                    layers[self._layer] = Extremes(self.config.num_kv_heads, self.config.head_size, size)
                layers[self._layer].write(first, keys[row : row + count])
        positions = np.concatenate([np.arange(first, first + count) for _, first, count in self._chunks])
        batch = manager.residency.device.num_blocks
        for begin in range(0, len(wanted), batch):
            pages, transfers = manager.prepare(self._layer, wanted[begin : begin + batch])
            self._apply(transfers)
            written = (item_of >= begin) & (item_of < begin + batch)
            tokens, heads = np.nonzero(written)
            page_of = np.array(pages)[item_of[written] - begin]
            blocks, offsets = self._device_of(page_of), positions[tokens] % size
            where = (xp.asarray(blocks), xp.asarray(offsets), 0)
            source = (xp.asarray(tokens), xp.asarray(heads))
            self._caches.keys[where], self._caches.values[where] = keys[source], values[source]
            if self.sanitizer:
                seqs = np.repeat([seq_id for seq_id, _, _ in self._chunks], np.diff(self._loc))
                self.sanitizer.wrote(self._layer, page_of, seqs[tokens], heads, positions[tokens], blocks, offsets)

    @property
    def _chooses(self) -> bool:
        """This layer attends to what matters."""
        sees_all = self.config.sliding_windows[self._layer] is None
        return self.attend != "all" and sees_all and self._layer >= self.full_layers

    def _apply(self, transfers: Sequence[Transfer]) -> None:
        self.storage.apply(transfers)
        out = sum(t.kind == "swap_out" for t in transfers)
        self.counters.bytes_out += out * self.page_bytes
        self.counters.bytes_in += (len(transfers) - out) * self.page_bytes

    def _device_of(self, pages: np.ndarray) -> np.ndarray:
        blocks: np.ndarray = np.frombuffer(self.manager.residency.device_of, dtype=np.int64)[pages]
        return blocks

    def _host_of(self, pages: np.ndarray) -> np.ndarray:
        blocks: np.ndarray = np.frombuffer(self.manager.residency.host_of, dtype=np.int64)[pages]
        return blocks

    # --- choosing ------------------------------------------------------------------------------------

    def _all_rows(self) -> list[_Row]:
        """Every page of every sequence that the layer sees: [num_kv_heads * num_seqs], one KV head after another."""
        window, size = self.config.sliding_windows[self._layer], self._caches.block_size
        rows = []
        for head in range(self.config.num_kv_heads):
            for seq_id, first, count in self._chunks:
                pages = np.array(self.manager.tables[seq_id].pages[self._layer][head], dtype=np.int64)
                begin = 0 if window is None else max(0, first - window + 1) // size
                rows.append(_Row(np.arange(begin, len(pages)), pages[begin:], first + count - begin * size))
        return rows

    def _rows(self, query: Array) -> list[_Row]:
        """What each KV head of each sequence reads. What was chosen is brought to the device, if it fits there.

        `query [num_tokens, num_kv_heads, group_size, head_size]`.
        """
        rows = self._all_rows()
        every, wanted = rows.copy(), []
        num_seqs, size = len(self._chunks), self._caches.block_size
        for s, (seq_id, first, count) in enumerate(self._chunks):
            num_blocks = len(rows[s].pages)
            budget = budget_of(self.attend, num_blocks)
            if not self._chooses or count > 1 or budget >= num_blocks:
                continue
            scores = self._scores(seq_id, query[int(self._loc[s])])
            for head, blocks in enumerate(choose(scores, budget)):  # the most recent block is always among them
                pages = rows[head * num_seqs + s].pages
                num_keys = len(blocks) * size - (num_blocks * size - first - count)
                rows[head * num_seqs + s] = _Row(blocks, pages[blocks], num_keys)
                wanted += pages[blocks].tolist()
                if self.manager.evict == "relevance":  # whatever was chosen last leaves last
                    priority = np.frombuffer(self.manager.priority)
                    priority[pages] = scores[head]
                    priority[pages[blocks]] += 1
        self.counters.attended += sum(len(row.pages) for row in rows)
        self.counters.resident += sum(int((self._device_of(row.pages) >= 0).sum()) for row in rows)
        if self.observe or (self.log and self.watch and self.watch[0] == self._layer):
            self._tell(query, every, rows)
        if wanted and self.manager.evict == "relevance":
            wanted = self._worth_their_room(np.array(wanted, dtype=np.int64))
        if len(wanted) <= self.manager.residency.device.num_blocks:  # else all of it streams
            self._apply(self.manager.residency.need(wanted))
        return rows

    def _worth_their_room(self, wanted: np.ndarray) -> list[int]:
        """Of the pages that were chosen, those that are on the device, and those that matter more than who would have
        to leave for them. The others stream by: else each layer would drive out what the next one needs."""
        priority = np.frombuffer(self.manager.priority)
        away = wanted[self._device_of(wanted) < 0]
        away = away[np.argsort(-priority[away])]
        device = np.frombuffer(self.manager.residency.device_of, dtype=np.int64)
        others = np.setdiff1d(np.flatnonzero(device >= 0), wanted)
        free = np.full(self.manager.residency.device.num_free, -np.inf)
        least = np.concatenate([free, np.sort(priority[others])])[: len(away)]
        count = int((priority[away[: len(least)]] > least).sum())  # falling against rising: these come first
        return [*wanted[self._device_of(wanted) >= 0].tolist(), *away[:count].tolist()]

    def _scores(self, seq_id: int, query: Array) -> np.ndarray:
        """[num_kv_heads, num_blocks]: what the bounds promise a query [num_kv_heads, group_size, head_size]."""
        return shares(self._extremes[seq_id][self._layer].bounds(query), self.config.head_size**-0.5)

    # --- attention -----------------------------------------------------------------------------------

    def _attention(self, query: Array, rows: Sequence[_Row], sliding_window: int | None) -> Array:
        """`query [num_kv_heads * num_tokens, group_size, head_size]`."""
        num_tokens, num_seqs = int(self._loc[-1]), len(self._chunks)
        device = np.full((len(rows), max(len(row.pages) for row in rows)), -1)
        host = device.copy()
        for row, here, away in zip(rows, device, host, strict=True):
            here[: len(row.pages)] = self._device_of(row.pages)
            away[: len(row.pages)] = self._host_of(row.pages)
        self.counters.bytes_in += int(((device < 0) & (host >= 0)).sum()) * self.page_bytes
        starts = np.arange(self.config.num_kv_heads)[:, None] * num_tokens + self._loc[:-1]
        check = None
        if self.sanitizer:
            readers = [(self._chunks[r % num_seqs][0], r // num_seqs) for r in range(len(rows))]
            check = self.sanitizer.checker(self._layer, readers, [row.blocks for row in rows], [r.pages for r in rows])
        out, _ = streamed_attention(
            query, self._caches, device, host, np.array([row.num_keys for row in rows]),
            np.append(starts.ravel(), len(query)), sliding_window=sliding_window, backend=self.backend, check=check,
        )  # fmt: skip
        return out

    # --- for those who watch -------------------------------------------------------------------------

    def _tell(self, query: Array, every: Sequence[_Row], rows: Sequence[_Row]) -> None:
        """Read all keys, and tell what share of the attention each block has."""
        num_seqs = len(self._chunks)
        for s, (seq_id, _, _) in enumerate(self._chunks):
            last = query[int(self._loc[s + 1]) - 1]  # [num_kv_heads, group_size, head_size]
            mass = np.stack([self._mass(last[head], row) for head, row in enumerate(every[s::num_seqs])])
            resident = [row.blocks[self._device_of(row.pages) >= 0] for row in every[s::num_seqs]]
            chosen = [row.blocks for row in rows[s::num_seqs]]
            if self.observe:
                scores = self._scores(seq_id, last) if self._chooses else mass.mean(axis=1)
                self.observe(Observation(seq_id, self._layer, mass, scores, chosen, resident))
            if self.log and self.watch and self.watch[0] == self._layer:
                head, group = divmod(self.watch[1], mass.shape[1])
                about = [chosen[head].tolist(), resident[head].tolist()]
                about.append(np.round(mass[head, group] * 1e6).astype(int).tolist())
                self.log(PagesAttended(seq_id, *self.watch, *map(tuple, about)))

    def _mass(self, query: Array, row: _Row) -> np.ndarray:
        """[group_size, num_blocks]: the share of each block in the attention of `query [group_size, head_size]`, the
        sequence's last, over the consecutive blocks of `row`."""
        here, away = self._device_of(row.pages), self._host_of(row.pages)
        self.storage.synchronize()
        keys = np.empty((len(row.pages), *self._caches.host_keys.shape[1:]), dtype=np.float32)
        keys[here >= 0] = to_host(self._caches.keys[xp.asarray(here[here >= 0])])
        keys[here < 0] = self._caches.host_keys[away[here < 0]]
        keys = keys.reshape(-1, keys.shape[-1])  # [num_blocks * block_size, head_size]
        scores = to_host(query).astype(np.float32) @ keys.T * np.float32(self.config.head_size**-0.5)
        window = self.config.sliding_windows[self._layer] or row.num_keys
        seen = slice(max(0, row.num_keys - window), row.num_keys)
        weights = np.zeros_like(scores)
        weights[:, seen] = np.exp(scores[:, seen] - scores[:, seen].max(axis=1, keepdims=True))
        weights = (weights / weights.sum(axis=1, keepdims=True)).reshape(len(query), len(row.pages), -1)
        mass = np.zeros((len(query), int(row.blocks[-1]) + 1), dtype=np.float32)
        mass[:, row.blocks] = weights.sum(axis=2)
        return mass
