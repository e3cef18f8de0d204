"""Attention over K and V of which only a part is on the device: exact, in device memory that does not grow.

Every block of a sequence lies in the device's cache or in the host's. There are two ways to the second:

  staged  Host blocks stream through a few staging blocks of the device's cache, piece by piece. The blocks of a
          piece that are on the device are read where they are. Attention over each piece gives an output and a
          log-sum-exp, and `merge_states` joins it to what came before. While one half of the staging blocks is
          computed on, the next piece is copied into the other: on a GPU by a stream of its own.
  tiled   On a CPU the host's cache is memory like any other, so the copy can be as small as it likes: the
          compiled loop (cpu_loop.py) copies a tile of 16 tokens beside the core that needs it, and prefetches
          the next one meanwhile. Its softmax is online, which is the same merge. The two caches must be one array.

On a CPU pieces cost about 3 times the core time of a resident run for one new token, since every byte goes through
the caches twice, and through Python once for each piece; tiles cost 0.9 to 1.3 times (`paged-ref bench long`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from ..core.attention.attention import paged_attention
from ..core.attention.write import merge_states
from ..core.device import Array, module_of
from ..interop.arguments import build_call

# Called with (sequences, table, first keys, numbers of keys) before they are read: rows of `table` are the blocks that
# hold keys from `first key` on. For the sanitizer.
Check = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], None]


@dataclass(frozen=True, slots=True)
class TwoCaches:
    """K and V on the device and on the host, `[num_blocks, block_size, num_kv_heads, head_size]` each.

    `staging` are device blocks that nobody else uses; empty for the tiled way. Then `whole` is (keys, values)
    with the device's blocks first and the host's after them: the others are views of these.
    """

    keys: Array
    values: Array
    host_keys: np.ndarray
    host_values: np.ndarray
    staging: range
    whole: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def block_size(self) -> int:
        return int(self.keys.shape[1])

    def stager(self, halves: int) -> _Stager:
        return (_Stager if module_of(self.keys) is np else _StreamStager)(self, halves)


def streamed_attention(
    query: Array,
    caches: TwoCaches,
    device_tables: np.ndarray,
    host_tables: np.ndarray,
    seq_lens: np.ndarray,
    query_start_loc: np.ndarray,
    *,
    sliding_window: int | None = None,
    scale: float | None = None,
    backend: str = "auto",
    check: Check | None = None,
) -> tuple[Array, Array]:
    """Causal attention as `paged_attention` defines it; returns `(output, lse)`.

    `device_tables, host_tables [num_seqs, max_blocks]`: where each logical block is, negative where it is not. One
    of the two must know it; the device's is read if both do. Tables, lengths and counts are NumPy arrays, since
    what to copy is decided on the host. Raises ValueError if a layer's sliding window does not fit the staging.
    """
    if caches.staging:
        work = _Staged(query, caches, device_tables, host_tables, seq_lens, query_start_loc, scale, backend, check)
        return work.in_pieces() if sliding_window is None else work.window(sliding_window)
    assert caches.whole is not None
    table = np.where(device_tables >= 0, device_tables, host_tables + len(caches.keys))
    if check:
        check(np.arange(len(seq_lens)), table, np.zeros_like(seq_lens), seq_lens)
    call = build_call(
        query, *caches.whole, seq_lens, query_start_loc, block_tables=table, names=("keys", "values"), scale=scale,
        sliding_window=sliding_window, softcap=None, alibi_slopes=None, sinks=None, key_scales=None, value_scales=None,
        return_lse=True, out=None, validate=False,
    )  # fmt: skip
    call.copy_tiles = bool(((device_tables < 0) & (host_tables >= 0)).any())  # else all is where it can be read
    from ..tuned import cpu_simd as cpu  # compiled code: loaded when it is needed

    cpu.attention(call)
    return call.out, call.lse


# --- staged ------------------------------------------------------------------------------------------------


class _Piece(NamedTuple):
    """Consecutive blocks of consecutive sequences, of which few enough are on the host."""

    first: int  # sequence
    last: int  # sequence, included
    begin: np.ndarray  # [last - first + 1] the first block of each
    end: np.ndarray  # [last - first + 1] before which block each ends

    def num_keys(self, block_size: int) -> np.ndarray:
        count: np.ndarray = (self.end - self.begin) * block_size
        return count


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
    """The piece's table, with staging blocks for those that are on the host; and which host blocks these are."""
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
    scale: float | None
    backend: str
    check: Check | None

    def in_pieces(self) -> tuple[Array, Array]:
        """Piece by piece. Each query is a sequence of its own: how far it sees into a piece is then just a length,
        and a kernel that masks nothing will do."""
        xp, loc = module_of(self.query), self.query_start_loc
        query_lens = np.diff(loc)
        seq_of = np.repeat(np.arange(len(self.seq_lens)), query_lens)  # [num_tokens]
        visible = np.arange(len(seq_of)) - loc[:-1][seq_of] + (self.seq_lens - query_lens)[seq_of] + 1
        out = xp.zeros(self.query.shape, dtype=np.promote_types(self.query.dtype, np.float32))
        lse = xp.full(self.query.shape[:2], -np.inf, dtype=np.float32)
        stager = self.caches.stager(halves=min(2, len(self.caches.staging)))
        coming: deque[tuple[_Piece, np.ndarray, int]] = deque()

        def attend() -> None:
            piece, table, half = coming.popleft()
            rows = slice(int(loc[piece.first]), int(loc[piece.last + 1]))
            seq = seq_of[rows] - piece.first  # [rows] of the piece's sequences
            first_key = piece.begin * self.caches.block_size
            lens = np.clip(visible[rows] - first_key[seq], 0, piece.num_keys(self.caches.block_size)[seq])
            stager.wait(half)
            if self.check:
                longest = np.zeros(len(table), dtype=np.int64)
                np.maximum.at(longest, seq, lens)
                self.check(np.arange(piece.first, piece.last + 1), table, first_key, longest)
            part, part_lse = paged_attention(
                self.query[rows], self.caches.keys, self.caches.values, xp.asarray(table[seq]), xp.asarray(lens),
                scale=self.scale, return_lse=True, backend=self.backend, validate=False,
            )  # fmt: skip
            out[rows], lse[rows] = merge_states(xp.stack([out[rows], part]), xp.stack([lse[rows], part_lse]))
            stager.done(half)

        for piece in _pieces(self.device_tables, self.seq_lens, self.caches.block_size, stager.room):
            coming.append((piece, *stager.fetch(piece, self.device_tables, self.host_tables)))
            if len(coming) == stager.halves:  # the next piece is on its way by now
                attend()
        while coming:
            attend()
        return out.astype(self.query.dtype, copy=False), lse

    def window(self, sliding_window: int) -> tuple[Array, Array]:
        """A layer that sees only a window needs no more than its blocks. They are staged at once, one sequence after
        another, since where the window begins differs from query to query."""
        xp, size, loc = module_of(self.query), self.caches.block_size, self.query_start_loc
        out, lse = xp.empty_like(self.query), xp.empty(self.query.shape[:2], dtype=np.float32)
        stager = self.caches.stager(halves=1)
        first_blocks = np.maximum(0, self.seq_lens - np.diff(loc) - sliding_window + 1) // size
        for seq, begin in enumerate(first_blocks.tolist()):
            end = -(-int(self.seq_lens[seq]) // size)
            num_away = int((self.device_tables[seq, begin:end] < 0).sum())
            if num_away > stager.room:
                raise ValueError(
                    f"a layer with a sliding window of {sliding_window} tokens needs {num_away} blocks from the host "
                    f"at once; there are {stager.room} staging blocks"
                )
            piece = _Piece(seq, seq, np.array([begin]), np.array([end]))
            table, half = stager.fetch(piece, self.device_tables, self.host_tables)
            lens = self.seq_lens[seq : seq + 1] - begin * size
            stager.wait(half)
            if self.check:
                self.check(np.array([seq]), table, piece.begin * size, lens)
            rows = slice(int(loc[seq]), int(loc[seq + 1]))
            out[rows], lse[rows] = paged_attention(
                self.query[rows], self.caches.keys, self.caches.values, xp.asarray(table), xp.asarray(lens),
                xp.asarray(np.array([0, rows.stop - rows.start])), scale=self.scale, sliding_window=sliding_window,
                return_lse=True, backend=self.backend, validate=False,
            )  # fmt: skip
            stager.done(half)
        return out, lse


class _Stager:
    """Copies host blocks to staging blocks: into one half of them while the other is computed on."""

    def __init__(self, caches: TwoCaches, halves: int) -> None:
        self._pairs = ((caches.keys, caches.host_keys), (caches.values, caches.host_values))
        self._first = caches.staging.start
        self.halves = halves
        self.room = len(caches.staging) // halves
        self._next = 0

    def fetch(self, piece: _Piece, device_tables: np.ndarray, host_tables: np.ndarray) -> tuple[np.ndarray, int]:
        """Begin to copy the piece's host blocks. Returns its table, and the half to `wait` for."""
        half, self._next = self._next, (self._next + 1) % self.halves
        first = self._first + half * self.room
        table, host_blocks = _table_of(piece, device_tables, host_tables, first)
        self._copy(host_blocks, first, half)
        return table, half

    def _copy(self, host_blocks: np.ndarray, first: int, half: int) -> None:
        for device, host in self._pairs:
            np.take(host, host_blocks, axis=0, out=device[first : first + len(host_blocks)], mode="clip")

    def wait(self, half: int) -> None:
        """What follows is computed after the half has arrived."""

    def done(self, half: int) -> None:
        """Nothing that follows is computed on this half: it may be written again."""


@cache
def _copy_stream(cuda: Any) -> Any:
    return cuda.Stream(non_blocking=True)


class _StreamStager(_Stager):
    """On a GPU: copies on a stream of its own, and events between it and the stream that computes."""

    def __init__(self, caches: TwoCaches, halves: int) -> None:
        super().__init__(caches, halves)
        cuda: Any = module_of(caches.keys).cuda
        self._compute = cuda.get_current_stream()
        self._stream = _copy_stream(cuda)
        self._arrived = [cuda.Event(disable_timing=True) for _ in range(halves)]
        self._free = [cuda.Event(disable_timing=True) for _ in range(halves)]
        for event in self._free:  # what was computed before may still read the staging blocks
            event.record(self._compute)

    def _copy(self, host_blocks: np.ndarray, first: int, half: int) -> None:
        """One transfer for each run of host blocks that follow one another: pinned memory, so nobody waits."""
        self._stream.wait_event(self._free[half])
        starts = np.flatnonzero(np.diff(host_blocks, prepend=-2) != 1).tolist()
        for begin, end in pairwise([*starts, len(host_blocks)]):
            source = int(host_blocks[begin])
            for device, host in self._pairs:
                device[first + begin : first + end].set(host[source : source + end - begin], self._stream)
        self._arrived[half].record(self._stream)

    def wait(self, half: int) -> None:
        self._compute.wait_event(self._arrived[half])

    def done(self, half: int) -> None:
        self._free[half].record(self._compute)
