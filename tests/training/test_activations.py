"""Wherever the activations lie until backward needs them, the gradients are the same to the bit."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from support import small

from paged_ref.core.device import Array, to_host, xp
from paged_ref.training.activations import MEMORY, Keep, Paged, Recompute, Swap, activations_for
from paged_ref.training.network import Dropout, loss_and_gradient, saved_shapes
from paged_ref.training.parameters import Parameters

CONFIG = small.config(num_layers=4)
TOKENS = sum(small.LENGTHS)
LAYER = 4 * sum(map(math.prod, saved_shapes(CONFIG, TOKENS).values()))  # bytes of one layer


def gradient(activations: Any, steps: int = 2) -> tuple[Array, float]:
    """Of the last of some equal steps."""
    weights, found = small.weights(CONFIG), Parameters(CONFIG)
    for _ in range(steps):
        activations.counts.clear()
        found.flat[:] = 0
        loss = loss_and_gradient(weights, found, small.batch(CONFIG), activations, Dropout(0.2, [3]))
    return to_host(found.flat), loss


WANTED = gradient(Keep())


def assert_same(activations: Any) -> None:
    found, loss = gradient(activations)
    assert loss == WANTED[1]
    np.testing.assert_array_equal(found, WANTED[0])
    assert activations.counts.held == 0, "something is held after backward"


def test_keep_holds_all_layers_and_moves_nothing() -> None:
    activations = Keep()
    assert_same(activations)
    assert activations.counts.peak == CONFIG.num_layers * LAYER
    assert (activations.counts.moved_out, activations.counts.moved_in) == (0, 0)


def test_recompute_holds_the_layers_inputs() -> None:
    activations = Recompute()
    assert_same(activations)
    assert activations.counts.peak == CONFIG.num_layers * TOKENS * CONFIG.hidden_size * 4


@pytest.mark.parametrize("layers", [0, 1, 2.5, 3, 4])
def test_swap_moves_the_layers_that_the_budget_does_not_hold(layers: float) -> None:
    activations = Swap(int(layers * LAYER), CONFIG, TOKENS)
    assert_same(activations)
    assert activations.counts.peak == int(layers) * LAYER
    moved = (CONFIG.num_layers - int(layers)) * LAYER
    assert (activations.counts.moved_out, activations.counts.moved_in) == (moved, moved)


@pytest.mark.parametrize("page_size", [60, 1000, LAYER, 2 * LAYER + 4])
@pytest.mark.parametrize("layers", [0, 0.3, 1, 2.5, 4])
def test_pages_of_any_size_in_a_pool_of_any_size(page_size: int, layers: float) -> None:
    budget = max(page_size, int(layers * LAYER))
    activations = Paged(budget, page_size, CONFIG, TOKENS)
    assert_same(activations)
    activations.residency.check_integrity()
    assert activations.residency.num_pages == 0
    counts, in_layer = activations.counts, -(-LAYER // page_size)  # pages
    in_pool = min(budget // page_size, CONFIG.num_layers * in_layer)
    assert counts.peak == in_pool * page_size <= max(budget, page_size)
    # What the pool does not hold leaves, once, and comes back, once. A page is written again that a tensor has
    # begun and the next one ends in: it may go and come once more where the pool is smaller than a layer.
    missing = (CONFIG.num_layers * in_layer - in_pool) * page_size
    assert counts.moved_out == missing or (in_pool < in_layer and counts.moved_out >= missing)
    assert counts.moved_in == counts.moved_out or in_pool < in_layer


def test_pages_use_a_budget_that_is_no_multiple_of_a_layer() -> None:
    budget = int(2.5 * LAYER)
    swap, paged = Swap(budget, CONFIG, TOKENS), Paged(budget, 64, CONFIG, TOKENS)
    assert_same(swap)
    assert_same(paged)
    assert paged.counts.moved_out < 0.8 * swap.counts.moved_out
    assert budget - 64 < paged.counts.peak <= budget


def test_the_layer_below_is_on_its_way_before_it_is_asked_for() -> None:
    activations = Paged(int(1.5 * LAYER), 64, CONFIG, TOKENS)
    weights, found = small.weights(CONFIG), Parameters(CONFIG)
    seen: list[tuple[int, int]] = []
    load = activations.load

    def watched(layer: int) -> Any:
        pages = activations._layers[layer].pages
        here = sum(activations.residency.device_of[page] >= 0 for page in pages)
        seen.append((layer, len(pages) - here))
        return load(layer)

    activations.load = watched  # type: ignore[method-assign]
    loss_and_gradient(weights, found, small.batch(CONFIG), activations)
    assert seen == [(layer, 0) for layer in (3, 2, 1, 0)]


def test_a_shorter_batch_after_a_longer_one() -> None:
    for activations in (Swap(LAYER, CONFIG, 100), Paged(LAYER, 60, CONFIG, 100)):
        assert_same(activations)


@pytest.mark.parametrize(
    ("memory", "budget", "page_size", "reason"),
    [
        ("page", 4095, 4096, "the budget is 4095 bytes; at least one page of 4096 bytes is needed"),
        ("page", 4096, 6, "the page size is 6 bytes; a multiple of 4 is needed"),
        ("page", 4096, 0, "the page size is 0 bytes"),
        ("page", None, 4096, "the budget is missing; page needs one"),
        ("swap", None, 4096, "the budget is missing; swap needs one"),
        ("keep", 4096, 4096, "a budget is given to keep, which has no use for it"),
        ("disk", None, 4096, "memory is 'disk'; known are keep, swap, page, recompute"),
    ],
)
def test_what_cannot_be_is_refused(memory: str, budget: int | None, page_size: int, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        activations_for(memory, CONFIG, TOKENS, budget, page_size)


def test_every_name_makes_what_it_says() -> None:
    kinds = {"keep": Keep, "swap": Swap, "page": Paged, "recompute": Recompute}
    for memory in MEMORY:
        budget = 10**6 if memory in ("swap", "page") else None
        assert type(activations_for(memory, CONFIG, TOKENS, budget)) is kinds[memory]


@pytest.mark.gpu
def test_the_memory_pool_of_a_gpu_bears_the_counts_out() -> None:
    """CuPy's own count of used bytes, at every allocation: paging saves what `counts` says it saves."""
    config = small.config(num_layers=8, hidden_size=64, intermediate_size=128, head_size=16)
    from paged_ref.training.network import PackedBatch

    class Peak(xp.cuda.MemoryHook):  # type: ignore[misc]
        name, now, most = "peak", 0, 0

        def malloc_postprocess(self, **of: int) -> None:
            self.now += of["mem_size"]
            self.most = max(self.most, self.now)

        def free_postprocess(self, **of: int) -> None:
            self.now -= of["mem_size"]

    weights, found = small.weights(config), Parameters(config)
    batch = PackedBatch.of([np.random.default_rng(0).integers(23, size=129) for _ in range(8)])
    layer = 4 * sum(map(math.prod, saved_shapes(config, 8 * 128).values()))
    peaks = {}
    for name, activations in (("keep", Keep()), ("page", Paged(2 * layer, 2**14, config, 8 * 128))):
        loss_and_gradient(weights, found, batch, activations)
        with Peak() as hook:
            loss_and_gradient(weights, found, batch, activations)
        peaks[name] = hook.most + (2 * layer if name == "page" else 0)
    assert peaks["page"] < peaks["keep"] - 4 * layer
