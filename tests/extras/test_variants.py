"""Softcap, ALiBi, sinks and formats in the reference backend, against attention by its definition in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from support import oracle
from support.attention_cases import Case, Problem, build, cases, tolerance, true_options

from paged_ref.core.attention.attention import Addresses, AttentionCall, known_backends
from paged_ref.extras import variants
from paged_ref.extras.formats import decode
from paged_ref.extras.variants import Variant

VARIED = [
    case for case in cases() if case.per_head or case.options or case.layout != "plain" or "int" in case.cache_dtype
]


def call_of(problem: Problem, form: str, query_dtype: str = "") -> AttentionCall:
    """The call that a checked function would make."""
    query = problem.query.astype(query_dtype) if query_dtype else problem.query
    options = dict(problem.options)
    scale, window = options.pop("scale", query.shape[2] ** -0.5), options.pop("sliding_window", None)
    loc = problem.query_start_loc
    if loc is None:
        loc = np.arange(len(problem.seq_lens) + 1, dtype=np.int32)
    keys, values, where = problem.paged if form == "paged" else problem.contiguous
    places: dict[str, Any] = {"block_tables": where} if form == "paged" else {"starts": where}
    addresses = Addresses(problem.seq_lens, loc, **places)
    out, lse = np.empty(query.shape, query.dtype), np.empty(query.shape[:2], np.float32)
    return AttentionCall(
        query, keys, values, addresses, scale, window, out, lse, Variant(**options) if options else None
    )


@pytest.mark.parametrize("form", ["paged", "contiguous"])
@pytest.mark.parametrize("case", VARIED, ids=str)
def test_matches_the_oracle(case: Case, form: str) -> None:
    problem = build(case)
    want, want_lse = oracle.attention(
        decode(problem.query), problem.keys, problem.values, problem.query_lens, **true_options(problem)
    )
    call = call_of(problem, form)
    assert variants.unsupported(call) is None
    variants.attend(call)
    np.testing.assert_allclose(decode(call.out), want, rtol=tolerance(case), atol=tolerance(case))
    np.testing.assert_allclose(np.asarray(call.lse), want_lse, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    "case",
    [
        Case(options={"softcap": 1.5}),
        Case(per_head=("alibi_slopes",), query_lens=(1, 3, 20)),
        Case(per_head=("sinks",), seq_lens=(0, 5, 9), query_lens=(1, 2, 9)),
        Case(per_head=("alibi_slopes", "sinks"), options={"sliding_window": 9, "softcap": 3.0, "scale": 0.7}),
    ],
    ids=str,
)
def test_in_float64_it_is_exact(case: Case) -> None:
    problem = build(Case(**{**vars(case), "cache_dtype": "float64", "query_dtype": "float64"}))
    want, _ = oracle.attention(problem.query, problem.keys, problem.values, problem.query_lens, **true_options(problem))
    call = call_of(problem, "paged")
    variants.attend(call)
    np.testing.assert_allclose(call.out, want, rtol=1e-13, atol=1e-13)


def test_without_a_visible_key_the_sink_is_all_there_is() -> None:
    problem = build(Case(seq_lens=(0, 3), per_head=("sinks",)))
    call = call_of(problem, "paged")
    variants.attend(call)
    assert not call.out[0].any()
    np.testing.assert_allclose(np.asarray(call.lse)[0], problem.options["sinks"], rtol=1e-6)


def test_a_plain_call_is_the_cores_reference_to_the_bit() -> None:
    from paged_ref.core.attention import reference

    problem = build(Case(query_lens=(1, 2, 18)))
    plain, core = call_of(problem, "paged"), call_of(problem, "paged")
    variants.attend(plain)
    reference.attend(core)
    np.testing.assert_array_equal(plain.out, core.out)


def test_a_variant_names_what_is_there() -> None:
    ones = np.ones(4, np.float32)
    assert str(Variant()) == ""
    assert str(Variant(softcap=2.0, sinks=ones)) == "softcap, sinks"
    assert (
        str(Variant(key_scales=ones, value_scales=ones, alibi_slopes=ones)) == "alibi_slopes, key_scales, value_scales"
    )


def test_it_stands_for_the_reference() -> None:
    assert "every variant" in known_backends()["reference"]
    assert variants.unavailable() is None
