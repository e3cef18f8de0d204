"""The tuned kernels in the tracer: every variant against the oracle, and what they read of memory.

Toy sizes: a traced warp takes milliseconds for a tile. What a GPU would run is checked in test_flash_code.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from support import oracle

pytest.importorskip("numba_cuda", reason="numba-cuda makes the kernels (extra test, cuda12 or cuda13)")

from support.attention_calls import call_of
from support.attention_cases import Case, Problem, build, tolerance, true_options
from support.launched import flash_launches

from paged_ref.core.attention.cuda import Launch
from paged_ref.extras.formats import decode, from_float8
from paged_ref.kernels import merge_states
from paged_ref.tracer import trace
from paged_ref.tracer.access_record import Trace
from paged_ref.tuned import flash

Array = np.ndarray[Any, np.dtype[Any]]
DECODE = Case(seq_lens=(5, 0, 66), num_heads=2, num_kv_heads=1, head_size=32, cache_dtype="float16")
EVERYTHING: dict[str, Any] = {"sliding_window": 20, "softcap": 3.0, "scale": 0.7}


def traced(launch: Launch) -> Trace:
    return trace.run(launch.kernel, launch.grid, launch.num_threads, *launch.args)


def run(problem: Problem, form: str, num_splits: int = 1) -> tuple[Array, Array, list[Trace]]:
    """Output, lse, and the record of each kernel."""
    call = call_of(problem, form)
    assert flash.unsupported_by_kernels(call) is None
    traces = [traced(launch) for launch in flash_launches(call, num_splits)]
    assert call.lse is not None
    return call.out, call.lse, traces


def cases() -> list[tuple[Case, int]]:
    """Cases, and into how many parts a sequence is split; in a mixed batch, one with few queries."""
    formats = ("float16", "uint16", "float32", "int8", "uint8")
    found = [(replace(DECODE, cache_dtype=cache, seq_lens=(5, 0, 42)), 3) for cache in formats]
    found.append((DECODE, 1))
    found += [(replace(DECODE, cache_dtype=cache, query_dtype=cache), 2) for cache in ("float16", "uint16")]
    found.append((replace(DECODE, cache_dtype="float32", query_dtype="float16"), 1))
    prefill = replace(DECODE, seq_lens=(2, 24, 0), query_lens=(4, 9, 2))
    found += [(replace(prefill, cache_dtype=cache), 1) for cache in formats]
    found.append((replace(DECODE, seq_lens=(60,), query_lens=(50,)), 1))  # rows for four CUDA blocks
    features = replace(DECODE, seq_lens=(1, 45), per_head=("alibi_slopes", "sinks"), options=EVERYTHING)
    for block_size in (3, 8, 24, 64):
        found.append((replace(features, block_size=block_size, cache_dtype="uint16"), 2))
    found.append((replace(features, num_heads=4, num_kv_heads=2, query_lens=(2, 12), block_size=8), 1))
    for name in ("alibi_slopes", "sinks"):
        found.append((replace(DECODE, seq_lens=(0, 33), per_head=(name,)), 2))
    for options in ({"sliding_window": 1}, {"sliding_window": 17}, {"softcap": 1.5}):
        found.append((replace(DECODE, seq_lens=(50,), options=options), 2))
    for num_heads, num_kv_heads in ((1, 1), (7, 1), (8, 1), (9, 1)):
        found.append((replace(DECODE, seq_lens=(20,), num_heads=num_heads, num_kv_heads=num_kv_heads), 1))
        found.append((replace(found[-1][0], query_lens=(5,)), 1))
    for head_size in (8, 80, 128, 256):
        found.append((replace(DECODE, seq_lens=(20, 3), num_heads=2, num_kv_heads=1, head_size=head_size), 1))
    found.append((replace(DECODE, cache_dtype="float32", head_size=4, seq_lens=(9,)), 1))
    for layout in ("k_and_v_in_one", "layers_last", "heads_first"):
        found.append((replace(DECODE, seq_lens=(20,), layout=layout), 1))
    found.append((replace(DECODE, query_lens=(0, 1, 1), integer="int64"), 2))  # a sequence that asks nothing
    few = replace(DECODE, seq_lens=(40, 2, 9, 0), num_heads=3, query_lens=(4, 3, 0, 1), per_head=("sinks",))
    found += [(few, 1), (replace(few, query_lens=(5, 3, 2, 1)), 2)]
    found += [(Case(seq_lens=(0, 0), query_lens=(0, 0)), 1), (Case(seq_lens=()), 1)]
    return found


@pytest.mark.parametrize(("case", "num_splits"), cases(), ids=str)
def test_matches_the_oracle(case: Case, num_splits: int) -> None:
    problem = build(case)
    want, want_lse = oracle.attention(
        decode(problem.query), problem.keys, problem.values, problem.query_lens, **true_options(problem)
    )
    answers = []
    for form in ("paged", "contiguous"):
        out, lse, _ = run(problem, form, num_splits)
        np.testing.assert_allclose(decode(out), want, rtol=tolerance(case), atol=tolerance(case), err_msg=form)
        np.testing.assert_allclose(lse, want_lse, rtol=2e-5, atol=2e-5, err_msg=form)
        answers.append((out, lse))
    for paged, contiguous in zip(*answers, strict=True):
        np.testing.assert_array_equal(paged, contiguous)  # one source: the same sums


@pytest.mark.parametrize(
    ("case", "form", "splits"),
    [(DECODE, "paged", (1, 3)), (DECODE, "contiguous", (3,)), (replace(DECODE, cache_dtype="float32"), "paged", (3,)),
     (replace(DECODE, cache_dtype="int8"), "paged", (1,))],
    ids=str,
)  # fmt: skip
def test_each_visible_key_is_read_once_for_all_heads_of_a_group(case: Case, form: str, splits: tuple[int, ...]) -> None:
    """And nothing else is: no other slot, no table entry past the sequence, in whatever parts it is split."""
    problem = build(replace(case, num_heads=4, num_kv_heads=2, seq_lens=(37, 0, 66)))
    for num_splits in splits:
        _, _, (attention, *_) = run(problem, form, num_splits)
        cache, where = problem.paged[0] if form == "paged" else problem.contiguous[0], getattr(problem, form)[2]
        words = cache[..., :1, :1].size * cache.shape[-2] * cache.shape[-1] * cache.itemsize // 4
        expected = np.zeros((cache.shape[0] * (cache.shape[1] if form == "paged" else 1), 1), int)  # by slot
        for s, length in enumerate(problem.seq_lens):
            position = np.arange(length)
            if form == "paged":
                slots = where[s, position // case.block_size] * case.block_size + position % case.block_size
            else:
                slots = where[s] + position
            expected[slots] = 1
        for name in ("keys", "values"):
            reads = attention.counts(name).reshape(len(expected), -1)  # [slots, words of a slot]
            assert reads.size == words
            assert (reads > 0).all(axis=1).tolist() == (expected[:, 0] > 0).tolist()
            # Lanes past the end read the last key again, which costs nothing: it is in the warp's same load.
            assert ((reads > 1).any(axis=1).sum()) <= len(problem.seq_lens)
        if form == "paged":
            blocks = -(-problem.seq_lens // case.block_size)
            entries = attention.counts("where").reshape(where.shape) > 0
            assert (entries == (np.arange(where.shape[1]) < blocks[:, None])).all()


def test_the_twin_reads_no_table() -> None:
    problem = build(DECODE)
    _, _, (paged,) = run(problem, "paged")
    _, _, (contiguous,) = run(problem, "contiguous")
    lanes, blocks = 32, 1 + 5  # of 16 keys: sequences of 5 and of 66
    assert paged.totals()["where"][0] == lanes * blocks
    assert contiguous.totals()["where"][0] == 128 * 3  # each thread reads where its sequence starts
    for name in ("keys", "values"):
        assert paged.totals()[name] == contiguous.totals()[name]


def test_parts_merge_as_merge_states_does() -> None:
    problem = build(DECODE)
    call = call_of(problem, "paged")
    attention, combine = flash_launches(call, 3)
    traced(attention)
    outputs = attention.args[0].reshape(3, 2, 3, 32).transpose(2, 0, 1, 3)  # [parts, tokens, heads, head_size]
    lses = attention.args[1].reshape(3, 2, 3).transpose(2, 0, 1)
    want, want_lse = merge_states(outputs, lses * np.float32(np.log(2)))
    traced(combine)
    np.testing.assert_allclose(call.out, want, rtol=1e-6, atol=1e-6)
    assert call.lse is not None
    np.testing.assert_allclose(call.lse, want_lse, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_nan_in_a_visible_slot_shows_and_only_there(dtype: str) -> None:
    for which in (0, 1):
        problem = build(replace(DECODE, seq_lens=(40, 9), cache_dtype=dtype))
        problem.paged[which][problem.paged[2][0, 0], 3] = np.nan
        for num_splits in (1, 2):
            out, _, _ = run(problem, "paged", num_splits)
            assert np.isnan(out[0]).all()
            assert np.isfinite(out[1]).all()


def test_large_scores_neither_overflow_nor_drown_the_others() -> None:
    problem = build(replace(DECODE, seq_lens=(40, 17), options={"scale": 50.0}))
    want, want_lse = oracle.attention(problem.query, problem.keys, problem.values, [1, 1], scale=50.0)
    out, lse, _ = run(problem, "paged", 2)
    np.testing.assert_allclose(out, want, rtol=1e-3, atol=1e-3)  # float32 scores of several hundred
    np.testing.assert_allclose(lse, want_lse, rtol=1e-5)


@pytest.mark.parametrize(
    ("blocks", "max_keys", "places", "least", "most"),
    [
        (8, 65536, 396, 40, 49),  # one sequence fills the GPU
        (512, 4096, 396, 2, 4),  # 1.3 waves would leave a third of the GPU idle
        (2048, 16384, 396, 1, 4),
        (8, 255, 396, 1, 1),  # too short to split
        (1, 10**6, 396, 100, 128),
        (396, 65536, 396, 1, 1),
    ],
)
def test_splits_fill_the_gpu(blocks: int, max_keys: int, places: int, least: int, most: int) -> None:
    splits = flash.number_of_splits(blocks, max_keys, places)
    assert least <= splits <= most
    waves = blocks * splits / places
    assert max_keys < 8 * flash.MIN_KEYS or waves / np.ceil(waves) >= 0.8 or splits >= 0.9 * flash.MAX_SPLITS


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (Case(query_dtype="float64"), "query is float64"),
        (Case(cache_dtype="float64"), "the cache is float64; the tuned kernels read float16, float32, bfloat16"),
        (Case(head_size=12, cache_dtype="float16"), "head_size is 12; a row of float16 must be a multiple of 16 bytes"),
        (Case(head_size=8, cache_dtype="int8"), "head_size is 8; a row of int8"),
        (Case(head_size=256), "head_size is 256; rows of the cache may have 512 bytes"),
        (Case(layout="dims_apart"), "the numbers of a head do not follow one another in the memory of the keys"),
    ],
    ids=str,
)
def test_what_it_leaves_out_it_names(case: Case, reason: str) -> None:
    said = flash.unsupported_by_kernels(call_of(build(case), "paged"))
    assert said is not None
    assert reason in said


def test_rows_that_begin_off_a_16_byte_border_are_refused() -> None:
    problem = build(Case(cache_dtype="float16"))
    key_cache, _, tables = problem.paged
    shifted = np.zeros(key_cache.size + 8, np.float16)[1 : key_cache.size + 1].reshape(key_cache.shape)
    problem.paged = (key_cache, shifted, tables)
    said = flash.unsupported_by_kernels(call_of(problem, "paged"))
    assert said == "the rows of the values do not begin at multiples of 16 bytes"


# ---- numbers of 8 bits


@pytest.mark.parametrize("name", ["int8", "e4m3"])
def test_8_bit_numbers_become_the_same_float16(name: str) -> None:
    from numba import cuda

    from paged_ref.tuned.flash_elements import ELEMENTS

    element = ELEMENTS[name]
    score_operand, value_operand, factor = element.score_operand, element.value_operand, np.float32(element.factor)

    @cuda.jit
    def convert(words, scores, values):  # type: ignore[no-untyped-def]
        for i in range(64):
            scores[2 * i], scores[2 * i + 1] = score_operand(words, i, 0)
        for i in range(256):
            values[i] = value_operand(words, i // 16 * 4, i // 16 * 4, i % 16)

    codes = np.arange(256, dtype=np.uint8)
    worth = codes.view(np.int8).astype(np.float32) if name == "int8" else from_float8(codes)
    numbers = np.isfinite(worth)  # e4m3 has two codes that are none
    scores, values = np.zeros(128, np.uint32), np.zeros(256, np.uint32)
    trace.run(convert, 1, 1, codes.view(np.uint32), scores, values)
    np.testing.assert_array_equal(scores.view(np.float16)[numbers] * factor, worth[numbers])
    pairs = values.view(np.float16).reshape(-1, 2) * factor  # of a key and the next: here the same
    np.testing.assert_array_equal(pairs[numbers], np.stack([worth, worth], axis=1)[numbers])
