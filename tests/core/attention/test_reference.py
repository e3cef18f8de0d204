"""The core's own reference in array code against attention by its definition."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from support.plain_calls import CASES, plain_call

from paged_ref.core.attention import reference


@pytest.mark.parametrize("paged", [True, False], ids=["paged", "contiguous"])
@pytest.mark.parametrize("name", CASES)
def test_matches_the_oracle(name: str, paged: bool) -> None:
    problem = plain_call(**CASES[name], paged=paged)
    reference.attend(problem.call)
    tolerance = 1e-3 if name == "large scores" else 2e-5
    np.testing.assert_allclose(problem.call.out, problem.output, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(np.asarray(problem.call.lse), problem.lse, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-13), ("float16", 2e-3)])
def test_float64_is_exact_and_float16_is_rounded_at_the_end(dtype: str, tolerance: float) -> None:
    problem = plain_call([9, 20, 6], [1, 4, 6], dtype=dtype)
    reference.attend(problem.call)
    assert problem.call.out.dtype == dtype
    np.testing.assert_allclose(problem.call.out, problem.output, rtol=tolerance, atol=tolerance)


def test_without_lse_the_output_is_the_same() -> None:
    with_lse, without = plain_call([9, 20], [3, 1]), plain_call([9, 20], [3, 1], want_lse=False)
    for problem in (with_lse, without):
        reference.attend(problem.call)
    np.testing.assert_array_equal(with_lse.call.out, without.call.out)


def test_paged_and_contiguous_agree_to_the_bit() -> None:
    both = [plain_call([9, 20, 6], [1, 4, 6], paged=paged) for paged in (True, False)]
    for problem in both:
        reference.attend(problem.call)
    np.testing.assert_array_equal(both[0].call.out, both[1].call.out)


def test_what_it_leaves_out_is_named() -> None:
    call: Any = plain_call([3]).call
    assert reference.unavailable() is None
    assert reference.unsupported(call) is None
    call.variant = "softcap"
    assert reference.unsupported(call) == "it has no softcap"
