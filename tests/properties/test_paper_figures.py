"""The worked examples of Kwon et al. 2023, Figs. 6 to 9, step by step: tables, counts, copies and contents."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from conftest import SHARED
from support.manager_state import replay, state_of
from support.shadow import ShadowMemory

from paged_ref.core.memory.block_pool import BlockPool
from paged_ref.core.memory.manager import Transfer
from paged_ref.core.memory.paged import PagedManager
from paged_ref.timeline.events import Event, SequenceFreed, TokensAppended
from paged_ref.timeline.logged import LoggedManager

FIGURES = SHARED / "paper" / "vllm_paper_figs_6_7_8_9.json"
BLOCK_SIZE = 4
NUM_DRAWN = 9  # physical blocks in Figs. 6 to 8


@pytest.fixture(scope="module")
def figures() -> dict[str, Any]:
    if not FIGURES.is_file():
        pytest.skip(f"no ../shared/paper/{FIGURES.name} beside the project")
    facts: dict[str, Any] = json.loads(FIGURES.read_text(encoding="utf-8"))
    assert facts["block_size"] == BLOCK_SIZE
    return facts


class Paper:
    """A manager whose free list gives the paper's block numbers, and the words that lie in its slots."""

    def __init__(self, first: Sequence[int], num_blocks: int = NUM_DRAWN) -> None:
        """`first` are the blocks that the figure hands out, in order; the others come after them."""
        self.events: list[Event] = []
        order = [*first, *(block for block in range(num_blocks) if block not in first)]
        self.pool = BlockPool(num_blocks, order)
        bare = PagedManager(self.pool, BLOCK_SIZE)
        self.manager = LoggedManager(bare, self.events.append)
        self.memory = ShadowMemory(bare)

    def admit(self, seq_id: int, num_tokens: int) -> None:
        assert self.manager.admit(seq_id, [0] * num_tokens, 100) == 0

    def write(self, seq_id: int, words: Sequence[str]) -> list[Transfer]:
        """One step of a sequence: room, copies, then its words."""
        first = self.manager.length(seq_id)
        transfers = self.manager.append([(seq_id, len(words))])
        self.memory.follow(transfers)
        self.memory.write(seq_id, first, words)
        self.manager.check_integrity()
        assert replay(self.events) == state_of(self.manager)
        return transfers

    def table(self, seq_id: int) -> list[list[int]]:
        """As the paper draws it: a row [physical block, number filled] for each logical block."""
        length = self.manager.length(seq_id)
        return [
            [block, min(BLOCK_SIZE, length - logical * BLOCK_SIZE)]
            for logical, block in enumerate(self.manager.placement(seq_id))
        ]

    def new_blocks(self) -> list[int]:
        """What the last append took from the free list, beside copies."""
        appended = self.events[-1]
        assert isinstance(appended, TokensAppended)
        return list(appended.new_blocks)

    def contents(self, block: int) -> list[str]:
        """The words of a block, as far as it was written."""
        words = self.memory.device[block * BLOCK_SIZE : (block + 1) * BLOCK_SIZE]
        return [word for word in words if word is not None]

    def ref_counts(self) -> dict[str, int]:
        """Of the blocks in use, keyed as in the JSON."""
        return {str(block): count for block, count in enumerate(self.pool.ref_count) if count}


def test_figure_6_a_prompt_and_two_tokens_through_a_block_table(figures: dict[str, Any]) -> None:
    figure = figures["fig6"]
    prompt, outputs = figure["prompt"], figure["outputs"]
    assert figure["n_physical_blocks_drawn"] == NUM_DRAWN
    paper = Paper([7, 1, 3])
    paper.admit(0, len(prompt))
    written = 0
    for step, words in zip(figure["steps"], [prompt, outputs[:1], outputs[1:]], strict=True):
        assert paper.write(0, words) == []
        assert paper.table(0) == step["block_table"]
        assert paper.new_blocks() == step["newly_allocated"]
        assert paper.manager.slots(0, written, len(words)) == step["slots_written_derived"]
        written += len(words)
        assert paper.pool.num_free == NUM_DRAWN - len(step["block_table"])
        if "attends_physical_blocks" in step:
            assert paper.manager.placement(0) == step["attends_physical_blocks"]
    for block, words in figure["physical_final"].items():
        assert paper.contents(int(block)) == words
    assert paper.ref_counts() == {"7": 1, "1": 1, "3": 1}
    paper.manager.free(0)
    assert paper.pool.num_free == NUM_DRAWN


@pytest.mark.parametrize(
    ("order", "turns"),
    [
        ([7, 1, 5, 3, 2], "AaBabb"),  # both prompts, then by turns
        ([7, 1, 3, 5, 2], "AaaBbb"),  # A to its end, then B
    ],
)
def test_figure_7_two_requests_at_the_same_time(figures: dict[str, Any], order: list[int], turns: str) -> None:
    """The paper gives the final state only: whichever came first, the tables and the free blocks come out.

    A capital letter is a prompt (7 words of A, 4 of B), a small one is one more word.
    """
    figure = figures["fig7"]
    paper = Paper(order)
    words = {0: figure["A"]["tokens"], 1: figure["B"]["tokens"]}
    for turn in turns:
        seq_id = "AB".index(turn.upper())
        if turn.isupper():
            first, count = 0, (7, 4)[seq_id]
            paper.admit(seq_id, count)
        else:
            first, count = paper.manager.length(seq_id), 1
        paper.write(seq_id, words[seq_id][first : first + count])
    assert paper.table(0) == figure["A"]["block_table"]
    assert paper.table(1) == figure["B"]["block_table"]
    assert sorted(paper.pool.free_blocks) == figure["free_physical"]
    for seq_id, its_words in words.items():
        assert paper.memory.read(seq_id, len(its_words)) == its_words
    paper.manager.free(0)  # its blocks may go to the next request, and B keeps its own
    assert sorted(paper.pool.free_blocks) == sorted([*figure["free_physical"], 7, 1, 3])
    assert paper.memory.read(1, len(words[1])) == words[1]


def test_figure_8_two_samples_and_a_copy_on_write(figures: dict[str, Any]) -> None:
    figure = figures["fig8"]
    prompt = figure["prompt"]
    paper = Paper([7, 1, 3])
    paper.admit(1, len(prompt))
    paper.write(1, prompt)
    paper.manager.fork(1, 2)
    shared, first_writes, second_writes = figure["steps"]

    def check(step: dict[str, Any]) -> None:
        assert paper.manager.placement(1) == step["A1"]
        assert paper.manager.placement(2) == step["A2"]
        assert paper.ref_counts() == step["ref"]
        assert paper.pool.num_free == NUM_DRAWN - len(step["ref"])

    check(shared)
    assert paper.manager.snapshot().shared == 2 * BLOCK_SIZE
    for seq_id, word, step in ((1, "fathers", first_writes), (2, "mothers", second_writes)):
        copies = paper.write(seq_id, [word])
        assert [transfer.kind for transfer in copies] == ["copy"] * len(copies)
        assert [[transfer.source, transfer.destination] for transfer in copies] == step["copies"]
        assert paper.new_blocks() == []  # a copy is not one more block of the sequence
        check(step)
    for block, words in figure["physical_final"].items():
        assert paper.contents(int(block)) == words
    assert paper.memory.read(1, 8) == [*prompt, "fathers"]
    assert paper.memory.read(2, 8) == [*prompt, "mothers"]
    paper.manager.free(1)
    assert paper.ref_counts() == {"7": 1, "1": 1}
    paper.manager.free(2)
    assert paper.ref_counts() == {}


def beams_before(paper: Paper) -> None:
    """The four beams of Fig. 9 before the event, as forks and whole blocks would have made them."""
    paper.admit(0, BLOCK_SIZE)

    def whole_block(seq_id: int) -> None:
        logical = len(paper.manager.placement(seq_id))
        assert paper.write(seq_id, [f"c{seq_id} {logical}.{offset}" for offset in range(BLOCK_SIZE)]) == []

    whole_block(0)
    paper.manager.fork(0, 3)  # c3 leaves the others after the first block
    for seq_id in (0, 3, 0, 3):
        whole_block(seq_id)
    paper.manager.fork(0, 1)
    paper.manager.fork(0, 2)
    for seq_id in range(4):
        whole_block(seq_id)


def test_figure_9_four_beams_go_on_from_two(figures: dict[str, Any]) -> None:
    figure = figures["fig9"]
    paper = Paper([], num_blocks=13)
    manager = paper.manager
    beams_before(paper)
    assert {f"c{seq_id}": manager.placement(seq_id) for seq_id in range(4)} == figure["before"]
    assert paper.ref_counts() == figure["ref_before_derived"]
    assert paper.pool.free_blocks == figure["newly_allocated"]

    words = {seq_id: paper.memory.read(seq_id, 4 * BLOCK_SIZE) for seq_id in (1, 2)}
    parents = [1, 1, 2, 2]  # "top-4 new candidates all come from old c1 and c2"
    for child, parent in enumerate(parents, start=10):
        manager.fork(parent, child)
    new = []
    for child in range(10, 14):
        assert paper.write(child, [f"new {child}"]) == []  # the last blocks are full: nothing to copy
        new += paper.new_blocks()
    assert new == figure["newly_allocated"]
    assert paper.pool.num_free == 0

    for old in range(4):
        manager.free(old)
    assert sorted(paper.pool.free_blocks) == figure["freed"]
    after = [manager.placement(child) for child in range(10, 14)]
    assert after == list(figure["after"].values())
    assert paper.ref_counts() == figure["ref_after_derived"]
    for child, parent in enumerate(parents, start=10):
        assert paper.memory.read(child, 4 * BLOCK_SIZE + 1) == [*words[parent], f"new {child}"]
    # Of 20 rows of four tables, 9 blocks hold all.
    assert manager.snapshot().shared == (20 - 9) * BLOCK_SIZE
    assert replay(paper.events) == state_of(manager)


def test_figure_9_in_the_engines_order_frees_first_and_needs_no_new_block(figures: dict[str, Any]) -> None:
    """The engine lets a parent go on as its first child, and frees dropped beams before it appends.

    The beams share the same blocks as in the figure; the four new blocks are those that the dropped beams gave back.
    """
    figure = figures["fig9"]
    paper = Paper([], num_blocks=9)  # the nine blocks of the state before are all there is
    manager = paper.manager
    beams_before(paper)
    assert paper.pool.num_free == 0
    manager.fork(1, 10)
    manager.fork(2, 11)
    for dropped in (0, 3):
        manager.free(dropped)
    assert sorted(paper.pool.free_blocks) == figure["freed"]
    assert sum(isinstance(event, SequenceFreed) for event in paper.events) == 2
    beams = (1, 10, 2, 11)
    for seq_id in beams:
        assert paper.write(seq_id, ["new"]) == []
    tables = [manager.placement(seq_id) for seq_id in beams]
    assert sorted(table[-1] for table in tables) == figure["freed"]
    name = dict(zip([table[-1] for table in tables], figure["newly_allocated"], strict=True))
    assert [[name.get(block, block) for block in table] for table in tables] == list(figure["after"].values())
    renamed = {str(name.get(int(block), int(block))): count for block, count in paper.ref_counts().items()}
    assert renamed == figure["ref_after_derived"]
