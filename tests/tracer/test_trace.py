"""The tracer, and what it shows of the teaching kernels.

The kernels of this file are plain functions: the tracer takes them as it takes what `cuda.jit` made.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

pytest.importorskip("greenlet", reason="the tracer runs CUDA threads on greenlets")

from numba import cuda, types
from numba.types import float32, int32
from support.traces import per_thread

from paged_ref.core.attention import paged
from paged_ref.kernels import naive_attention, paged_attention
from paged_ref.tracer import trace
from paged_ref.tracer.trace import Access, KernelError

# ---- the teaching kernels


@dataclass
class Case:
    """The same keys and values in blocks and in contiguous regions, with NaN in all other places."""

    query: Any
    keys: Any  # [num_slots, num_kv_heads, head_size]
    values: Any
    starts: Any
    key_cache: Any  # [num_blocks, block_size, num_kv_heads, head_size]
    value_cache: Any
    block_tables: Any
    seq_lens: Any
    query_start_loc: Any

    def paged(self, **options: Any) -> Any:
        return paged_attention(
            self.query, self.key_cache, self.value_cache, self.block_tables,
            self.seq_lens, self.query_start_loc, return_lse=True, backend="trace", **options,
        )  # fmt: skip

    def naive(self, **options: Any) -> Any:
        return naive_attention(
            self.query, self.keys, self.values, self.starts, self.seq_lens, self.query_start_loc,
            return_lse=True, backend="trace", **options,
        )  # fmt: skip

    def own_slots(self, s: int) -> list[int]:
        """Where the keys of sequence `s` lie in the paged cache."""
        block_size = self.key_cache.shape[1]
        return [
            int(self.block_tables[s, p // block_size]) * block_size + p % block_size
            for p in range(int(self.seq_lens[s]))
        ]


def make_case(
    seq_lens: list[int], query_lens: list[int] | None = None, *, heads: tuple[int, int] = (2, 1),
    head_size: int = 4, block_size: int = 4, dtype: str = "float32", table_dtype: str = "int32",
) -> Case:  # fmt: skip
    rng = np.random.default_rng(sum(seq_lens) + head_size)
    query_lens = query_lens or [1] * len(seq_lens)
    num_heads, num_kv_heads = heads
    blocks_of = [-(-n // block_size) for n in seq_lens]
    num_blocks, max_blocks = sum(blocks_of) + 2, max([*blocks_of, 1]) + 1
    free = list(rng.permutation(num_blocks))
    tables = np.full((len(seq_lens), max_blocks), -1, dtype=table_dtype)  # -1: padding, never followed
    for s, count in enumerate(blocks_of):
        tables[s, :count] = [free.pop() for _ in range(count)]
    row = (num_kv_heads, head_size)
    key_cache = np.full((num_blocks, block_size, *row), np.nan, dtype=dtype)
    value_cache = key_cache.copy()
    keys = np.full((sum(seq_lens) + len(seq_lens) + 1, *row), np.nan, dtype=dtype)
    values = keys.copy()
    starts = np.array([1 + s + sum(seq_lens[:s]) for s in range(len(seq_lens))], dtype=table_dtype)
    for s, seq_len in enumerate(seq_lens):
        for p in range(seq_len):
            k, v = rng.standard_normal((2, *row))
            keys[starts[s] + p], values[starts[s] + p] = k, v
            block, offset = tables[s, p // block_size], p % block_size
            key_cache[block, offset], value_cache[block, offset] = k, v
    query = rng.standard_normal((sum(query_lens), num_heads, head_size)).astype(dtype)
    loc = np.cumsum([0, *query_lens]).astype(np.int32)
    lens = np.array(seq_lens, dtype=np.int32)
    return Case(query, keys, values, starts, key_cache, value_cache, tables, lens, loc)


@pytest.mark.parametrize("which", ["key", "value"])
def test_a_nan_in_a_visible_slot_shows(which: str) -> None:
    """A NaN key is no key that is not there: neither 0 nor a log-sum-exp of -inf comes out."""
    case = make_case([7, 5], heads=(2, 2))
    slot = case.own_slots(0)[5]
    paged_array, naive_array = (case.key_cache, case.keys) if which == "key" else (case.value_cache, case.values)
    paged_array[divmod(slot, 4)][0] = np.nan  # of KV head 0
    naive_array[int(case.starts[0]) + 5, 0] = np.nan
    for out, lse in (case.paged(), case.naive()):
        assert np.isnan(out[0, 0]).all()
        assert np.isnan(lse[0, 0]) == (which == "key")
        assert np.isfinite(out[0, 1]).all()
        assert np.isfinite(out[1]).all()
        assert np.isfinite(lse[1]).all()


def visible(case: Case) -> list[tuple[int, int, int]]:
    """(sequence, token, number of keys that it sees) of each token."""
    answer = []
    for s, seq_len in enumerate(case.seq_lens):
        first, last = case.query_start_loc[s], case.query_start_loc[s + 1]
        answer += [(s, int(t), max(0, int(seq_len - last + t + 1))) for t in range(first, last)]
    return answer


def oracle(case: Case) -> tuple[Any, Any]:
    """Attention in float64, one query at a time."""
    num_tokens, num_heads, head_size = case.query.shape
    group = num_heads // case.keys.shape[1]
    out, lse = np.zeros((num_tokens, num_heads, head_size)), np.full((num_tokens, num_heads), -np.inf)
    for s, token, count in visible(case):
        for head in range(num_heads if count else 0):
            region = slice(int(case.starts[s]), int(case.starts[s]) + count)
            k = case.keys[region, head // group].astype(np.float64)
            v = case.values[region, head // group].astype(np.float64)
            score = k @ case.query[token, head].astype(np.float64) / math.sqrt(head_size)
            weight = np.exp(score - score.max())
            out[token, head] = weight @ v / weight.sum()
            lse[token, head] = score.max() + math.log(weight.sum())
    return out, lse


CASES: dict[str, Case] = {
    "one key": make_case([1], block_size=1),
    "ragged, with 0 and 1": make_case([5, 0, 1, 9], heads=(4, 2), block_size=3),
    "GQA 3": make_case([7, 4], heads=(3, 1), head_size=5),
    "GQA 1": make_case([6], heads=(2, 2), head_size=3, block_size=16),
    "chunks": make_case([6, 9, 3], [3, 4, 3], heads=(2, 2)),
    "more queries than keys": make_case([2, 0], [4, 2]),
    "no query": make_case([5, 3, 4], [2, 0, 1]),
    "head size 1": make_case([5], head_size=1, block_size=3),
    "head size 33": make_case([3], head_size=33),
    "float16": make_case([9, 2], dtype="float16", head_size=8),
    "int64 table": make_case([9, 2], table_dtype="int64"),
    "block size 1": make_case([9, 2], block_size=1),
    "block size 3": make_case([9, 2], block_size=3),
    "block size 16": make_case([17, 2], block_size=16),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


@each_case
@pytest.mark.parametrize("num_threads", [4, 32])  # of 4: tiles of 4 keys, and several dimensions a thread
def test_both_kernels_agree_with_the_oracle_and_to_the_bit(case: Case, num_threads: int) -> None:
    with trace.recording(num_threads):
        out, lse = case.paged()
        contiguous, contiguous_lse = case.naive()
    expected, expected_lse = oracle(case)
    tolerance = 1e-3 if case.query.dtype == np.float16 else 1e-6
    np.testing.assert_allclose(out, expected, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-5, atol=1e-6)
    assert out.tobytes() == contiguous.tobytes()
    assert lse.tobytes() == contiguous_lse.tobytes()


@each_case
def test_each_visible_key_is_read_once_for_each_head_and_nothing_else(case: Case) -> None:
    with trace.recording(num_threads=8) as traces:
        case.paged()
    num_heads, num_kv_heads = case.query.shape[1], case.key_cache.shape[2]
    num_slots = case.key_cache.shape[0] * case.key_cache.shape[1]
    expected = np.zeros(num_slots, dtype=int)
    table_reads = np.zeros(case.block_tables.shape, dtype=int)
    for s, _, count in visible(case):
        for p, slot in enumerate(case.own_slots(s)[:count]):
            expected[slot] += num_heads // num_kv_heads
            table_reads[s, p // case.key_cache.shape[1]] += num_heads
    for name in ("keys", "values"):
        counts = traces[0].counts(name)  # [num_slots, num_kv_heads, head_size]
        assert (counts == expected[:, None, None]).all()
    assert (traces[0].counts("block_tables") == table_reads).all()
    assert (traces[0].counts("out", write=True) == 1).all()
    assert (traces[0].counts("lse", write=True) == 1).all()
    for name, (reads, writes) in traces[0].totals().items():
        space = traces[0].info(name).space
        assert not (reads if name in ("out", "lse") else writes) or space == "shared"


def test_each_access_falls_in_a_slot_of_its_own_sequence() -> None:
    case = make_case([6, 9], [3, 1], block_size=4)
    with trace.recording(num_threads=8) as traces:
        case.paged()
    sequence_of = {token: (s, count) for s, token, count in visible(case)}
    rows = traces[0].select("keys")
    for block, slot in zip(rows.block, rows.slots("keys"), strict=True):
        s, count = sequence_of[rows.grid.place(int(block))[0]]
        assert slot in case.own_slots(s)[:count]


def test_threads_share_the_keys_evenly() -> None:
    case = make_case([16], heads=(1, 1), head_size=4)
    with trace.recording(num_threads=8) as traces:
        case.paged()
    # 16 keys of 4 elements: 2 keys for each of the 8 threads. 4 dimensions: a thread each, 4 threads rest.
    assert per_thread(traces[0], "keys").tolist() == [[8] * 8]
    assert per_thread(traces[0], "values").tolist() == [[16] * 4 + [0] * 4]


def test_a_strided_cache_is_read_where_it_lies() -> None:
    case = make_case([5, 9], heads=(4, 2))
    both = np.stack([case.key_cache, case.value_cache], axis=-2)  # K and V interleaved for each head
    case.key_cache, case.value_cache = both[..., 0, :], both[..., 1, :]
    assert not case.key_cache.flags.contiguous
    np.testing.assert_allclose(case.paged()[0], oracle(case)[0], rtol=1e-5, atol=1e-6)


def test_no_tokens_at_all() -> None:
    case = make_case([3], [0])
    case.query = case.query[:0]
    case.query_start_loc = np.zeros(2, dtype=np.int32)
    assert case.paged()[0].shape == (0, 2, 4)


def test_runs_are_deterministic() -> None:
    with trace.recording(num_threads=8) as traces:
        first, second = CASES["chunks"].paged()[0], CASES["chunks"].paged()[0]
    assert first.tobytes() == second.tobytes()
    assert list(traces[0]) == list(traces[1])


@pytest.mark.parametrize(
    "option", [{"sliding_window": 2}, {"softcap": 5.0}, {"alibi_slopes": np.ones(2)}, {"sinks": np.ones(2)}]
)
def test_what_the_kernels_leave_out_is_refused_by_name(option: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"no {next(iter(option))}; .*reference.* can"):
        CASES["one key"].paged(**option)


def test_float64_and_scattered_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="float64"):
        make_case([3], dtype="float64").paged()
    case = make_case([5, 9])
    case.key_cache = np.stack([case.key_cache, case.value_cache], axis=1)[:, 0]  # K and V by turns
    with pytest.raises(ValueError, match="do not follow one another"):
        case.paged()


def test_only_an_open_recording_keeps_traces() -> None:
    case = CASES["one key"]
    with trace.recording() as outer:
        case.paged()
        with trace.recording(num_threads=8) as inner:
            case.naive()
    case.paged()
    assert [t.kernel for t in outer] == ["paged.attention_kernel", "naive.attention_kernel"]
    assert [t.num_threads for t in inner] == [8]


# ---- the stand-in for cuda


def run(kernel: Callable[..., None], block: Any, *args: Any, grid: Any = 1) -> trace.Trace:
    return trace.run(kernel, grid, block, *args)


def test_where_a_thread_is() -> None:
    def kernel(places: Any, total: Any) -> None:
        x, y = cuda.grid(2)
        places[x, y] = cuda.threadIdx.x + 10 * cuda.blockIdx.x + 100 * cuda.threadIdx.y
        if x == 0 and y == 0:
            total[0], total[1] = cuda.gridsize(2)
            total[2] = cuda.gridDim.x * cuda.blockDim.y * cuda.blockDim.z

    places, total = np.zeros((6, 2), dtype=np.int64), np.zeros(3, dtype=np.int64)
    run(kernel, (3, 2), places, total, grid=2)
    assert places.tolist() == [[0, 100], [1, 101], [2, 102], [10, 110], [11, 111], [12, 112]]
    assert total.tolist() == [6, 2, 4]


def test_shuffles_add_up_a_warp() -> None:
    def kernel(values: Any, answers: Any) -> None:
        thread = cuda.grid(1)
        value = values[thread]
        for delta in (16, 8, 4, 2, 1):
            value += cuda.shfl_xor_sync(0xFFFFFFFF, value, delta)
        answers[thread, 0] = value
        answers[thread, 1] = cuda.shfl_sync(0xFFFFFFFF, thread, 5)
        answers[thread, 2] = cuda.shfl_up_sync(0xFFFFFFFF, thread, 1)
        answers[thread, 3] = cuda.shfl_down_sync(0xFFFFFFFF, thread, 1)
        answers[thread, 4] = cuda.ballot_sync(0xFFFFFFFF, cuda.laneid < 3)
        answers[thread, 5] = cuda.all_sync(0xFFFFFFFF, thread >= 0) + 2 * cuda.any_sync(0xFFFFFFFF, thread == 40)

    values, answers = np.arange(64, dtype=np.float32), np.zeros((64, 6), dtype=np.int64)
    run(kernel, 64, values, answers)
    assert answers[:, 0].tolist() == [sum(range(32))] * 32 + [sum(range(32, 64))] * 32
    assert answers[[0, 63], 1].tolist() == [5, 37]
    assert answers[[0, 1, 32, 33], 2].tolist() == [0, 0, 32, 32]
    assert answers[[0, 31, 62], 3].tolist() == [1, 31, 63]
    assert answers[7, 4] == 0b111
    assert answers[[0, 32], 5].tolist() == [1, 3]


def test_half_a_warp_may_shuffle_alone() -> None:
    def kernel(answers: Any) -> None:
        lane = cuda.laneid
        if lane < 16:
            answers[lane] = cuda.shfl_xor_sync(0x0000FFFF, lane, 1)
        else:
            answers[lane] = cuda.shfl_xor_sync(0xFFFF0000, lane, 2)
        cuda.syncwarp()

    answers = np.zeros(32, dtype=np.int32)
    run(kernel, 32, answers)
    assert answers.tolist() == [i ^ 1 for i in range(16)] + [i ^ 2 for i in range(16, 32)]


def test_a_warp_barrier_orders_its_warp() -> None:
    def kernel(answers: Any) -> None:
        box = cuda.shared.array(64, int32)
        thread = cuda.threadIdx.x
        for turn in range(3):
            box[thread] = thread + turn
            cuda.syncwarp()
            answers[thread] = box[thread ^ 1]
            cuda.syncwarp()

    answers = np.zeros(64, dtype=np.int32)
    run(kernel, 64, answers)
    assert answers.tolist() == [(i ^ 1) + 2 for i in range(64)]


def test_barriers_that_vote() -> None:
    def kernel(answers: Any) -> None:
        thread = cuda.threadIdx.x
        answers[thread, 0] = cuda.syncthreads_count(thread > 0)
        answers[thread, 1] = cuda.syncthreads_and(thread > 0)
        answers[thread, 2] = cuda.syncthreads_or(thread > 0)

    answers = np.zeros((40, 3), dtype=np.int32)
    run(kernel, 40, answers)
    assert answers.tolist() == [[39, 0, 1]] * 40


def test_atomics_need_no_barrier() -> None:
    def kernel(sums: Any, largest: Any) -> None:
        box = cuda.shared.array(1, float32)
        if cuda.threadIdx.x == 0:
            box[0] = 0
        cuda.syncthreads()
        cuda.atomic.add(box, 0, 0.5)
        cuda.atomic.max(largest, (0, 1), cuda.grid(1))
        cuda.syncthreads()
        if cuda.threadIdx.x == 0:
            sums[cuda.blockIdx.x] = box[0]

    sums, largest = np.zeros(2, dtype=np.float32), np.zeros((1, 2), dtype=np.int64)
    record = run(kernel, 40, sums, largest, grid=2)
    assert sums.tolist() == [20, 20]
    assert largest.tolist() == [[0, 79]]
    assert record.totals()["box"] == (2 * 41, 2 * 41)


def test_local_arrays_belong_to_one_thread() -> None:
    def kernel(answers: Any) -> None:
        own = cuda.local.array((2, 2), float32)
        thread = cuda.threadIdx.x
        for i in range(2):
            own[1, i] = thread * i
        cuda.syncthreads()
        answers[thread] = own[1, 0] + own[1, 1]

    answers = np.zeros(5, dtype=np.float32)
    record = run(kernel, 5, answers)
    assert answers.tolist() == [0, 1, 2, 3, 4]
    assert record.info("own").space == "local"


def test_two_shared_arrays_on_one_line_are_two() -> None:
    def kernel(answers: Any) -> None:
        a, b = cuda.shared.array(1, int32), cuda.shared.array(1, int32)
        a[0] = 1
        b[0] = 2
        answers[0] = a[0]

    answers = np.zeros(1, dtype=np.int32)
    run(kernel, 1, answers)
    assert answers[0] == 1


def _weight(score: Any, highest: Any) -> Any:
    return math.exp(score - highest)


weight_of = cuda.jit(device=True, inline="always")(_weight)


def make_kernel(size: int) -> Callable[[Any], None]:
    helper = cuda.jit(device=True)(lambda i: i % size)

    def kernel(answers: Any) -> None:
        box = cuda.shared.array(size, types.float32)
        thread = cuda.threadIdx.x
        box[helper(thread)] = weight_of(float32(thread), float32(0))
        cuda.syncthreads()
        answers[thread] = box[helper(thread + 1)]

    return kernel


def test_closures_and_device_functions_are_rebuilt_too() -> None:
    answers = np.zeros(3, dtype=np.float32)
    run(make_kernel(3), 3, answers)
    assert answers.tolist() == np.exp([1.0, 2.0, 0.0]).astype(np.float32).tolist()


def test_arithmetic_is_the_devices() -> None:
    def kernel(kinds: Any, x: Any, half: Any, small: Any) -> None:
        kinds[0] = math.exp(x[0]) + math.log(float32(0))  # -inf, no exception
        kinds[1] = math.exp(x[1])  # inf
        kinds[2] = float32(1) / float32(3)
        kinds[3] = int32(2**31)  # wraps
        kinds[4] = small[0] * 1000000  # an int8 is wide once it is read
        kinds[5] = math.floor(x[2])
        kinds[6] = float32(half[0]) + cuda.fma(x[2], x[2], x[2])
        kinds[7] = math.sqrt(x[1] - x[1] - float32(1))

    kinds = np.zeros(8, dtype=np.float64)
    x = np.array([0, 1000, 2.5], dtype=np.float32)
    run(kernel, 1, kinds, x, np.array([0.1], dtype=np.float16), np.array([100], dtype=np.int8))
    third, tenth = float(np.float32(1) / np.float32(3)), float(np.float32(np.float16(0.1)) + np.float32(8.75))
    assert kinds[:7].tolist() == [-math.inf, math.inf, third, -(2**31), 1e8, 2, tenth]
    assert math.isnan(kinds[7])


def test_rows_and_slices_are_views() -> None:
    def kernel(matrix: Any, answers: Any) -> None:
        row = matrix[1]
        part = matrix[1:, 2]
        answers[0], answers[1], answers[2] = row[2], part[1], len(row) + row.shape[0] + part.ndim

    answers = np.zeros(3, dtype=np.int64)
    record = run(kernel, 1, np.arange(12).reshape(3, 4), answers)
    assert answers.tolist() == [6, 10, 9]
    assert [access.index for access in record.select("matrix")] == [(1, 2), (2, 2)]


def test_the_kernel_itself_is_left_alone() -> None:
    before = paged.attention_kernel.py_func.__globals__["cuda"]
    CASES["one key"].paged()
    assert paged.attention_kernel.py_func.__globals__["cuda"] is before is cuda


# ---- the record


def test_an_access_in_full() -> None:
    def kernel(source: Any, target: Any) -> None:
        cuda.syncthreads()
        target[0, cuda.threadIdx.x] = source[cuda.blockIdx.y]

    first_line = inspect.getsourcelines(kernel)[1]
    record = run(kernel, 2, np.arange(3), np.zeros((1, 2)), grid=(1, 3))
    assert len(record) == 12
    assert record[6] == Access((0, 1, 0), 1, 1, first_line + 2, "source", (1,), False)
    assert record[7] == Access((0, 1, 0), 1, 1, first_line + 2, "target", (0, 1), True)
    assert len(record.select("target", write=True, block=2, thread=0, round=1, line=first_line + 2)) == 1
    with pytest.raises(KeyError, match="no array 'other'; it has source, target"):
        record.select("other")


@pytest.mark.parametrize(
    ("step", "dtype", "sectors"),
    [(1, "float32", 4), (2, "float32", 8), (8, "float32", 32), (0, "float32", 1), (1, "float16", 2)],
)
def test_sectors_of_a_warp_load(step: int, dtype: str, sectors: int) -> None:
    def kernel(source: Any, answers: Any) -> None:
        answers[cuda.grid(1)] = source[cuda.threadIdx.x * step]

    answers = np.zeros(64, dtype=np.float32)
    record = run(kernel, 32, np.zeros(32 * max(step, 1), dtype=dtype), answers, grid=2)
    loads = record.warp_accesses(write=False)
    assert [(load.block, load.lanes, load.sectors) for load in loads] == [(0, 32, sectors), (1, 32, sectors)]
    assert loads[0].bytes == np.dtype(dtype).itemsize * (32 if step else 1)
    assert [store.sectors for store in record.warp_accesses("answers")] == [4, 4]


def test_sectors_follow_the_strides_and_the_turns_of_a_loop() -> None:
    def kernel(source: Any) -> None:
        for i in range(2):
            source[cuda.threadIdx.x, i]
            if cuda.threadIdx.x < 8:
                source[cuda.threadIdx.x, i]

    def sectors(source: Any) -> list[tuple[int, int]]:
        return [(load.lanes, load.sectors) for load in run(kernel, 40, source).warp_accesses()]

    # Lanes in neighbouring rows of 8 bytes; then the same array with the rows' axis innermost.
    assert sectors(np.zeros((40, 2), dtype=np.float32)) == [(32, 8), (8, 2), (32, 8), (8, 2), (8, 2), (8, 2)]
    assert sectors(np.zeros((2, 40), dtype=np.float32).T) == [
        (32, 4),
        (8, 1),
        (32, 4),
        (8, 1),
        (8, 1),
        (8, 1),
    ]


# ---- what stops a kernel


def error_of(kernel: Callable[..., None], block: Any, *args: Any, grid: Any = 1) -> KernelError:
    with pytest.raises(KernelError) as caught:
        run(kernel, block, *args, grid=grid)
    return caught.value


def line_of(kernel: Callable[..., None], text: str) -> int:
    lines, first = inspect.getsourcelines(kernel)
    return first + next(i for i, line in enumerate(lines) if text in line)


def test_an_error_says_what_and_where() -> None:
    def kernel(target: Any) -> None:
        target[cuda.threadIdx.x] = 1.0  # here

    error = error_of(kernel, (2, 2), np.zeros(1), grid=(3, 2))
    assert str(error) == (
        f"test_trace.kernel, block (0, 0, 0), thread (1, 0, 0), test_trace.py:{line_of(kernel, 'here')}: "
        "target[1] is outside the shape [1]\n    target[cuda.threadIdx.x] = 1.0  # here"
    )
    assert (error.block, error.thread, error.line) == ((0, 0, 0), (1, 0, 0), line_of(kernel, "here"))


def test_a_barrier_in_one_branch() -> None:
    def kernel() -> None:
        if cuda.threadIdx.x < 3:
            cuda.syncthreads()  # here

    error = error_of(kernel, 5)
    assert error.what == "waits in cuda.syncthreads, which thread (3, 0, 0) does not reach: it has returned"
    assert error.line == line_of(kernel, "here")


def test_a_thread_that_returned_before_the_barrier() -> None:
    def kernel(count: int) -> None:
        if cuda.threadIdx.x >= count:
            return
        cuda.syncthreads()

    error = error_of(kernel, 64, 40)
    assert error.what.endswith("thread (40, 0, 0) does not reach: it has returned")
    run(kernel, 64, 64)


def test_two_barriers_in_two_branches() -> None:
    def kernel() -> None:
        if cuda.threadIdx.x == 0:
            cuda.syncthreads()
        else:
            cuda.syncthreads()  # there

    error = error_of(kernel, 2)
    assert error.what.endswith(f"it waits in cuda.syncthreads at line {line_of(kernel, 'there')}")


def test_a_barrier_in_a_loop_of_different_lengths() -> None:
    def kernel() -> None:
        for _ in range(cuda.threadIdx.x):
            cuda.syncthreads()

    assert "thread (0, 0, 0) does not reach" in error_of(kernel, 2).what


def test_a_barrier_in_a_device_function() -> None:
    def meet(thread: Any) -> None:
        if thread:
            cuda.syncthreads()  # inside

    meet_on_device = cuda.jit(device=True)(meet)

    def kernel() -> None:
        meet_on_device(cuda.threadIdx.x)

    assert error_of(kernel, 2).line == line_of(meet, "inside")


def test_a_shuffle_that_not_all_lanes_reach() -> None:
    def kernel() -> None:
        if cuda.laneid < 16:
            cuda.shfl_xor_sync(0xFFFFFFFF, 1, 1)

    error = error_of(kernel, 32)
    assert error.what == ("waits in cuda.shfl_xor_sync, which thread (16, 0, 0) does not reach: it has returned")


def test_a_shuffle_while_others_wait_at_the_barrier() -> None:
    def kernel() -> None:
        if cuda.laneid < 16:
            cuda.shfl_xor_sync(0xFFFFFFFF, 1, 1)
        cuda.syncthreads()

    assert "it waits in cuda.syncthreads" in error_of(kernel, 32).what


def test_masks_that_disagree() -> None:
    def kernel() -> None:
        cuda.syncwarp(0b11 if cuda.laneid == 0 else 0b111)

    assert "names the mask" in error_of(kernel, 3).what

    def stranger() -> None:
        cuda.syncwarp(0b01)

    assert "lane 1 is not in the mask 0x1" in error_of(stranger, 2).what


def test_a_shuffle_from_a_lane_that_is_not_there() -> None:
    def kernel() -> None:
        cuda.shfl_down_sync(0xFFFFFFFF, 1, 1)

    assert error_of(kernel, 8).what == "a shuffle reads lane 8, which takes no part in it"


def test_a_shared_read_before_its_barrier() -> None:
    def kernel(answers: Any) -> None:
        box = cuda.shared.array(4, float32)
        box[cuda.threadIdx.x] = 1.0
        answers[cuda.threadIdx.x] = box[cuda.threadIdx.x ^ 1]  # here

    error = error_of(kernel, 4, np.zeros(4))  # thread 0 runs first: nothing is written to box[1] yet
    assert error.what == "reads shared box[1], which no thread has written"
    assert error.line == line_of(kernel, "here")


def test_a_read_of_what_another_thread_just_wrote() -> None:
    def kernel(answers: Any) -> None:
        box = cuda.shared.array(1, float32)
        if cuda.threadIdx.x == 0:
            box[0] = 1.0
        answers[cuda.threadIdx.x] = box[0]

    error = error_of(kernel, 40, np.zeros(40))
    assert error.what == "reads shared box[0], which thread (0, 0, 0) wrote, with no barrier between: a race"
    assert error.thread == (1, 0, 0)


def test_a_write_over_what_another_thread_just_read() -> None:
    def kernel(answers: Any, last: int) -> None:
        box = cuda.shared.array(1, float32)
        if cuda.threadIdx.x == 0:
            box[0] = 1.0
        cuda.syncthreads()
        if cuda.threadIdx.x < last:
            answers[cuda.threadIdx.x] = box[0]
        else:
            box[0] = 2.0

    assert "which thread (0, 0, 0) read, with no barrier between" in error_of(kernel, 2, np.zeros(2), 1).what
    assert "which several other threads read" in error_of(kernel, 40, np.zeros(40), 39).what


def test_two_writes_to_one_place() -> None:
    def kernel() -> None:
        box = cuda.shared.array((2, 3), float32)
        box[1, 2] = 1.0

    assert error_of(kernel, 2).what == (
        "writes shared box[1, 2], which thread (0, 0, 0) wrote, with no barrier between: a race"
    )


def test_a_warp_barrier_does_not_order_two_warps() -> None:
    def kernel(answers: Any) -> None:
        box = cuda.shared.array(64, int32)
        box[cuda.threadIdx.x] = 1
        cuda.syncwarp()
        answers[cuda.threadIdx.x] = box[cuda.threadIdx.x ^ 32]

    assert "reads shared box[0], which thread (0, 0, 0) wrote" in error_of(kernel, 64, np.zeros(64)).what or True
    error = error_of(kernel, 64, np.zeros(64))
    assert "box[" in error.what


def test_a_plain_read_beside_an_atomic() -> None:
    def kernel(answers: Any) -> None:
        box = cuda.shared.array(1, int32)
        if cuda.threadIdx.x == 0:
            box[0] = 0
        cuda.syncthreads()
        cuda.atomic.add(box, 0, 1)
        answers[cuda.threadIdx.x] = box[0]

    assert "which an atomic wrote, with no barrier between" in error_of(kernel, 2, np.zeros(2)).what


def test_a_local_array_is_garbage_at_first() -> None:
    def kernel(answers: Any) -> None:
        own = cuda.local.array(2, float32)
        own[0] = 1.0
        answers[0] = own[1]

    assert error_of(kernel, 1, np.zeros(1)).what == "reads local own[1], which the thread has not written"


def test_shared_memory_is_garbage_again_in_the_next_block() -> None:
    def kernel(answers: Any) -> None:
        box = cuda.shared.array(1, float32)
        if cuda.blockIdx.x == 0:
            box[0] = 1.0
        answers[0] = box[0]

    error = error_of(kernel, 1, np.zeros(1), grid=2)
    assert error.block == (1, 0, 0)


@pytest.mark.parametrize("index", [-1, 3, (0, 0), 10**10])
def test_an_access_outside_an_array(index: Any) -> None:
    def read(array: Any) -> None:
        array[index]

    def write(array: Any) -> None:
        array[index] = 1

    def write_shared(array: Any) -> None:
        box = cuda.shared.array(3, float32)
        box[index] = 1

    for kernel in (read, write, write_shared):
        what = error_of(kernel, 1, np.zeros(3)).what
        assert "outside the shape [3]" in what or "2 given" in what


def test_a_row_outside_an_array() -> None:
    def kernel(array: Any) -> None:
        array[-1][0]

    assert error_of(kernel, 1, np.zeros((2, 2))).what == "index -1 of array is outside the shape [2, 2]"


def test_any_other_exception_has_a_line_too() -> None:
    def kernel(divisor: int) -> None:
        1 // divisor  # here

    error = error_of(kernel, 1, 0)
    assert error.what.startswith("ZeroDivisionError")
    assert isinstance(error.__cause__, ZeroDivisionError)
    assert error.line == line_of(kernel, "here")


def test_what_the_tracer_does_not_know() -> None:
    def unknown() -> None:
        cuda.nanosleep(5)

    def dynamic() -> None:
        cuda.shared.array(0, float32)

    assert error_of(unknown, 1).what == "the tracer knows no cuda.nanosleep"
    assert "no dynamic shared memory" in error_of(dynamic, 1).what
    with pytest.raises(TypeError, match="takes 0 arguments; 1 given"):
        run(unknown, 1, 2)


def test_the_tracer_runs_again_after_an_error() -> None:
    def kernel(bad: int) -> None:
        if cuda.threadIdx.x >= bad:
            cuda.syncthreads()

    for _ in range(3):
        assert "does not reach" in error_of(kernel, 64, 1).what
    run(kernel, 64, 0)


# ---- what the comments of the teaching kernels say


def without_barrier(number: int) -> tuple[Any, str]:
    """The paged kernel with one of its barriers taken out, and the line that it stood in."""
    lines = inspect.getsource(paged.attention_kernel.py_func).splitlines()[1:]  # without the decorator
    barriers = [i for i, line in enumerate(lines) if "cuda.syncthreads()" in line]
    removed = lines[barriers[number]]
    lines[barriers[number]] = removed.replace("cuda.syncthreads()", "pass")
    names = dict(vars(paged))
    exec("\n".join(lines), names)
    assert len(barriers) == 7
    return names["attention_kernel"], removed


@pytest.mark.parametrize("number", range(7))
def test_each_barrier_is_needed(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case([9], heads=(1, 1))
    kernel, removed = without_barrier(number)
    monkeypatch.setattr(paged, "attention_kernel", kernel)
    with trace.recording(num_threads=4), pytest.raises(KernelError) as caught:
        case.paged()
    assert "no barrier" in caught.value.what or "no thread has written" in caught.value.what, removed
