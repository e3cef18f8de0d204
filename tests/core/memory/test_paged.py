"""The paged manager: the paper's figures, what is refused, and where the memory went."""

from __future__ import annotations

import pytest
from support.books import books

from paged_ref.core.memory.block_pool import BlockPool, OutOfBlocks
from paged_ref.core.memory.manager import Transfer
from paged_ref.core.memory.paged import PagedManager, Table
from paged_ref.core.memory.usage import MemoryUsage


def paged(num_blocks: int, block_size: int = 4, watermark: int = 0) -> PagedManager:
    return PagedManager(BlockPool(num_blocks), block_size, watermark)


def figures() -> PagedManager:
    """The pool of the paper's figures, which hand out blocks 7, 1 and 3 first."""
    return PagedManager(BlockPool(9, [7, 1, 3, 0, 2, 4, 5, 6, 8]), 4)


def test_the_papers_figure_6() -> None:
    """Kwon et al. 2023, Fig. 6: 7 prompt tokens in blocks 7 and 1, then one token each, then block 3."""
    manager = figures()
    manager.admit(0, [0] * 7, 100)
    assert manager.append([(0, 7)]) == []
    assert manager.placement(0) == [7, 1]
    assert manager.slots(0, 0, 7) == [28, 29, 30, 31, 4, 5, 6]
    manager.append([(0, 1)])
    assert manager.placement(0) == [7, 1]
    assert manager.slots(0, 7, 1) == [7]
    manager.append([(0, 1)])
    assert manager.placement(0) == [7, 1, 3]
    assert manager.slots(0, 8, 1) == [12]


def test_the_papers_figure_8_copy_on_write() -> None:
    """Two samples share the prompt; the first to write copies its last block, the second writes in place."""
    manager = figures()
    manager.admit(1, [0] * 7, 100)
    manager.append([(1, 7)])
    manager.fork(1, 2)
    assert manager.placement(1) == manager.placement(2) == [7, 1]
    assert (manager.pool.ref_count[7], manager.pool.ref_count[1]) == (2, 2)
    assert manager.append([(1, 1)]) == [Transfer("copy", 1, 3)]
    assert manager.placement(1) == [7, 3]
    assert (manager.pool.ref_count[7], manager.pool.ref_count[1], manager.pool.ref_count[3]) == (2, 1, 1)
    assert manager.append([(2, 1)]) == []
    assert manager.placement(2) == [7, 1]
    manager.check_integrity()


def test_a_full_shared_block_is_not_copied() -> None:
    manager = paged(4)
    manager.admit(0, [0] * 4, 8)
    manager.append([(0, 4)])
    manager.fork(0, 1)
    assert manager.append([(1, 1)]) == []
    assert manager.placement(1)[0] == manager.placement(0)[0]


def test_the_last_of_several_tables_writes_its_block_in_place() -> None:
    manager = paged(4)
    manager.admit(0, [0] * 3, 8)
    manager.append([(0, 3)])
    manager.fork(0, 1)
    manager.fork(0, 2)
    transfers = manager.append([(0, 1), (1, 1), (2, 1)])
    assert transfers == [Transfer("copy", 0, 1), Transfer("copy", 0, 2)]
    assert [manager.placement(i) for i in range(3)] == [[1], [2], [0]]
    manager.check_integrity()


def test_truncate_gives_back_the_blocks_that_held_only_what_is_forgotten() -> None:
    manager = paged(4)
    manager.admit(0, [0] * 10, 12)
    manager.append([(0, 10)])
    manager.fork(0, 1)
    manager.truncate(1, 6)  # in the middle of a block that is full in the other table
    assert (manager.placement(1), manager.length(1), manager.pool.num_free) == ([0, 1], 6, 1)
    assert manager.append([(1, 1)]) == [Transfer("copy", 1, 3)]
    manager.truncate(0, 8)
    assert manager.placement(0) == [0, 1]
    manager.truncate(0, 0)
    assert (manager.placement(0), manager.pool.num_free) == ([], 2)
    manager.check_integrity()


@pytest.mark.parametrize("length", [-1, 6])
def test_truncate_refuses_a_length_that_the_sequence_does_not_have(length: int) -> None:
    manager = paged(4)
    manager.admit(0, [0] * 5, 8)
    manager.append([(0, 5)])
    with pytest.raises(ValueError, match=f"length is {length}; that of sequence 0 is 5"):
        manager.truncate(0, length)
    assert manager.length(0) == 5


def test_a_refused_append_changes_nothing() -> None:
    manager = paged(2)
    manager.admit(0, [0] * 6, 100)
    manager.append([(0, 6)])
    manager.fork(0, 1)
    before = books(manager)
    for seq_id, num_tokens in ((0, 1), (1, 2), (0, 3)):  # a copy, a copy, a copy and a new block
        with pytest.raises(OutOfBlocks, match=rf"no room for \d blocks? \(seq_id {seq_id}\): 0 available"):
            manager.append([(seq_id, num_tokens)])
        assert books(manager) == before
        assert manager.length(seq_id) == 6
    manager.check_integrity()


def test_an_append_of_several_is_all_or_none() -> None:
    manager = paged(3)
    for seq_id in range(2):
        manager.admit(seq_id, [0] * 4, 8)
        manager.append([(seq_id, 4)])
    before = books(manager)
    with pytest.raises(OutOfBlocks, match=r"no room for 2 blocks \(seq_id 0, 1\): 1 available"):
        manager.append([(0, 1), (1, 1)])
    assert books(manager) == before
    assert manager.append([(0, 1), (1, 0)]) == []


def test_a_refused_admission_changes_nothing() -> None:
    manager = paged(2)
    before = books(manager)
    with pytest.raises(OutOfBlocks, match="no room for 3 blocks: 2 available"):
        manager.admit(0, [0] * 9, 9)
    assert books(manager) == before
    manager.admit(0, [0] * 8, 8)


def test_admission_leaves_the_watermark_but_not_on_an_empty_device() -> None:
    manager = paged(4, watermark=1)
    manager.admit(0, [0] * 4, 8)
    manager.append([(0, 4)])
    with pytest.raises(OutOfBlocks, match="no room for 3 blocks: 3 available, 1 of these spare"):
        manager.admit(1, [0] * 12, 12)
    manager.admit(1, [0] * 8, 12)
    manager.append([(1, 12)])  # a running sequence may take the blocks that were spared
    manager.free(0)
    manager.free(1)
    assert manager.admit(2, [0] * 16, 16) == 0


def test_the_last_block_is_freed_first() -> None:
    """So the first block of a sequence that ended is the next one to be handed out."""
    manager = paged(4)
    manager.admit(0, [0] * 12, 12)
    manager.append([(0, 12)])
    blocks = manager.placement(0).copy()
    manager.free(0)
    assert manager.pool.free_blocks[:3] == blocks


@pytest.mark.parametrize(
    ("prompt", "longest", "n", "slots"), [(5, 9, 1, 12), (5, 9, 3, 28), (8, 9, 3, 20), (3, 4, 2, 8)]
)
def test_how_much_a_request_can_need(prompt: int, longest: int, n: int, slots: int) -> None:
    """Samples share the full blocks of their prompt."""
    assert paged(8).max_slots_needed(prompt, longest, n) == slots


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"block_size": 0}, "block_size is 0; at least 1"),
        ({"block_size": -1}, "block_size is -1; at least 1"),
        ({"num_blocks": 0}, "num_blocks is 0; at least 1"),
        ({"watermark": -1}, "watermark is -1; at least 0"),
    ],
)
def test_a_paged_manager_that_cannot_be(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        paged(**{"num_blocks": 4, **arguments})


def test_paged_wastes_only_in_last_blocks() -> None:
    manager = paged(10)
    for seq_id, length in ((0, 6), (1, 4)):
        manager.admit(seq_id, [0] * length, 20)
        manager.append([(seq_id, length)])
    usage = manager.snapshot().usage({0: 7})
    assert usage == MemoryUsage(tokens=10, reserved=1, internal=1, external=0, cached=0, free=28)
    manager.fork(0, 2)
    assert manager.snapshot().usage({0: 7}).shared == 8
    assert manager.snapshot().usage({0: 7}).total == manager.num_slots


def test_integrity_finds_a_table_of_the_wrong_size() -> None:
    manager = paged(4)
    manager.admit(0, [0] * 4, 8)
    manager.append([(0, 4)])
    manager.tables[0].length = 5
    with pytest.raises(AssertionError, match="sequence 0, length 5: 1 block"):
        manager.check_integrity()


def test_admission_leaves_what_the_scheduler_asks_for_but_not_on_an_empty_device() -> None:
    manager = paged(4, watermark=1)
    manager.admit(0, [0] * 4, 8, spare=16)
    manager.append([(0, 4)])
    with pytest.raises(OutOfBlocks, match="no room for 1 block: 3 available, 3 of these spare"):
        manager.admit(1, [0] * 4, 8, spare=9)
    manager.admit(1, [0] * 4, 8, spare=8)


def test_a_token_for_an_open_block_asks_the_pool_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 sequences decode, with blocks of 4: four need a block in each step. The manager looks closely at these."""
    manager, asked = paged(100), set()
    real = PagedManager.writes_shared_block

    def counted(self: PagedManager, table: Table, count: int) -> bool:
        asked.add(id(table))
        return real(self, table, count)

    for seq_id in range(16):
        manager.admit(seq_id, [0] * (1 + seq_id), 40)
        manager.append([(seq_id, 1 + seq_id)])
    monkeypatch.setattr(PagedManager, "writes_shared_block", counted)
    for _ in range(8):
        asked.clear()
        free = manager.pool.num_free
        manager.append([(seq_id, 1) for seq_id in range(16)])
        assert (free - manager.pool.num_free, len(asked)) == (4, 4)
    manager.check_integrity()


def test_a_last_block_that_came_to_be_shared_is_not_open() -> None:
    manager = paged(4)
    manager.admit(0, [0] * 5, 8)
    manager.append([(0, 5)])
    manager.fork(0, 1)
    manager.append([(1, 0)])  # nothing: no block is copied, and none is opened
    assert manager.append([(0, 1), (1, 1)]) == [Transfer("copy", 1, 2)]
    manager.pool.share(1)
    with pytest.raises(AssertionError, match="sequence 1 would write into block 1, which is shared"):
        manager.check_integrity()
