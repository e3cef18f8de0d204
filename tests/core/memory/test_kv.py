"""The K and V themselves: transfers in their order, slots that start as NaN, one memory with and without blocks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from paged_ref.core.attention.attention import Addresses
from paged_ref.core.device import to_host, xp
from paged_ref.core.engine.scheduler import StepPlan
from paged_ref.core.memory.kv import KVCache
from paged_ref.core.memory.manager import Transfer
from paged_ref.core.model.llama import StepInputs


def numbered(num_blocks: int = 8, block_size: int = 1, num_host_blocks: int = 0) -> tuple[KVCache, np.ndarray]:
    """A cache in which no two numbers are alike, and what it holds."""
    kv = KVCache(2, num_blocks, block_size, 1, 2, "float32", num_host_blocks, backend="reference")
    before = np.arange(kv.device.size, dtype=np.float32).reshape(kv.device.shape)
    kv.device[:] = xp.asarray(before)
    return kv, before


def test_every_slot_starts_as_nan() -> None:
    kv = KVCache(2, 3, 4, 1, 2, "float16", num_host_blocks=2)
    assert (kv.device.shape, kv.host.shape) == ((2, 2, 3, 4, 1, 2), (2, 2, 2, 4, 1, 2))
    assert np.isnan(to_host(kv.device)).all()
    assert np.isnan(kv.host).all()
    assert kv.device.dtype == kv.host.dtype == np.float16


def test_blocks_and_slots_are_the_same_memory() -> None:
    kv, before = numbered(3, 4)
    for layer in range(2):
        for which in range(2):
            np.testing.assert_array_equal(to_host(kv.layers[layer][which]), before[layer, which])
            np.testing.assert_array_equal(to_host(kv.slots[layer][which]), before[layer, which].reshape(12, 1, 2))
    kv.slots[1][0][7] = -1
    assert (to_host(kv.device)[1, 0, 1, 3] == -1).all()


@pytest.mark.parametrize(("source", "destination"), [(2, 0), (0, 2), (1, 0), (0, 3)])
def test_rows_move_onto_their_own_place(source: int, destination: int) -> None:
    kv, before = numbered()
    kv.apply([Transfer("move", source, destination, 5)])
    after = to_host(kv.device)
    assert np.array_equal(after[:, :, destination : destination + 5], before[:, :, source : source + 5])


def test_transfers_find_what_the_ones_before_them_left() -> None:
    kv, before = numbered(6, 2, num_host_blocks=3)
    kv.apply([
        Transfer("copy", 0, 1), Transfer("copy", 1, 2),  # 2 gets what 1 got
        Transfer("swap_out", 3, 0, 2), Transfer("copy", 5, 3),  # the host has 3 as it was before
        Transfer("swap_in", 1, 5), Transfer("swap_out", 5, 2),
    ])  # fmt: skip
    after = to_host(kv.device)
    for block, source in ((0, 0), (1, 0), (2, 0), (3, 5), (4, 4), (5, 4)):
        np.testing.assert_array_equal(after[:, :, block], before[:, :, source])
    np.testing.assert_array_equal(kv.host, before[:, :, [3, 4, 4]])


@pytest.mark.parametrize("kind", ["copy", "move"])
def test_a_chain_of_transfers_of_one_kind(kind: Any) -> None:
    """No manager makes one: each reads what the one before it wrote, so they cannot be one batch."""
    kv, before = numbered(5)
    kv.apply([Transfer(kind, 0, 1), Transfer(kind, 1, 2), Transfer(kind, 4, 1), Transfer(kind, 2, 3)])
    after = to_host(kv.device)
    for block, source in ((0, 0), (1, 4), (2, 0), (3, 0), (4, 4)):
        np.testing.assert_array_equal(after[:, :, block], before[:, :, source])


@pytest.mark.parametrize("seed", range(20))
def test_batches_leave_what_one_transfer_after_another_leaves(seed: int) -> None:
    rng = np.random.default_rng(seed)
    kv, device = numbered(8, 2, num_host_blocks=8)
    host = kv.host.copy()
    transfers = []
    for _ in range(12):
        count = int(rng.integers(1, 4))
        source, destination = (int(i) for i in rng.integers(0, 9 - count, 2))
        kind = str(rng.choice(["copy", "move", "swap_out", "swap_in"]))
        transfers.append(Transfer(kind, source, destination, count))  # type: ignore[arg-type]
        read, written = (host if kind == "swap_in" else device), (host if kind == "swap_out" else device)
        written[:, :, destination : destination + count] = read[:, :, source : source + count].copy()
    kv.apply(transfers)
    np.testing.assert_array_equal(to_host(kv.device), device)
    np.testing.assert_array_equal(kv.host, host)


def inputs(slot: int, block: int) -> StepInputs:
    """One token, the second of its sequence."""
    one = np.array([0], np.int32)
    addresses = Addresses(one + 2, np.array([0, 1], np.int32), one[None] + block, slot_mapping=one + slot)
    return StepInputs(one, one + 1, one, addresses)


@pytest.mark.parametrize(
    ("slot", "block", "message"), [(12, 0, "slot_mapping holds 12"), (1, 3, "block_tables.* is 3")]
)
def test_a_step_with_an_address_outside_the_cache_is_refused_before_anything_moves(
    slot: int, block: int, message: str
) -> None:
    kv, before = numbered(3, 4)
    with pytest.raises(ValueError, match=message):
        kv.begin_step(StepPlan(transfers=[Transfer("copy", 0, 1)]), inputs(slot, block))
    np.testing.assert_array_equal(to_host(kv.device), before)
    kv.begin_step(StepPlan(transfers=[Transfer("copy", 0, 1)]), inputs(1, 0))
    np.testing.assert_array_equal(to_host(kv.device)[:, :, 1], before[:, :, 0])


def test_attend_writes_first_and_then_sees_what_it_wrote() -> None:
    kv, before = numbered(3, 4)
    rng = np.random.default_rng(0)
    query, key, value = (xp.asarray(rng.standard_normal((1, heads, 2)), dtype=np.float32) for heads in (2, 1, 1))
    step = inputs(9, 2)  # position 1 in block 2
    where = Addresses(*(None if a is None else xp.asarray(a) for a in (
        step.addresses.seq_lens, step.addresses.query_start_loc, step.addresses.block_tables, None,
        step.addresses.slot_mapping,
    )))  # fmt: skip
    out = to_host(kv.attend(1, query, key, value, where, None))
    keys, values = (np.stack([before[1, i, 2, 0, 0], to_host(new)[0, 0]]) for i, new in ((0, key), (1, value)))
    scores = to_host(query)[0] @ keys.T / np.sqrt(2)
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    np.testing.assert_allclose(out[0], weights / weights.sum(axis=1, keepdims=True) @ values, rtol=1e-5)
    after = to_host(kv.device)
    np.testing.assert_array_equal(after[1, 0, 2, 1, 0], to_host(key)[0, 0])
    np.testing.assert_array_equal(after[0], before[0])  # the other layer
