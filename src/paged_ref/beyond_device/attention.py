"""Attention over K and V of which only a part is on the device: exact, in device memory that does not grow.

Every block of a sequence lies in the device's cache or in the host's cache. Host blocks are read in one of two ways:

  staged  Host blocks stream through a few staging blocks of the device's cache, piece by piece. The blocks of a
          piece that are on the device are read in place. Attention over each piece gives an output and a
          log-sum-exp, and `merge_states` joins them to the pieces before. While one half of the staging blocks is
          read, the next piece is copied into the other half: on a GPU by a stream of its own.
  tiled   On a CPU the host's cache is memory like any other. The compiled loop (tuned/cpu_simd.py) goes through it in
          tiles of 32 tokens, reads them where they lie, and prefetches the tokens that come next. Its online softmax is
          the same merge. The two caches must be one array.

On a CPU, pieces take about 3 times the core time of a resident run for one new token, since every byte goes through the
caches twice, and each piece through Python. Tiles take as much as a resident run (`paged-ref bench long`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from ..core.attention.attention import Addresses, AttentionCall
from ..core.checks import plural
from ..core.device import Array, module_of
from ..kernels import merge_states, paged_attention
from ..tuned.copies import CopyStream
from ..tuned.parts import add_part

# For the sanitizer. Called with (sequences, table, first keys, numbers of keys) before attention reads: each row of
# `table` has the blocks that hold a sequence's keys from its first key on.
Check = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], None]


@dataclass(frozen=True, slots=True)
class TwoCaches:
    """K and V on the device and on the host, `[num_blocks, block_size, num_kv_heads, head_size]` each.

    `staging` are device blocks without another use; empty for the tiled way. Then `whole` is (keys, values) with the
    device's blocks first and the host's blocks after them: the others are views of `whole`.
    """

    keys: Array
    values: Array
    host_keys: np.ndarray
    host_values: np.ndarray
    staging: range
    whole: tuple[np.ndarray, np.ndarray] | None = None
    copies: CopyStream = field(default_factory=CopyStream)

    @property
    def block_size(self) -> int:
        return int(self.keys.shape[1])


def streamed_attention(
    query: Array,
    caches: TwoCaches,
    device_tables: np.ndarray,
    host_tables: np.ndarray,
    seq_lens: np.ndarray,
    query_start_loc: np.ndarray,
    *,
    sliding_window: int | None = None,
    backend: str = "auto",
    check: Check | None = None,
) -> tuple[Array, Array]:
    """Causal attention as `paged_attention` defines it; returns `(output, lse)`.

    `device_tables, host_tables [num_seqs, max_blocks]`: where each logical block lies, negative where it does not. At
    least one of the two must have each block; the device's block is read if both do. Tables, lengths and counts are
    NumPy arrays, since the host decides what to copy. Raises ValueError if a layer's sliding window does not fit the
    staging blocks.
    """
    if caches.staging:
        work = _Staged(query, caches, device_tables, host_tables, seq_lens, query_start_loc, backend, check)
        return work.in_pieces() if sliding_window is None else work.window(sliding_window)
    table = np.where(device_tables >= 0, device_tables, host_tables + len(caches.keys))
    if check:
        check(np.arange(len(seq_lens)), table, np.zeros_like(seq_lens), seq_lens)
    from ..tuned import cpu_simd  # compiled code: loaded when it is needed

    assert caches.whole is not None
    addresses = Addresses(seq_lens, query_start_loc, block_tables=table)
    out, lse = np.empty_like(query), np.empty(query.shape[:2], dtype=np.float32)
    call = AttentionCall(query, *caches.whole, addresses, query.shape[-1] ** -0.5, sliding_window, out=out, lse=lse)
    cpu_simd.attend(call)
    return out, lse


# --- staged ------------------------------------------------------------------------------------------------


class _Piece(NamedTuple):
    """Consecutive blocks of consecutive sequences. Those of them that are on the host fit the staging blocks."""

    first: int  # sequence
    last: int  # sequence, included
    begin: np.ndarray  # [last - first + 1] the first block of each sequence
    end: np.ndarray  # [last - first + 1] the block behind the last one of each sequence


def _pieces(device_tables: np.ndarray, seq_lens: np.ndarray, block_size: int, room: int) -> Iterator[_Piece]:
    """All blocks in order, cut so that no piece has more than `room` blocks on the host."""
    num_blocks = -(-seq_lens.astype(np.int64) // block_size)  # [num_seqs]
    bounds = np.concatenate([[0], np.cumsum(num_blocks)])  # [num_seqs + 1] in the row of all blocks
    used = np.arange(device_tables.shape[1]) < num_blocks[:, None]  # [num_seqs, max_blocks]
    missing = np.cumsum(device_tables[used] < 0)  # [all blocks] on the host, up to and with this one
    cut = 0
    while cut < bounds[-1]:
        before = int(missing[cut - 1]) if cut else 0
        stop = int(np.searchsorted(missing, before + room, side="right"))
        first = int(np.searchsorted(bounds, cut, side="right")) - 1
        last = int(np.searchsorted(bounds, stop, side="left")) - 1
        begin = np.clip(cut - bounds[first : last + 1], 0, num_blocks[first : last + 1])
        end = np.clip(stop - bounds[first : last + 1], 0, num_blocks[first : last + 1])
        yield _Piece(first, last, begin, end)
        cut = stop


def _table_of(
    piece: _Piece, device_tables: np.ndarray, host_tables: np.ndarray, next_staging: int
) -> tuple[np.ndarray, np.ndarray]:
    """The piece's table, with a staging block in the place of each host block; and those host blocks."""
    table = np.zeros((len(piece.begin), int((piece.end - piece.begin).max())), dtype=np.int64)
    staged = []
    for row, seq, begin, end in zip(table, range(piece.first, piece.last + 1), piece.begin, piece.end, strict=True):
        here = device_tables[seq, begin:end]
        away = np.flatnonzero(here < 0)
        row[: end - begin] = here
        row[away] = np.arange(next_staging, next_staging + len(away))
        next_staging += len(away)
        staged.append(host_tables[seq, begin:end][away])
    return table, np.concatenate(staged)


@dataclass(frozen=True, slots=True)
class _Staged:
    """One call of `streamed_attention`, with its arguments."""

    query: Array
    caches: TwoCaches
    device_tables: np.ndarray
    host_tables: np.ndarray
    seq_lens: np.ndarray
    query_start_loc: np.ndarray
    backend: str
    check: Check | None

    def in_pieces(self) -> tuple[Array, Array]:
        """Attend to one piece after another. Each query is a sequence of its own: how far it sees into a piece is then
        a length, and a kernel without a mask is enough."""
        xp, size = module_of(self.query), self.caches.block_size
        query_lens = np.diff(self.query_start_loc)
        seq_of = np.repeat(np.arange(len(self.seq_lens)), query_lens)  # [num_tokens]
        first_position = (self.seq_lens - query_lens - self.query_start_loc[:-1])[seq_of]
        visible = np.arange(len(seq_of)) + first_position + 1  # [num_tokens] keys that each query sees
        out = xp.zeros(self.query.shape, dtype=np.promote_types(self.query.dtype, np.float32))
        lse = xp.full(self.query.shape[:2], -np.inf, dtype=np.float32)
        stager = _Stager(self.caches, halves=min(2, len(self.caches.staging)))
        on_the_way: deque[tuple[_Piece, np.ndarray, int]] = deque()

        def attend() -> None:
            piece, table, half = on_the_way.popleft()
            rows = slice(int(self.query_start_loc[piece.first]), int(self.query_start_loc[piece.last + 1]))
            seq = seq_of[rows] - piece.first  # [rows] of the piece's sequences
            first_key = piece.begin * size
            lens = np.clip(visible[rows] - first_key[seq], 0, ((piece.end - piece.begin) * size)[seq])
            stager.wait(half)
            if self.check:
                longest = np.zeros(len(table), dtype=np.int64)
                np.maximum.at(longest, seq, lens)
                self.check(np.arange(piece.first, piece.last + 1), table, first_key, longest)
            part, part_lse = self._attend(rows, table[seq], lens, np.arange(len(seq) + 1), None)
            if not add_part(out[rows], lse[rows], part, part_lse):
                out[rows], lse[rows] = merge_states(xp.stack([out[rows], part]), xp.stack([lse[rows], part_lse]))
            stager.done(half)

        for piece in _pieces(self.device_tables, self.seq_lens, size, stager.room):
            on_the_way.append((piece, *stager.fetch(piece, self.device_tables, self.host_tables)))
            if len(on_the_way) == stager.halves:  # the copy of the next piece has begun
                attend()
        while on_the_way:
            attend()
        return out.astype(self.query.dtype, copy=False), lse

    def window(self, sliding_window: int) -> tuple[Array, Array]:
        """Attend in a layer that sees only a window, which needs no more than the window's blocks. All of these are
        staged together, one sequence after another, since the window begins elsewhere for each query."""
        xp, size, loc = module_of(self.query), self.caches.block_size, self.query_start_loc
        out, lse = xp.empty_like(self.query), xp.empty(self.query.shape[:2], dtype=np.float32)
        stager = _Stager(self.caches, halves=1)
        first_blocks = np.maximum(0, self.seq_lens - np.diff(loc) - sliding_window + 1) // size
        for seq, begin in enumerate(first_blocks.tolist()):
            end = -(-int(self.seq_lens[seq]) // size)
            num_away = int((self.device_tables[seq, begin:end] < 0).sum())
            if num_away > stager.room:
                raise ValueError(
                    f"a layer with a sliding window of {sliding_window} needs {plural(num_away, 'block')} from the "
                    f"host at the same time; the staging buffer holds {stager.room}"
                )
            piece = _Piece(seq, seq, np.array([begin]), np.array([end]))
            table, half = stager.fetch(piece, self.device_tables, self.host_tables)
            lens = self.seq_lens[seq : seq + 1] - begin * size
            stager.wait(half)
            if self.check:
                self.check(np.array([seq]), table, piece.begin * size, lens)
            rows = slice(int(loc[seq]), int(loc[seq + 1]))
            out[rows], lse[rows] = self._attend(
                rows, table, lens, np.array([0, rows.stop - rows.start]), sliding_window
            )
            stager.done(half)
        return out, lse

    def _attend(
        self, rows: slice, table: np.ndarray, seq_lens: np.ndarray, query_start_loc: np.ndarray, window: int | None
    ) -> tuple[Array, Array]:
        """Attention of some rows of the query to blocks of the device; returns `(output, lse)`."""
        sizes = (table.size, len(seq_lens), len(query_start_loc))
        flat = np.concatenate([table.ravel(), seq_lens, query_start_loc])
        here, ends = module_of(self.query).asarray(flat), np.cumsum(sizes)  # one copy of all
        tables, lens, loc = here[: ends[0]], here[ends[0] : ends[1]], here[ends[1] :]
        part: tuple[Array, Array] = paged_attention(
            self.query[rows], self.caches.keys, self.caches.values, tables.reshape(table.shape), lens, loc,
            sliding_window=window, return_lse=True, backend=self.backend, validate=False,
        )  # fmt: skip
        return part


class _Stager:
    """Copies host blocks to staging blocks: into one half of them while attention reads the other half."""

    def __init__(self, caches: TwoCaches, halves: int) -> None:
        self._pairs = ((caches.host_keys, caches.keys), (caches.host_values, caches.values))
        self._copies = caches.copies
        self._first = caches.staging.start
        self.halves = halves
        self.room = len(caches.staging) // halves
        self._next = 0
        # Events. Whatever is computing now may still read the staging blocks.
        self._free: list[Any] = [self._copies.computed()] * halves
        self._arrived: list[Any] = [None] * halves

    def fetch(self, piece: _Piece, device_tables: np.ndarray, host_tables: np.ndarray) -> tuple[np.ndarray, int]:
        """Begin to copy the piece's host blocks. Returns its table, and the half to `wait` for."""
        half, self._next = self._next, (self._next + 1) % self.halves
        first = self._first + half * self.room
        table, host_blocks = _table_of(piece, device_tables, host_tables, first)
        self._copies.begin(after=self._free[half])
        for host, device in self._pairs:
            self._copies.gather(host, host_blocks, device[first : first + self.room])
        self._arrived[half] = self._copies.copied()
        return table, half

    def wait(self, half: int) -> None:
        """What is computed from now on sees the blocks of this half."""
        self._copies.wait(until=self._arrived[half])

    def done(self, half: int) -> None:
        """Nothing that is computed from now on reads this half: it may be written again."""
        self._free[half] = self._copies.computed()
