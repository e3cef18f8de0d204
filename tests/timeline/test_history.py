"""The timeline of a log: every point of it equals what the managers held, at a bounded cost."""

from __future__ import annotations

import contextlib
import json
import random
from pathlib import Path
from typing import Any

import pytest
from support.logged_managers import logged_paged
from support.manager_state import state_of

from paged_ref import LLM, SamplingParams
from paged_ref.core.memory.block_pool import OutOfBlocks
from paged_ref.core.memory.usage import MemoryUsage
from paged_ref.extras import memory_limit
from paged_ref.extras.step_records import StepRecord
from paged_ref.timeline.events import Event, ModelOpened, StepTimed, TokenNamed, to_json, write_events
from paged_ref.timeline.history import History, histories, letters, read_histories
from paged_ref.timeline.marks import MARKS
from paged_ref.timeline.memory_state import MemoryState
from paged_ref.timeline.state import RunState
from paged_ref.views.viz.viz_run import PAPER

# --- the replay property ---------------------------------------------------------------------------------

SETUPS: list[dict[str, Any]] = [
    {"manager": "paged", "prefix_cache": True, "preemption": "swap", "host_kv_tokens": 32},
    {"manager": "paged", "preemption": "recompute"},
    {"manager": "paged", "prefix_cache": True, "max_batch_tokens": 5},
    {"manager": "standard"},
    {"manager": "standard", "reserve": "pow2"},
    {"manager": "standard", "reserve": "exact"},
    {"manager": "swapping", "host_kv_tokens": 48},
]


@pytest.mark.parametrize("setup", SETUPS, ids=lambda setup: "-".join(map(str, setup.values())))
def test_every_state_shown_is_the_managers_own(setup: dict[str, Any]) -> None:
    events: list[Event] = []
    seen: list[tuple[int, MemoryState, dict[int, list[int]]]] = []
    records: list[StepRecord] = []
    llm = LLM(
        "tiny",
        block_size=4,
        kv_cache_tokens=40,
        max_model_len=24,
        log=events.append,
        on_step=records.append,
        **setup,
    )
    coming = list(PAPER.arrivals)
    if setup["manager"] == "paged":
        coming.append((14, "The cat", SamplingParams(max_tokens=6, beam_width=3)))
    outputs, step = [], 0
    while coming or llm.has_unfinished:
        while coming and coming[0][0] <= step:
            outputs.append(llm.output_of(llm.add_request(coming[0][1], coming.pop(0)[2])))
        llm.step()
        step += 1
        shown = sum(not isinstance(event, (ModelOpened, StepTimed, TokenNamed)) for event in events)
        groups = [*llm.engine.scheduler.running, *llm.engine.scheduler.waiting]
        tokens = {seq.seq_id: seq.tokens.copy() for group in groups for seq in group.seqs}
        seen.append((shown - 1, state_of(llm.engine.manager), tokens))
    (run,) = histories(events)
    order = [*range(len(seen)), *reversed(range(len(seen))), *random.Random(0).sample(range(len(seen)), len(seen))]
    for i in order:
        position, memory, tokens = seen[i]
        state = run.moment(position).state
        assert state.memory == memory
        assert {seq_id: state.sequences[seq_id].tokens for seq_id in tokens} == tokens
        assert set(tokens) <= {s for s, view in state.sequences.items() if view.status != "finished"}
    # Finished sequences keep their tokens: the outputs, to the last id.
    end = run.moment(len(run)).state
    for output in outputs:
        if output.outputs[0].score is None:
            members = [view for view in end.sequences.values() if view.request_id == output.request_id]
            assert [v.tokens[v.prompt_len :] for v in members] == [sample.token_ids for sample in output.outputs]
    # The parts of memory are those of the managers' own snapshots, wherever a request waits.
    assert len(records) == len(run.steps)
    compared = 0
    for i, record in enumerate(records):
        if record.num_waiting or setup["manager"] == "paged":
            assert run.usage_of_step(i) == record.snapshot.usage(run.final_lengths)
            assert run.moment(run.step_positions[i]).usage == run.usage_of_step(i)
            compared += 1
    assert compared > 3


def test_forwards_and_backwards_is_the_same(runs: list[History]) -> None:
    for run in runs:
        forwards = [run.moment(i).state.copy() for i in range(len(run))]
        changes = [run.moment(i).change for i in range(len(run))]
        for i in reversed(range(len(run))):
            assert run.moment(i).state == forwards[i]
            assert run.moment(i).change == changes[i]
        assert run.moment(-5).position == 0
        assert run.moment(10**9).position == len(run) - 1


def test_the_example_makes_the_pool_work(runs: list[History]) -> None:
    """A fork, a copy on write, prefix hits, evictions, swaps out and back: a picture of each can be made."""
    paged = runs[0]
    assert {mark for _, mark in paged.marks} == {"F", "C", "H", "E", "S", "R", "N"}
    totals = paged.moment(len(paged)).state.totals
    assert totals.rows_out == totals.rows_in > 0
    assert totals.hits >= 8  # tokens: two blocks
    assert {mark for run in runs for _, mark in run.marks} <= set(MARKS)
    # Figure 6 of the paper: the first request begins in blocks 7 and 1, and opens block 3.
    first = [place.blocks.copy() for i in range(20) if (place := paged.moment(i).state.memory.sequences.get(0))]
    assert [7, 1] in first
    assert [7, 1, 3] in first
    # The same requests, the same tokens, whichever manager is used.
    ends = [run.moment(len(run)).state.sequences for run in runs]
    assert len({tuple(tuple(view.tokens) for _, view in sorted(end.items())) for end in ends}) == 1


# --- cost --------------------------------------------------------------------------------------------------


def busy_log(num_events: int, num_blocks: int = 1000) -> list[Event]:
    """Random operations on a real manager."""
    rng = random.Random(0)
    events: list[Event] = []
    manager = logged_paged(events.append, num_blocks, 16, num_host_blocks=100, prefix_cache=True)
    live: dict[int, list[int]] = {}
    next_id = 0
    while len(events) < num_events:
        try:
            if rng.random() < 0.05 or not live:
                tokens = [rng.randrange(3) for _ in range(rng.randrange(1, 200))]
                known = manager.admit(next_id, tokens, 2000)
                live[next_id] = tokens
                next_id += 1
                manager.append([(next_id - 1, len(tokens) - known)])
                manager.commit(next_id - 1, tokens, len(tokens))
            elif len(live) > 40:
                seq_id = rng.choice(list(live))
                manager.free(seq_id)
                del live[seq_id]
            else:
                seq_id = rng.choice(list(live))
                manager.append([(seq_id, 1)])
                live[seq_id].append(1)
        except OutOfBlocks:
            seq_id = max(live)
            manager.free(seq_id)
            del live[seq_id]
    return events[:num_events]


def test_a_step_in_a_long_log_applies_few_events() -> None:
    run = History.of(enumerate(busy_log(40_000), start=1))
    assert len(run) == 40_000
    assert len(run._checkpoints) <= run.max_checkpoints
    rng = random.Random(1)
    for position in [0, 39_999, 39_998, 20_000, *(rng.randrange(40_000) for _ in range(40))]:
        before = run.num_applied
        run.moment(position)
        assert run.num_applied - before <= run.interval + 1
        forward = run.num_applied
        run.moment(position + 1)
        assert run.num_applied - forward <= 1
        run.moment(position + 1)  # drawn again, as after a resize
        assert run.num_applied - forward <= 1
    assert run.interval <= 2048


def test_checkpoints_are_fewer_for_a_large_pool() -> None:
    small, large = (History.of(enumerate(busy_log(20_000, blocks), start=1)) for blocks in (100, 100_000))
    assert len(large._checkpoints) <= 16 < len(small._checkpoints)
    for position in (3, 19_000, 10_000):
        assert large.moment(position).position == position


def test_a_copy_shares_nothing_that_changes(runs: list[History]) -> None:
    run = runs[0]
    state = run.moment(60).state
    kept, again = state.copy(), state.copy()
    run.moment(150)
    assert kept == again
    assert isinstance(kept, RunState)
    # What only the log knows of a block takes no part in comparing.
    blocks = [(block.parent, block.tokens) for block in kept.memory.known.values()]
    assert blocks == [(block.parent, block.tokens) for block in again.memory.known.values()]
    assert any(tokens for _, tokens in blocks)


# --- names and finding ------------------------------------------------------------------------------------


def test_names(runs: list[History]) -> None:
    assert [letters(i) for i in (0, 25, 26, 51, 52, 701, 702)] == ["A", "Z", "AA", "AZ", "BA", "ZZ", "AAA"]
    run = runs[0]
    assert list(run.names.values()) == ["A", "B1", "B2", "C", "D", "E"]
    assert [run.find(what) for what in ("a", "B2", " b2 ", "3", "#3", "b", "nobody", "")] == [
        0,
        2,
        2,
        3,
        3,
        1,
        None,
        None,
    ]


# --- files that are not right ------------------------------------------------------------------------------


def damaged(log_file: Path, tmp_path: Path, change: Any) -> Path:
    lines = log_file.read_text(encoding="utf-8").splitlines()
    path = tmp_path / "bad.jsonl"
    path.write_text("\n".join(change(lines)) + "\n", encoding="utf-8")
    return path


def opened(**changes: Any) -> str:
    sizes = {"num_blocks": 4, "block_size": 4, "num_host_blocks": 0, "free_order": [0, 1, 2, 3]}
    return json.dumps({"event": "PoolOpened", "manager": "paged", **sizes, **changes})


@pytest.fixture(autouse=True)
def memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_limit, "machine_memory", lambda: 16_000_000_000)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: [*lines[:40], lines[40][:20]], "bad.jsonl, line 41: not JSON"),
        (lambda lines: [lines[0], "", *lines[1:]], "bad.jsonl, line 2: not JSON"),
        (lambda lines: ["hello", *lines], "bad.jsonl, line 1: not JSON"),
        (lambda lines: ['{"a": 1}', *lines], "bad.jsonl, line 1: event is None; known are PoolOpened"),
        (lambda lines: ["[1, 2]", *lines], "bad.jsonl, line 1: event is None"),
        (lambda lines: lines[1:], "bad.jsonl, line 1: a run begins with PoolOpened; this is ModelOpened"),
        (
            lambda lines: [s for s in lines if '"SequenceAdmitted"' not in s],
            "line 11: event 11, TokensAppended, does not fit what came before: sequence 0 is not there",
        ),
        (lambda lines: [s.replace('"token_id"', '"tokenid"') for s in lines], "line 3: TokenNamed has no field 'toke"),
        (lambda lines: [*lines[:4], to_json(TokenNamed(5, "x")).replace("5", '"5"')], "line 5: token_id of TokenNamed"),
        (
            lambda lines: [*lines[:12], '{"event":"TokenSampled","seq_id":99,"token_id":1}'],
            "line 13: event 13, TokenSamp",
        ),
        (lambda lines: [*lines[:12], '{"event":"SequenceFinished","seq_id":99,"reason":"x"}'], "line 13: event 13"),
        (lambda lines: [*lines[:12], '{"event":"StepPlanned","step":1,"chunks":[[9,1]]}'], "line 13: event 13"),
        (
            lambda lines: [*lines[:12], '{"event":"StepPlanned","step":1,"chunks":[],"waiting":[9]}'],
            "line 13: event 13",
        ),
        *(
            (
                lambda lines, sizes=sizes: [opened(**sizes)],
                f"bad.jsonl, line 1: event 1, PoolOpened, does not fit what came before: {message}",
            )
            for sizes, message in [
                ({"block_size": 0}, "block_size is 0; at least 1 is needed"),
                ({"num_blocks": 10**9}, "free_order does not name each of the 1000000000 blocks once"),
                ({"num_blocks": -1}, "num_blocks is -1; at least 0 is needed"),
                ({"free_order": [0, 1, 2, 2]}, "free_order does not name each of the 4 blocks once"),
                (
                    {"num_host_blocks": 10**9},
                    "num_host_blocks is 1000000000: a list of so many needs 64.0 GB; this machine has 16.0 GB",
                ),
            ]
        ),
        (lambda lines: [opened(version=2)], "bad.jsonl, line 1: the log has version 2; this program reads 1"),
        (
            lambda lines: [opened(block_size=10**400)],
            "bad.jsonl, line 1: not JSON: a number that needs more than 64 bits",
        ),
        (
            lambda lines: [*lines[:12], "[" * 1000 + "]" * 1000],
            "line 13: not JSON: nested more than 100 deep at column 101",
        ),
        *(
            (
                lambda lines, event=event: [*lines[:12], event],
                f"line 13: event 13, {json.loads(event)['event']}, does not fit what came before: sequence 99 is",
            )
            for event in (
                '{"event":"PagesNamed","seq_id":99,"layer":0,"head":0,"pages":[0]}',
                '{"event":"PagesAttended","seq_id":99,"layer":0,"head":0,"chosen":[0],"resident":[],"mass":[1]}',
            )
        ),
        (lambda lines: [*lines[:12], '{"event":"BlockCached","block_id":999,"digest":"ab"}'], "line 13: event 13"),
    ],
)
def test_a_damaged_log_is_one_sentence_with_its_line(log_file: Path, tmp_path: Path, change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]*$") as caught:
        read_histories(damaged(log_file, tmp_path, change))
    assert message in str(caught.value)


def test_files_that_are_no_logs(tmp_path: Path) -> None:
    empty, binary = tmp_path / "empty", tmp_path / "binary"
    empty.touch()
    binary.write_bytes(b"\x80\x81\x82")
    for path, message in (
        (empty, "empty is empty"),
        (binary, "has no whole line"),
        (tmp_path, "cannot be read: Is a directory"),
        (Path("/dev/zero"), "cannot be read: it is a pipe or a device; a regular file is needed"),
        (tmp_path / "nothing", "cannot be read: No such file"),
    ):
        with pytest.raises(ValueError, match=message):
            read_histories(path)


def test_any_line_may_be_missing_or_doubled(logs: dict[str, list[Event]]) -> None:
    """A log that lost a line is read as far as it makes sense, or refused with a ValueError: never a crash."""
    for number, events in enumerate(logs.values()):
        for i in range(number, len(events), 3):  # every third line: others in each log
            for broken in ([*events[:i], *events[i + 1 :]], [*events[: i + 1], *events[i:]]):
                with contextlib.suppress(ValueError):
                    histories(broken)[0].moment(i)


def test_a_log_told_by_a_manager_alone(tmp_path: Path) -> None:
    path = tmp_path / "alone.jsonl"
    with path.open("w", encoding="utf-8") as file:
        write_events(busy_log(2000, 50), file)
    (run,) = read_histories(path)
    moment = run.moment(1500)
    assert sum(parts(moment.usage)) == 50 * 16
    assert set(moment.state.sequences) == set(moment.state.memory.sequences)


def parts(usage: MemoryUsage) -> list[int]:
    return [usage.tokens, usage.reserved, usage.internal, usage.external, usage.cached, usage.free]
