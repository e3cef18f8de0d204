"""The problems of attention_cases.py as the calls that backends get."""

from __future__ import annotations

from typing import Any

from paged_ref.interop.arguments import AttentionCall, build_call
from support.attention_cases import Problem


def call_of(problem: Problem, form: str) -> AttentionCall:
    options: dict[str, Any] = dict.fromkeys(
        ("scale", "sliding_window", "softcap", "alibi_slopes", "sinks", "key_scales", "value_scales", "out", "validate")
    )
    keys, values, where = getattr(problem, form)
    places: dict[str, Any] = {"block_tables" if form == "paged" else "starts": where}
    options |= places | problem.options
    call = build_call(
        problem.query, keys, values, problem.seq_lens, problem.query_start_loc,
        names=("keys", "values"), return_lse=True, **options,
    )  # fmt: skip
    call.out[...] = 99  # whatever is not written shows
    assert call.lse is not None
    call.lse[...] = 99
    return call
