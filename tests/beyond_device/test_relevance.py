"""Relevance: the bound is never below a true score, and what is planted far back is found."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from paged_ref.beyond_device.kv import StreamedKV
from paged_ref.beyond_device.observation import Observation
from paged_ref.beyond_device.options import LongOptions
from paged_ref.beyond_device.relevance import Attend, Extremes, budget_of, check_attend, choose, shares
from paged_ref.core.device import to_host, xp
from paged_ref.core.engine.scheduler import StepPlan
from paged_ref.core.engine.sequence import Sequence
from paged_ref.core.model.config import ModelConfig

QUICK = settings(max_examples=60, deadline=None, derandomize=True, database=None)
# Numbers of which float32 products and sums are exact, so that the bound has no rounding to hide behind.
WHOLE = st.integers(-50, 50)


@QUICK
@given(data=st.data(), block_size=st.integers(1, 5), heads=st.integers(1, 2), group=st.integers(1, 3))
def test_no_key_scores_higher_than_the_bound_of_its_block(
    data: st.DataObject, block_size: int, heads: int, group: int
) -> None:
    """Keys come in any chunks; the bound holds after each, and some key of the block may reach it."""
    head_size, seen = 3, np.empty((0, heads, 3), dtype=np.float32)
    extremes = Extremes(heads, head_size, block_size)
    for _ in range(data.draw(st.integers(1, 5))):
        shape = (data.draw(st.integers(1, 7)), heads, head_size)
        keys = data.draw(arrays(np.float32, shape, elements=WHOLE.map(float)))
        extremes.write(len(seen), xp.asarray(keys))
        seen = np.concatenate([seen, keys])
        query = data.draw(arrays(np.float32, (heads, group, head_size), elements=WHOLE.map(float)))
        bounds = to_host(extremes.bounds(xp.asarray(query)))
        assert bounds.shape == (heads, group, -(-len(seen) // block_size))
        scores = np.einsum("hgd,khd->hgk", query, seen)
        for block in range(bounds.shape[2]):
            inside = scores[:, :, block * block_size : (block + 1) * block_size]
            assert (bounds[:, :, block] >= inside.max(axis=-1)).all()
            if inside.shape[2] == 1:
                assert (bounds[:, :, block] == inside[:, :, 0]).all()


@QUICK
@given(rows=st.integers(1, 3), num_blocks=st.integers(1, 40), budget=st.integers(1, 45), seed=st.integers(0, 99))
def test_the_best_are_chosen_and_always_the_last_and_the_first(
    rows: int, num_blocks: int, budget: int, seed: int
) -> None:
    scores = np.random.default_rng(seed).random((rows, num_blocks))
    chosen = choose(scores, budget)
    assert chosen.shape == (rows, min(budget, num_blocks))
    for row, blocks in zip(scores, chosen, strict=True):
        assert (np.diff(blocks) > 0).all()
        assert blocks[-1] == num_blocks - 1
        assert budget == 1 or blocks[0] == 0
        left = np.setdiff1d(np.arange(num_blocks), blocks)
        free = blocks[1:-2]  # of the others, none that was left scores higher
        assert not left.size or not free.size or row[left].max() <= row[free].min()


def test_shares_sum_to_one_and_a_sure_head_outvotes_one_that_does_not_care() -> None:
    bounds = np.array([[[0.0, 0, 20, 0], [3.0, 3, 3, 3.1]]], dtype=np.float32)
    found = shares(xp.asarray(bounds), 1.0)
    np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-6)
    assert found.argmax() == 2


@pytest.mark.parametrize(("attend", "budget"), [("all", 40), (1, 1), (7, 7), (99, 40), (0.05, 2), (0.06, 3), (1.0, 40)])
def test_a_budget_is_in_blocks_or_a_share_of_them_rounded_up(attend: Attend, budget: int) -> None:
    check_attend(attend)
    assert budget_of(attend, 40) == budget


@pytest.mark.parametrize("attend", [0, -1, 0.0, 1.01, "most", True, float("nan")])
def test_budgets_that_cannot_be(attend: Attend) -> None:
    with pytest.raises(ValueError, match=r"attend is .*; 'all', a budget of at least 1 block, or a share"):
        check_attend(attend)


# --- a needle ------------------------------------------------------------------------------------------

HEAD_SIZE, BLOCK_SIZE, TOKENS, NEEDLE = 16, 16, 3200, 1003
SHARPNESS = 16.0  # the needle's score; all others score exactly 0, so the weights are known


def needle(attend: Attend) -> tuple[float, Observation, StreamedKV]:
    """One layer of one head: 3200 keys of noise that is orthogonal to the query, and one that is not, far back. Its
    value is 1, all others are 0, so the output is the weight that attention gave to it."""
    config = ModelConfig(
        vocab_size=1, hidden_size=HEAD_SIZE, intermediate_size=1, num_layers=1, num_heads=1, num_kv_heads=1,
        head_size=HEAD_SIZE, max_position_embeddings=TOKENS,
    )  # fmt: skip
    options = LongOptions(device_blocks=20, host_blocks=200, attend=attend, full_layers=0)
    manager, kv = options.make(config, BLOCK_SIZE, "float32", TOKENS, "auto", False, None)
    keys = np.random.default_rng(0).standard_normal((TOKENS, 1, HEAD_SIZE)).astype(np.float32)
    keys[:, :, 0] = 0
    values = np.zeros_like(keys)
    keys[NEEDLE], values[NEEDLE] = 0, 1
    keys[NEEDLE, 0, 0] = SHARPNESS
    query = np.zeros((1, 1, HEAD_SIZE), dtype=np.float32)
    query[0, 0, 0] = HEAD_SIZE**0.5  # the scale takes it away again
    seen: list[Observation] = []
    seq = Sequence(0, [0] * TOKENS, TOKENS, TOKENS)
    manager.admit(0, [0] * TOKENS, TOKENS)
    out = None
    for first, count in ((0, TOKENS - 1), (TOKENS - 1, 1)):
        manager.append([(0, count)])
        seq.num_computed = first
        kv.begin_step(StepPlan([(seq, count)]))
        new = (xp.asarray(keys[first : first + count]), xp.asarray(values[first : first + count]))
        if count == 1:
            kv.observe = seen.append
            out = kv.attend(0, xp.asarray(query), *new, None, None)
        else:
            kv.write(0, *new)
    assert out is not None
    manager.check_integrity()
    return float(to_host(out)[0, 0, 0]), seen[0], kv


def test_relevance_finds_a_needle_at_5_percent_where_the_most_recent_do_not() -> None:
    budget = 0.05
    num_chosen = budget_of(budget, TOKENS // BLOCK_SIZE)
    assert num_chosen == 10
    exact, _, _ = needle("all")
    weight = np.exp(SHARPNESS) / (np.exp(SHARPNESS) + TOKENS - 1)
    assert exact == pytest.approx(weight, rel=1e-5)

    found, seen, kv = needle(budget)
    chosen = seen.chosen[0]
    assert NEEDLE // BLOCK_SIZE in chosen
    assert len(chosen) == num_chosen
    among = np.exp(SHARPNESS) / (np.exp(SHARPNESS) + num_chosen * BLOCK_SIZE - 1)
    assert found == pytest.approx(among, rel=1e-5)
    residency = kv.manager.residency
    table = kv.manager.tables[0].pages[0][0]
    assert residency.device_of[table[NEEDLE // BLOCK_SIZE]] >= 0  # and it stays for the next token

    recent = np.arange(TOKENS // BLOCK_SIZE)[-num_chosen:]
    assert seen.mass[0, 0, chosen].sum() > 0.999
    assert seen.mass[0, 0, recent].sum() < 1e-4


@pytest.mark.parametrize("name", ["tiny", "stories260k"])
def test_on_real_checkpoints_relevance_is_near_the_best_choice(name: str, request: pytest.FixtureRequest) -> None:
    """The table of `paged-ref long --recall`, on fewer tokens."""
    from paged_ref.commands.long_recall import BUDGETS, recall
    from paged_ref.commands.long_text import text_of

    model = name if name == "tiny" else str(request.getfixturevalue("stories260k"))
    found = recall(model, text_of(model, None, 1200), new_tokens=6, block_size=16)
    for budget in BUDGETS:
        by = {choice: found[budget, choice] for choice in ("oracle", "relevance", "random", "recent")}
        assert by["oracle"] >= by["relevance"] - 1e-6
        assert by["relevance"] > by["random"]
        # A model that looks mostly at its last words loses little by recency, as long as the budget is tiny.
        assert by["relevance"] > by["recent"] - 0.02 if budget > 0.05 else by["relevance"] > 0.9 * by["recent"]
        assert by["relevance"] >= 0.6 * by["oracle"]
    assert [found[b, "relevance"] for b in BUDGETS] == sorted(found[b, "relevance"] for b in BUDGETS)
