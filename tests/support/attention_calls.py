"""The problems of attention_cases.py as the calls that backends get."""

from __future__ import annotations

import numpy as np

from paged_ref.core.attention.attention import Addresses, AttentionCall
from paged_ref.extras.variants import Variant
from support.attention_cases import Problem


def call_of(problem: Problem, form: str) -> AttentionCall:
    """The call for "paged" or "contiguous" memory. Its outputs hold 99, so that what is not written shows."""
    query, seq_lens = problem.query, problem.seq_lens
    keys, values, where = getattr(problem, form)
    options = dict(problem.options)
    scale, window = options.pop("scale", query.shape[2] ** -0.5), options.pop("sliding_window", None)
    loc = problem.query_start_loc
    if loc is None:
        loc = np.arange(len(seq_lens) + 1, dtype=np.int32)
    places = {"block_tables" if form == "paged" else "starts": where}
    return AttentionCall(
        query, keys, values, Addresses(seq_lens, loc, **places), scale, window,
        out=np.full_like(query, 99), lse=np.full(query.shape[:2], 99, np.float32), variant=Variant(**options),
    )  # fmt: skip
