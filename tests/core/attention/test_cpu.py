"""The readable loop for one CPU thread against attention by its definition."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from support.plain_calls import CASES, plain_call

from paged_ref.core.attention import cpu


@pytest.mark.parametrize("paged", [True, False], ids=["paged", "contiguous"])
@pytest.mark.parametrize("name", CASES)
def test_matches_the_oracle(name: str, paged: bool) -> None:
    problem = plain_call(**CASES[name], paged=paged)
    assert cpu.unsupported(problem.call) is None
    cpu.attend(problem.call)
    tolerance = 1e-3 if name == "large scores" else 2e-5
    np.testing.assert_allclose(problem.call.out, problem.output, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(np.asarray(problem.call.lse), problem.lse, rtol=tolerance, atol=tolerance)


def test_paged_and_contiguous_agree_to_the_bit() -> None:
    both = [plain_call([9, 20, 6], [1, 4, 6], paged=paged, want_lse=False) for paged in (True, False)]
    for problem in both:
        cpu.attend(problem.call)
    np.testing.assert_array_equal(both[0].call.out, both[1].call.out)


def test_the_block_size_changes_no_bit() -> None:
    answers = []
    for block_size in (1, 3, 16, 64):
        problem = plain_call([9, 20, 6], [1, 4, 6], block_size=block_size)
        cpu.attend(problem.call)
        answers.append(problem.call.out)
    for answer in answers[1:]:
        np.testing.assert_array_equal(answer, answers[0])


@pytest.mark.parametrize("which", ["keys", "values"])
def test_a_nan_in_a_visible_slot_shows(which: str) -> None:
    problem = plain_call([11, 9])
    tables: Any = problem.call.addresses.block_tables
    getattr(problem.call, which)[tables[0, 1], 2] = np.nan
    cpu.attend(problem.call)
    assert np.isnan(problem.call.out[0]).all()
    np.testing.assert_allclose(problem.call.out[1], problem.output[1], rtol=2e-5, atol=2e-5)


def test_what_it_leaves_out_is_named() -> None:
    assert cpu.unavailable() is None
    call: Any = plain_call([3]).call
    call.variant = "sinks"
    assert cpu.unsupported(call) == "it has no sinks"
    half = plain_call([3], dtype="float16").call
    assert cpu.unsupported(half) == ("query is float16 or not in host memory; this backend computes in float32 there")
    mixed: Any = plain_call([3]).call
    mixed.values = mixed.values.astype(np.float64)
    assert str(cpu.unsupported(mixed)).startswith("values is float64")
