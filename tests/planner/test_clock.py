"""The simulated clock against the roofline that it multiplies out."""

from __future__ import annotations

import random

import pytest

from paged_ref.core.memory.manager import Transfer
from paged_ref.planner.clock import Clock
from paged_ref.planner.hardware import gpu_named, several
from paged_ref.planner.models import model_named
from paged_ref.planner.roofline import CONSTANTS, Constants, step_seconds, transfer_seconds


@pytest.mark.parametrize("constants", [CONSTANTS, Constants(bandwidth_share=0.5, compute_share=0.3, step_overhead=0.0)])
@pytest.mark.parametrize("name", ["OPT-13B", "Llama-3-8B", "tiny"])
def test_a_step_takes_what_the_roofline_says(name: str, constants: Constants) -> None:
    rng = random.Random(0)
    for gpu in (gpu_named("A100-40GB"), several(gpu_named("T4"), 16)):
        clock = Clock(gpu, model_named(name), constants)
        bounds = set()
        for _ in range(200):
            tokens, logits = rng.randint(1, 4096), rng.randint(0, 256)
            kv, pairs = rng.randint(1, 10**6), rng.randint(1, 10**7)
            expected = step_seconds(
                gpu, model_named(name), tokens, kv, query_key_pairs=pairs, num_logits=logits, constants=constants
            )
            assert clock.step(tokens, kv, pairs, logits) == pytest.approx(expected, rel=1e-9)
            bounds.add(clock.step(tokens, kv, 0, 0) == clock.step(tokens, kv, pairs, logits))
        assert bounds == {True, False}  # both sides of the roof were met
        assert clock.decode(7, 500) == clock.step(7, 500, 500, 7)


def test_transfers_are_copies_in_each_array() -> None:
    gpu, model = gpu_named("A100-40GB"), model_named("OPT-13B")
    clock = Clock(gpu, model)
    row = 16 * model.kv_bytes_per_token
    seconds, moved, swapped = clock.transfers([Transfer("swap_out", 0, 1), Transfer("swap_in", 0, 1, 3)], 16)
    assert (moved, swapped) == (0, 4 * row)
    expected = transfer_seconds(gpu, row, 80) + transfer_seconds(gpu, 3 * row, 80)  # K and V of 40 layers
    assert seconds == pytest.approx(expected)
    seconds, moved, swapped = clock.transfers([Transfer("move", 0, 5, 10)], 1)
    assert (moved, swapped) == (10 * model.kv_bytes_per_token, 0)
    assert seconds == pytest.approx(2 * moved / (gpu.bandwidth * CONSTANTS.bandwidth_share))  # read and written
    assert clock.transfers([], 16) == (0.0, 0, 0)
