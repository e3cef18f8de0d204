"""What the CPU backend chooses by the CPU's features and by the shape, and when it needs the compiler."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from paged_ref.tuned.cpu_machine import KEYS, PREFETCH_LINES, TILE, Vectors, block_of, passes_of, vectors_of


@pytest.mark.parametrize(
    ("features", "chosen"),
    [
        ("+sse2,+avx2,+fma,+avx512f", Vectors(16, 8, 4)),
        ("+sse2,+sse4a,+avx2,+avx512f", Vectors(16, 8, 4)),
        ("+sse2,+sse4a,+avx2,-avx512f", Vectors(8, 4, 1)),
        ("+sse2,-sse4a,+avx2,-avx512f", Vectors(8, 4, 4)),
        ("+neon", Vectors(8, 4, 4)),
        ("", Vectors(8, 4, 4)),
    ],
)
def test_vectors_follow_the_features(features: str, chosen: Vectors) -> None:
    assert vectors_of(features) == chosen


@pytest.mark.parametrize(
    ("group_size", "head_size", "lanes", "block"),
    [
        (1, 128, 8, (1, 8)),  # one query head for each KV head: no empty rows
        (2, 16, 8, (2, 2)),
        (2, 32, 16, (2, 2)),
        (3, 64, 8, (4, 2)),  # one row in four is empty
        (4, 128, 8, (4, 2)),
        (4, 128, 16, (4, 4)),
        (4, 16, 16, (4, 1)),
        (5, 64, 8, (1, 8)),
        (6, 64, 8, (2, 4)),
        (7, 24, 8, (4, 1)),  # three vectors
        (8, 20, 8, (4, 1)),
    ],
)
def test_a_block_has_the_rows_of_a_group(group_size: int, head_size: int, lanes: int, block: tuple[int, int]) -> None:
    assert block_of(group_size, head_size, lanes) == block


def test_short_rows_are_read_by_whole_tiles() -> None:
    assert passes_of(row_bytes=4096, head_bytes=512, sums=16) == (KEYS, min(PREFETCH_LINES, 8))
    assert passes_of(row_bytes=1024, head_bytes=64, sums=8) == (KEYS, 1)
    assert passes_of(row_bytes=512, head_bytes=256, sums=8) == (KEYS, min(PREFETCH_LINES, 4))
    assert passes_of(row_bytes=256, head_bytes=64, sums=8) == (TILE, 0)


def test_few_sums_are_of_whole_tiles() -> None:
    """Several keys have sums of their own then, and where these join must not depend on how keys are passed."""
    assert passes_of(row_bytes=4096, head_bytes=512, sums=4) == (TILE, 0)


FIRST_CALL = """
import sys, numpy as np
from paged_ref.kernels import paged_attention
kv = np.ones((2, 4, 1, 16), np.float32)
out = paged_attention(np.ones((1, 1, 16), np.float32), kv, kv, np.array([[0]]), np.array([3]), backend="auto")
print(float(out[0, 0, 0]), "numba" in sys.modules)
"""


def test_a_first_call_with_kept_code_needs_no_compiler() -> None:
    for expected in (None, "1.0 False"):  # the first process may have to compile
        environment = os.environ | {"PAGED_REF_DEVICE": "cpu"}
        run = subprocess.run(
            [sys.executable, "-c", FIRST_CALL], capture_output=True, text=True, env=environment, check=True
        )
        assert expected is None or run.stdout.strip() == expected
