"""The kernels that a reader writes in lessons 8 and 9: toy cases, run in the tracer beside the real kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..core.attention import naive, paged
from ..kernels import naive_attention, paged_attention, slot_of
from ..tracer import trace
from .building import Build, Stage
from .calls import show, table
from .grading import Trail

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class OneHead:
    """One query with one head, and as many threads as the head has elements. Keys lie in slots from `start` on."""

    num_keys: int
    start: int
    num_threads: int

    def __repr__(self) -> str:
        return f"{self.num_keys} keys in the slots from {self.start} on, {self.num_threads} threads"

    def arrays(self) -> tuple[Array, Array, Array]:
        """query [head_size]; keys, values [num_slots, head_size], NaN where no key is."""
        draw = np.random.default_rng(self.num_keys).standard_normal
        query = draw(self.num_threads, dtype=np.float32)
        caches = np.full((2, self.start + self.num_keys + 2, self.num_threads), np.nan, dtype=np.float32)
        used = slice(self.start, self.start + self.num_keys)
        caches[:, used] = draw(caches[:, used].shape, dtype=np.float32)
        caches[0, used.stop - 1] = 2 * query  # the last key has the largest score: what came before must shrink
        return query, caches[0], caches[1]


@dataclass(frozen=True)
class Paged:
    """A query for each sequence, two heads that share one KV head, blocks of four slots."""

    seq_lens: tuple[int, ...]
    block_size: int = 4
    num_threads: int = 4

    def __repr__(self) -> str:
        return f"sequences of {self.seq_lens} keys, blocks of {self.block_size}, {self.num_threads} threads"

    def arrays(self) -> tuple[Array, Array, Array, Array, Array]:
        """query, keys, values, block_tables, seq_lens; NaN where no key is, and -1 past the end of a table."""
        rng, size, num_seqs = np.random.default_rng(0), self.num_threads, len(self.seq_lens)
        needed = [-(-length // self.block_size) for length in self.seq_lens]
        tables = np.full((num_seqs, max(needed)), -1, dtype=np.int32)
        caches = np.full((2, (sum(needed) + 1) * self.block_size, 1, size), np.nan, dtype=np.float32)
        free = iter(rng.permutation(sum(needed) + 1).tolist())
        for seq, length in enumerate(self.seq_lens):
            tables[seq, : needed[seq]] = [next(free) for _ in range(needed[seq])]
            slots = [slot_of(tables[seq], position, self.block_size) for position in range(length)]
            caches[:, slots] = rng.standard_normal((2, length, 1, size), dtype=np.float32)
        query = rng.standard_normal((num_seqs, 2, size), dtype=np.float32)
        return query, caches[0], caches[1], tables, np.array(self.seq_lens, dtype=np.int32)


# ---- the reader's kernels and the real ones, on the same case


def _run(kernel: Any, case: Any) -> tuple[Array, trace.Trace]:
    """The reader's kernel on this case: what it fills, and its accesses. Raises KernelError."""
    query, keys, values, *where = case.arrays()
    if isinstance(case, Paged):
        out, grid = np.full_like(query, np.nan), query.shape[:2]
        tables, seq_lens = where
        ends = (tables, case.block_size, seq_lens, np.float32(query.shape[-1] ** -0.5))
        return out, trace.run(kernel, grid, case.num_threads, out, query, keys, values, *ends)
    if getattr(kernel, "py_func", kernel).__name__ == "my_scores":
        out = np.full(case.num_keys, np.nan, dtype=np.float32)
        return out, trace.run(kernel, 1, case.num_threads, out, query, keys, case.start, case.num_keys)
    out, scale = np.full_like(query, np.nan), np.float32(len(query) ** -0.5)
    args = (out, query, keys, values, case.start, case.num_keys, scale)
    return out, trace.run(kernel, 1, case.num_threads, *args)


def _run_real(case: Any) -> tuple[Array, trace.Trace]:
    """The package's kernel on the same case."""
    query, keys, values, *where = case.arrays()
    with trace.recording(case.num_threads) as traces:
        if isinstance(case, Paged):
            blocks = [cache.reshape(-1, case.block_size, *cache.shape[1:]) for cache in (keys, values)]
            out = paged_attention(query, *blocks, *where, backend="trace")
        else:
            at = np.array([case.start]), np.array([case.num_keys])
            out = naive_attention(query[None, None], keys[:, None], values[:, None], *at, backend="trace")[0, 0]
    return out, traces[0]


def _slots_read(record: trace.Trace, name: str) -> list[int]:
    """Elements of each slot that were read."""
    if name not in [info.name for info in record.arrays]:
        return []
    counts = record.counts(name)
    reads: list[int] = counts.reshape(len(counts), -1).sum(axis=1).tolist()
    return reads


def _trail(case: Any, out: Array, record: trace.Trace, caches: tuple[str, ...], written: list[int]) -> Trail:
    trail = Trail({"the answer": out, "how often each element of the answer is written": written})
    trail |= {f"elements of {name} read, slot by slot": _slots_read(record, name) for name in caches}
    if isinstance(case, Paged):
        reads, most = sum(_slots_read(record, "block_tables")), 2 * sum(case.seq_lens)  # fewer are welcome
        trail["entries of block_tables read"] = f"at most {most}" if reads <= most else f"{reads}"
    return trail


def _trial(*caches: str) -> Callable[[Any], Callable[[Any], Trail]]:
    """How a kernel that reads these caches is tried."""

    def of(kernel: Any) -> Callable[[Any], Trail]:
        def run(case: Any) -> Trail:
            out, record = _run(kernel, case)
            return _trail(case, out, record, caches, record.counts(record.arrays[0].name, write=True).ravel().tolist())

        return run

    return of


def _scores(case: OneHead) -> Trail:
    query, keys, _ = case.arrays()
    scores = keys[case.start : case.start + case.num_keys] @ query
    return _trail(case, scores, _run_real(case)[1], ("keys",), [1] * len(scores))


def _attention(case: Any) -> Trail:
    out, record = _run_real(case)
    return _trail(case, out, record, ("keys", "values"), [1] * out.size)


# ---- pictures


def picture(record: trace.Trace, array: str) -> str:
    """Which thread of CUDA block 0 read how many elements of which slot."""
    rows = record.select(array, write=False, block=0)
    per_slot = int(np.prod(record.info(array).shape[1:]))
    num_slots = record.info(array).shape[0]
    counts = np.zeros((record.num_threads, num_slots), dtype=int)
    np.add.at(counts, (rows.thread, rows.index // per_slot), 1)
    text = f"{array}: elements of a slot that a thread reads\n"
    text += f"{'slot':>10}" + "".join(f"{slot:>3}" for slot in range(num_slots)) + "\n"
    for thread, row in enumerate(counts):
        text += f"{f'thread {thread}':>10}" + "".join(f"{n or '.':>3}" for n in row) + "\n"
    return text


def _totals(record: trace.Trace) -> dict[str, tuple[int, int]]:
    """Reads and writes of each array in global memory, and of all shared memory together."""
    totals, shared = {}, (0, 0)
    for info in record.arrays:
        reads, writes = record.totals()[info.name]
        if info.space == "global":
            totals[info.name] = (reads, writes)
        else:
            shared = (shared[0] + reads, shared[1] + writes)
    return totals | {"shared memory": shared}


def _draw(case: Any, *caches: str) -> Callable[[Any], None]:
    """Shows the reader's kernel at work on this case, and counts its accesses beside the real kernel's."""

    def draw(kernel: Any) -> None:
        records = _run(kernel, case)[1], _run_real(case)[1]
        show(*(picture(records[0], array) for array in caches))
        counts = [_totals(record) for record in records]
        rows = [(name, *reads, *counts[1].get(name, ("", ""))) for name, reads in counts[0].items()]
        rows.append(("barriers", *(cell for each in records for cell in (int(each.round.max()), ""))))
        table(f"Your kernel and the real one: {case}", ("", "reads", "writes", "real reads", "writes"), rows)

    return draw


_LAST_TILE = (
    "the last tile has more threads than keys: what does a thread without a key do?\n"
    "neither read nor add what lies behind the last key: it may be NaN, and 0 times NaN is NaN (lesson 7)"
)


def _stages(few: Any, many: Any, uneven: Any, hint: str, hint_tiles: str) -> list[Stage]:
    return [
        Stage("as many keys as threads", [(few,)], hint),
        Stage("more keys than threads", [(many,)], hint_tiles),
        Stage("a last tile that is not full", [(uneven,)], _LAST_TILE),
    ]


_ONE_HEAD = OneHead(4, 2, 4), OneHead(8, 3, 4), OneHead(7, 1, 4)
BUILDS = {
    build.name: build
    for build in (
        Build(
            "my_scores",
            _stages(
                *_ONE_HEAD,
                "each thread goes through its keys\n"
                "for key in range(...): a sum over the elements d of query[d] * keys[slot, d]",
                "more keys than threads: what does a thread do after its first key?\n"
                "range() has a step: a thread goes on with the key that is num_threads further",
            ),
            _scores, _trial("keys"), naive.attention_kernel, _draw(OneHead(6, 2, 4), "keys"),
        ),
        Build(
            "my_dense_attention",
            _stages(
                *_ONE_HEAD,
                "which thread reads what another one wrote?\n"
                "a barrier stands after the scores are written, and one before the next tile overwrites them",
                "what was added up so far belongs to an older highest score\n"
                "before = highest; then the new highest; then total and sum times exp(before - highest)",
            ),
            _attention, _trial("keys", "values"), naive.attention_kernel, _draw(OneHead(6, 2, 4), "keys", "values"),
        ),
        Build(
            "my_paged_attention",
            _stages(
                Paged((4,)), Paged((8, 3)), Paged((6, 1, 11)),
                "only the place of a key changes (lesson 5)\n"
                "slot = block_tables[seq, key // block_size] * block_size + key % block_size",
                "the sequences differ in length\nthis one has seq_lens[seq] keys",
            ),
            _attention, _trial("keys", "values"), paged.attention_kernel,
            _draw(Paged((6, 3)), "keys", "values"),
        ),
    )
}  # fmt: skip
