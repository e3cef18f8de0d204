"""Sequences and groups: what is left to compute, and what the sequences of a group have in common."""

from __future__ import annotations

import pytest

from paged_ref.core.engine.sequence import Group, Sequence


def test_what_a_step_has_to_compute_and_what_the_cache_has_to_hold() -> None:
    seq = Sequence(0, [1, 2, 3], 3, 10)
    assert (seq.num_uncomputed, seq.max_slots) == (3, 9)
    seq.num_computed = 3
    seq.tokens.append(4)
    assert seq.num_uncomputed == 1


@pytest.mark.parametrize(
    ("sequences", "common"),
    [
        ([[1, 2, 3]], 2),  # each keeps at least one token to compute
        ([[1, 2, 3], [1, 2, 3]], 2),
        ([[1, 2, 3, 4], [1, 2, 9, 4]], 2),
        ([[1, 2, 3, 4], [1, 2]], 1),
        ([[1], [2]], 0),
        ([[1, 2], [3, 2]], 0),
    ],
)
def test_what_the_sequences_of_a_group_have_in_common(sequences: list[list[int]], common: int) -> None:
    group = Group([Sequence(i, tokens, 1, 20) for i, tokens in enumerate(sequences)])
    assert group.common_len() == common
    assert group.leader is group.seqs[0]
