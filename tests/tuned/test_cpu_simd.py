"""The loop for CPUs: a sequence's bits depend on nothing but the sequence, and odd shapes are computed on copies."""

from __future__ import annotations

import gc
import weakref
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from support.attention_cases import Case, Problem, build, run

from paged_ref.core.attention.attention import Addresses, AttentionCall
from paged_ref.kernels import backends, paged_attention
from paged_ref.tuned import cpu_machine, cpu_simd, cpu_step
from paged_ref.tuned.cpu_machine import LANES

pytestmark = pytest.mark.skipif("cpu-simd" not in backends(), reason="NUMBA_DISABLE_JIT is set")

SHAPE: dict[str, Any] = {"num_heads": 4, "num_kv_heads": 2, "head_size": 32}


def queries(problem: Problem, s: int, first: int, end: int) -> np.ndarray:
    """The outputs of queries `first` to `end - 1` of sequence `s`, computed in a call of their own."""
    key_cache, value_cache, tables = problem.paged
    begin = sum(problem.query_lens[:s])
    hidden = problem.query_lens[s] - end  # later tokens, which these queries do not see
    alone = Problem(
        problem.query[begin + first : begin + end], [], [], [end - first],
        (key_cache, value_cache, tables[s : s + 1]), problem.contiguous, problem.seq_lens[s : s + 1] - hidden,
        np.array([0, end - first], np.int32), problem.options,
    )  # fmt: skip
    return np.asarray(run(alone, "cpu-simd", "paged"))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_bits_depend_on_no_company_and_on_no_chunks(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_machine, "MIN_COPIED_WORK", 60_000 * 128)  # only of the whole prompt
    problem = build(Case(seq_lens=(300, 40, 90), query_lens=(300, 1, 33), cache_dtype=dtype, **SHAPE))
    together = np.split(run(problem, "cpu-simd", "paged"), np.cumsum(problem.query_lens)[:-1])
    for s, cuts in enumerate([(0, 1, 8, 108, 300), (0, 1), (0, 31, 33)]):
        chunks = [queries(problem, s, *cut) for cut in pairwise(cuts)]
        np.testing.assert_array_equal(np.concatenate(chunks), together[s])


def test_bits_depend_on_no_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = build(Case(seq_lens=(1300, 90, 700), query_lens=(1, 60, 2), **SHAPE))
    used = []

    def in_threads(function: Any, threads: int) -> None:
        used.append(threads)
        for mine in reversed(range(threads)):  # the last one takes everything
            function(mine, threads)

    monkeypatch.setattr(cpu_step, "in_threads", in_threads)
    monkeypatch.setattr(cpu_machine, "MIN_PARALLEL_WORK", 0)
    outs = []
    for threads in (1, 2, 3):
        monkeypatch.setattr(cpu_step, "num_threads", lambda threads=threads: threads)
        outs.append(run(problem, "cpu-simd", "paged"))
    assert used == [1, 2, 3]
    for out in outs[1:]:
        np.testing.assert_array_equal(out, outs[0])


def test_what_other_threads_write_outlives_an_interrupted_call(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = build(Case(**SHAPE))
    shares: list[Any] = []

    def in_threads(function: Any, threads: int) -> None:
        shares.append(function)
        raise KeyboardInterrupt

    monkeypatch.setattr(cpu_step, "in_threads", in_threads)
    out = np.empty_like(problem.query)
    alive = weakref.ref(out)
    with pytest.raises(KeyboardInterrupt):
        run(problem, "cpu-simd", "paged", out=out)
    del out
    gc.collect()
    assert alive() is not None
    assert cpu_step.last.step is None  # these threads still write to its memory
    shares.clear()
    gc.collect()
    assert alive() is None


def test_the_layers_of_a_step_are_planned_once(monkeypatch: pytest.MonkeyPatch) -> None:
    planned: list[AttentionCall] = []

    class Counted(cpu_step.Step):
        def __init__(self, call: AttentionCall, *others: Any) -> None:
            planned.append(call)
            super().__init__(call, *others)

    monkeypatch.setattr(cpu_simd, "Step", Counted)
    rng = np.random.default_rng(0)
    layers, query = rng.standard_normal((3, 2, 8, 16, 2, 32), np.float32), rng.standard_normal((2, 8, 32), np.float32)

    def outputs(windows: tuple[int | None, ...], steps: int) -> list[np.ndarray]:
        results: list[np.ndarray] = []
        for (keys, values), window in zip(layers, windows, strict=True):
            if not results or steps > 1:
                table, loc = np.arange(8, dtype=np.int32).reshape(2, 4), np.arange(3, dtype=np.int32)
                addresses = Addresses(np.array([60, 33], np.int32), loc, table)
            call = AttentionCall(query, keys, values, addresses, 0.2, window, np.empty_like(query))
            cpu_simd.attend(call)
            results.append(call.out)
        return results

    for windows, times in (((None, None, None), 1), ((None, 8, None), 3)):
        alone = outputs(windows, steps=3)
        planned.clear()
        np.testing.assert_array_equal(outputs(windows, steps=1), alone)
        assert len(planned) == times


def test_a_plan_fits_in_its_memory_where_a_token_has_more_rows_than_an_item() -> None:
    query, keys = np.zeros((40, 604, 32), np.float32), np.zeros((3, 16, 2, 32), np.float32)
    addresses = Addresses(np.array([40]), np.array([0, 40]), np.arange(3)[None])
    call = AttentionCall(query, keys, keys, addresses, 1.0, None, query)
    shape = cpu_step.make_shape(604, 32, keys.dtype, keys.shape[1:], keys.strides, keys.strides)
    step = cpu_step.Step(call, shape, (), None)
    assert step.num_items == 40 * 2
    assert 4 + step.num_items * cpu_machine.FIELDS <= len(step._kept[0])


@pytest.mark.parametrize(("num_blocks", "size"), [(1, 7), (0, 7), (0, 32)])
def test_a_call_without_keys_gives_zeros(num_blocks: int, size: int) -> None:
    query, keys = np.ones((2, 4, size), np.float32), np.ones((num_blocks, 8, 2, size), np.float32)
    tables, lens = np.zeros((2, 1), np.int32), np.zeros(2, np.int32)
    out, lse = paged_attention(query, keys, keys, tables, lens, return_lse=True, backend="cpu-simd")
    assert not out.any()
    assert (lse == -np.inf).all()


def test_float16_is_rounded_as_numpy_rounds_it() -> None:
    """The output for one key is its value."""
    low = np.random.default_rng(0).integers(1 << 16, size=1 << 16, dtype=np.uint32)
    numbers = (np.arange(1 << 16, dtype=np.uint32) << 16 | low).view(np.float32)  # of all signs and exponents
    values = numbers[np.isfinite(numbers)].reshape(-1, 1, 1, 32)
    count = len(values)
    out = paged_attention(
        np.ones((count, 1, 32), np.float16), np.zeros_like(values), values, np.arange(count)[:, None],
        np.ones(count, np.int64), backend="cpu-simd",
    )  # fmt: skip
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(out[:, 0], values[:, 0, 0].astype(np.float16))


def test_fields_of_structured_arrays_are_read_where_they_lie() -> None:
    rng = np.random.default_rng(0)
    tokens = np.zeros((8, 16), [("flag", "i1"), ("key", "f4", (2, 32)), ("value", "f4", (2, 32))])
    tokens["key"], tokens["value"] = rng.standard_normal((2, 8, 16, 2, 32))
    steps = np.zeros(2, [("flag", "i1"), ("table", "i4", (4,)), ("length", "i4")])
    steps["table"], steps["length"] = rng.permutation(8).reshape(2, 4), (60, 33)
    query = rng.standard_normal((2, 4, 32), np.float32)
    fields = tokens["key"], tokens["value"], steps["table"], steps["length"]
    for changed in range(len(fields)):
        arrays = [array if i == changed else array.copy() for i, array in enumerate(fields)]
        out = paged_attention(query, *arrays, backend="cpu-simd")
        np.testing.assert_allclose(out, paged_attention(query, *arrays, backend="reference"), atol=1e-5)


@pytest.mark.parametrize(
    ("case", "copied"),
    [
        (Case(head_size=LANES), False),
        (Case(head_size=LANES + 1), True),
        (Case(head_size=LANES, layout="heads_first"), False),
        (Case(head_size=LANES, layout="dims_apart"), True),
    ],
)
def test_only_what_is_in_pieces_is_copied(case: Case, copied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    copies: list[AttentionCall] = []
    pack = cpu_simd._packed

    def packed(call: AttentionCall) -> AttentionCall:
        copies.append(pack(call))
        return copies[-1]

    monkeypatch.setattr(cpu_simd, "_packed", packed)
    run(build(case), "cpu-simd", "paged")
    assert len(copies) == copied
