"""The pools of several ranks beside the one table."""

from __future__ import annotations

from typing import Any

import pytest

from paged_ref import LLM, SamplingParams
from paged_ref.lesson.rank_threads import threads
from paged_ref.timeline.events import Event, PoolOpened, RanksOpened
from paged_ref.timeline.history import History, histories
from paged_ref.views.viz.frames.screen import screen
from paged_ref.views.viz.narration import narrate
from paged_ref.views.viz.scene import Scene


@pytest.fixture(scope="module")
def run() -> History:
    events: list[Event] = []

    def make(group: Any) -> LLM:
        log = None if group.rank else events.append
        return LLM("tiny", backend="reference", block_size=4, kv_cache_tokens=40, group=group, log=log)

    with threads(2, make) as llms:
        llms[0].generate(["Once upon a time", "The dog"], SamplingParams(max_tokens=6, ignore_eos=True))
    (history,) = histories(events)
    return history


def shown(run: History, position: int, width: int, height: int) -> list[str]:
    scene = Scene(run.moment(position), [run], hints=False)
    return screen(scene, 0, width, height).plain.split("\n")


def test_each_rank_has_a_column_of_the_same_blocks(run: History) -> None:
    rows = shown(run, run.step_positions[1], 110, 30)
    (head,) = (row for row in rows if "rank 0: heads 0-1, KV 0" in row)
    assert "rank 1: heads 2-3, KV 1" in head
    (block,) = (row for row in rows if "Once" in row and "│" in row)
    assert block.count("│Once  │·upon │·a    │·time │") == 2  # the same tokens, in both pools


def test_where_there_is_little_room_the_head_is_short(run: History) -> None:
    rows = shown(run, run.step_positions[1], 60, 16)
    assert any("rank 0" in row and "rank 1" in row for row in rows)
    assert all(len(row) <= 60 for row in rows)


def test_the_first_events_say_which_rank_holds_which_heads(run: History) -> None:
    position = next(i for i, event in enumerate(run.events) if isinstance(event, RanksOpened))
    assert narrate(run.moment(position)) == (
        "2 ranks share the model: rank 0 holds heads 0-1 with KV head 0 and rank 1 holds heads 2-3 with KV head 1. "
        "Each has a pool with the same blocks, and one block table says for all of them where a token lies."
    )


@pytest.mark.parametrize(("heads", "kv_heads"), [((), ()), (((0, 1), (1, 2)), ((0, 1),))])
def test_a_log_whose_ranks_do_not_agree_is_refused(heads: Any, kv_heads: Any) -> None:
    events = [PoolOpened("paged", 4, 4, 0, (0, 1, 2, 3)), RanksOpened(heads, kv_heads)]
    with pytest.raises(ValueError, match=f"ranks with heads: {len(heads)}; with KV heads: {len(kv_heads)}"):
        histories(events)


def test_more_ranks_than_columns() -> None:
    held = tuple((rank, rank + 1) for rank in range(16))
    (run,) = histories([PoolOpened("paged", 4, 4, 0, (0, 1, 2, 3)), RanksOpened(held, held)])
    rows = shown(run, 1, 80, 24)
    assert any("ranks more" in row for row in rows)
