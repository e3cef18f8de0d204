"""Events as JSON lines, and logs that cannot be: what is wrong is said, with the line or the event."""

from __future__ import annotations

import io
import json
import random
from dataclasses import FrozenInstanceError, fields, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paged_ref.core.memory.block_pool import OutOfBlocks
from paged_ref.core.memory.paged import PagedManager
from paged_ref.timeline.events import (
    BlockCached,
    Event,
    PoolOpened,
    RegionPlaced,
    RegionSwappedIn,
    RegionSwappedOut,
    SequenceAdmitted,
    SequenceForked,
    SequenceFreed,
    StepPlanned,
    SwappedIn,
    SwappedOut,
    TokenSampled,
    TokensAppended,
    from_json,
    read_events,
    to_json,
    write_events,
)
from paged_ref.timeline.replay import replay, state_of

KINDS = sorted(Event.kinds)
ints = st.integers()
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "int": ints,
    "str": st.text(),
    "tuple[int, ...]": st.lists(ints, max_size=5).map(tuple),
    "Pairs": st.lists(st.tuples(ints, ints), max_size=5).map(tuple),
}
EXAMPLES: dict[str, Any] = {"int": 7, "str": "x", "tuple[int, ...]": (1, 2), "Pairs": ((1, 2), (3, 4))}
WRONG: dict[str, list[Any]] = {
    "int": ["1", 1.0, True, None, [1], {}],
    "str": [1, None, ["x"], False],
    "tuple[int, ...]": [1, "12", None, {}, ["1"], [1, True], [1.5], [[1]], [None]],
    "Pairs": [1, None, [1, 2], [[1]], [[1, 2, 3]], [[1, "2"]], [[1, 2], [3, None]], [[[1, 2], 3]], "12", [{}]],
}


def types_of(name: str) -> dict[str, str]:
    """The fields of a kind of event, and the type of each as it is written there."""
    return {field.name: str(field.type) for field in fields(Event.kinds[name])}


def example(name: str) -> Event:
    return Event.kinds[name](**{field: EXAMPLES[kind] for field, kind in types_of(name).items()})


def events_of(name: str) -> st.SearchStrategy[Event]:
    return st.builds(Event.kinds[name], **{field: VALUES[kind] for field, kind in types_of(name).items()})


# --- there and back ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
@given(data=st.data())
@settings(max_examples=30, deadline=None, derandomize=True, database=None)
def test_every_kind_of_event_survives_a_json_line(name: str, data: st.DataObject) -> None:
    event = data.draw(events_of(name))
    line = to_json(event)
    assert "\n" not in line
    assert json.loads(line)["event"] == name
    back = from_json(line)
    assert back == event
    assert type(back) is type(event)
    assert hash(back) == hash(event)  # lists came back as tuples, inside too


@given(st.lists(st.sampled_from(KINDS).flatmap(events_of), max_size=20))
@settings(max_examples=50, deadline=None, derandomize=True, database=None)
def test_a_file_of_events_comes_back_in_order(events: list[Event]) -> None:
    file = io.StringIO()
    write_events(events, file)
    assert file.getvalue().count("\n") == len(events)
    file.seek(0)
    assert list(read_events(file)) == events


def test_fields_with_a_default_may_be_left_out() -> None:
    assert from_json('{"event":"TokensAppended","seq_id":3,"count":2}') == TokensAppended(3, 2)
    assert from_json('{"event":"StepPlanned","step":0,"chunks":[[1,2]]}') == StepPlanned(0, ((1, 2),))


def test_an_event_cannot_be_changed() -> None:
    event = TokenSampled(1, 2)
    with pytest.raises(FrozenInstanceError):
        event.seq_id = 3  # type: ignore[misc]


# --- bad lines -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "not JSON: Expecting value at column 1"),
        ("SequenceFreed 3", "not JSON: .* at column 1"),
        ('{"event":"SequenceFreed","seq_id":3', "not JSON: .* at column 36"),
        ("[1]", "event is None; known are .*SequenceFreed"),
        ("3", "event is None"),
        ("{}", "event is None"),
        ('{"event":7}', "event is None|event is 7"),
        ('{"event":["SequenceFreed"]}', r"event is \['SequenceFreed'\]"),
        ('{"event":"SequenceLost","seq_id":3}', "event is 'SequenceLost'; known are .*SequenceFreed"),
        ('{"event":"Event"}', "event is 'Event'; known are"),
        ('{"event":"SequenceFreed","seq_id":3,"why":1}', "SequenceFreed has no field 'why'; known are seq_id"),
        ('{"event":"SequenceFreed"}', "SequenceFreed: .*missing .* 'seq_id'"),
        ('{"event":"SequenceForked","child_id":1}', "SequenceForked: .*missing .* 'parent_id'"),
        ('{"event":"SequenceFreed","seq_id":"3"}', "seq_id of SequenceFreed is '3'; int is needed"),
    ],
)
def test_a_bad_line_is_refused_with_its_number_and_what_is_wrong(line: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_json(line)
    good = to_json(TokenSampled(1, 2))
    events = read_events(io.StringIO(f"{good}\n{good}\n{line}\n{good}\n"))
    assert [next(events), next(events)] == [TokenSampled(1, 2)] * 2  # what is before it can be had
    with pytest.raises(ValueError, match=f"^line 3: .*({message})"):
        next(events)


@pytest.mark.parametrize("name", KINDS)
def test_a_field_of_the_wrong_type_is_refused_at_any_depth(name: str) -> None:
    good = json.loads(to_json(example(name)))
    assert from_json(json.dumps(good)) == example(name)
    for field, kind in types_of(name).items():
        for wrong in WRONG[kind]:
            with pytest.raises(ValueError, match=f"{field} of {name} is .* is needed"):
                from_json(json.dumps({**good, field: wrong}))


@pytest.mark.parametrize("name", KINDS)
def test_every_missing_and_every_unknown_field_is_named(name: str) -> None:
    good = json.loads(to_json(example(name)))
    optional = {field.name for field in fields(Event.kinds[name]) if field.default == ()}
    for field in types_of(name):
        line = json.dumps({key: value for key, value in good.items() if key != field})
        if field in optional:
            assert from_json(line) == replace(example(name), **{field: ()})
        else:
            with pytest.raises(ValueError, match=f"{name}: .*missing.*'{field}'"):
                from_json(line)
    with pytest.raises(ValueError, match=f"{name} has no field 'colour'"):
        from_json(json.dumps({**good, "colour": 1}))


def test_a_file_that_was_cut_off_says_in_which_line() -> None:
    file = io.StringIO()
    write_events([TokenSampled(1, 2), SwappedOut((1, 2), ((0, 3), (1, 4)))], file)
    text = file.getvalue()
    last = text.index("\n") + 1
    for cut in range(last + 1, len(text) - 1):
        events = read_events(io.StringIO(text[:cut]))
        assert next(events) == TokenSampled(1, 2)
        with pytest.raises(ValueError, match=r"^line 2: not JSON"):
            next(events)
    assert len(list(read_events(io.StringIO(text[:last])))) == 1  # cut between two lines: all that is there
    assert len(list(read_events(io.StringIO(text[:-1])))) == 2  # only the last line break is lost


# --- logs that contradict themselves -------------------------------------------------------------------

OPENED = PoolOpened("paged", 4, 2, 2, (0, 1, 2, 3))
REGIONS = PoolOpened("swapping", 32, 1, 16, ())


def begun(seq_id: int, *blocks: int) -> list[Event]:
    """A sequence that fills the blocks."""
    return [SequenceAdmitted(seq_id, (), 0), TokensAppended(seq_id, 2 * len(blocks), blocks)]


@pytest.mark.parametrize(
    ("log", "bad", "message"),
    [
        ([OPENED], OPENED, "opened before"),
        ([], SequenceAdmitted(0, (1,), 2), "block 1 is not in the pool"),
        ([OPENED], TokensAppended(5, 1, (0,)), "5"),
        ([OPENED, *begun(0)], TokensAppended(0, 1, (1,)), r"block 1 was handed out; next on the free list is \[0\]"),
        ([OPENED, *begun(0)], TokensAppended(0, 3, (0,)), "sequence 0 has 3 tokens in 1 blocks"),
        ([OPENED, *begun(0)], TokensAppended(0, 1, (0, 1)), "sequence 0 has 1 tokens in 2 blocks"),
        ([OPENED, *begun(0, 0, 1, 2, 3)], TokensAppended(0, 1, (0,)), "block 0 .* nothing"),
        ([OPENED, *begun(0, 0)], TokensAppended(0, 2, (1,), (), (1,)), r"gave up nothing; told was \[1\]"),
        ([OPENED, *begun(0, 0)], TokensAppended(0, 0, (), (3, 1)), "block 3 was copied; the last .* is 0"),
        ([OPENED, *begun(0, 0)], TokensAppended(0, 0, (), (0,)), "not enough values"),
        ([OPENED, *begun(0, 0)], SequenceAdmitted(0, (), 0), "sequence 0 is there already"),
        ([OPENED, *begun(0, 0)], SequenceAdmitted(1, (1,), 2), "block 1 is free"),
        ([OPENED, *begun(0, 0)], SequenceAdmitted(1, (-4,), 2), "block -4 is not in the pool"),
        ([OPENED, *begun(0, 0)], SequenceAdmitted(1, (9,), 2), "block 9 is not in the pool"),
        ([OPENED, *begun(0, 0)], SequenceAdmitted(1, (0,), 6), "sequence 1 has 6 tokens in 1 blocks"),
        ([OPENED, *begun(0, 0)], SequenceForked(3, 1), "3"),
        ([OPENED, *begun(0, 0), *begun(1, 1)], SequenceForked(0, 1), "sequence 1 is there already"),
        ([OPENED, *begun(0, 0), SequenceFreed(0)], SequenceFreed(0), "0"),
        ([OPENED, *begun(0, 0)], BlockCached(1, "ab"), "block 1 is in no table"),
        ([OPENED, *begun(0, 0)], BlockCached(7, "ab"), "index out of range"),
        ([OPENED, *begun(0, 0)], SwappedOut((0,), ()), "0"),
        ([OPENED, *begun(0, 0)], SwappedOut((0,), ((0, 1),)), r"block 1 was handed out; next .* is \[0\]"),
        ([OPENED, *begun(0, 0)], SwappedIn((0,), ((0, 1),)), "sequence 0 is on the device"),
        ([OPENED, *begun(0, 0), SwappedOut((0,), ((0, 0),))], SwappedOut((0,), ((0, 1),)), "0 is on the host"),
        ([OPENED, *begun(0, 0), SwappedOut((0,), ((0, 0),))], TokensAppended(0, 1, (0,)), "0 is on the host"),
        ([OPENED, *begun(0, 0), SwappedOut((0,), ((0, 0),))], SequenceForked(0, 1), "0 is on the host"),
        ([OPENED, *begun(0, 0), SwappedOut((0,), ((0, 0),))], SwappedIn((0,), ((0, 3),)), "block 3 was handed out"),
        ([REGIONS], RegionPlaced(0, 30, 4), "slots 30 to 33 are not all in the pool"),
        ([REGIONS], RegionPlaced(0, -1, 4), "slots -1 to 2 are not all in the pool"),
        ([REGIONS, RegionPlaced(0, 0, 8)], RegionPlaced(1, 7, 8), "sequences 1 and 0 lie in the same slots"),
        ([REGIONS, RegionPlaced(0, 0, 8)], TokensAppended(0, 9), "sequence 0 has 9 tokens in 8 slots"),
        ([REGIONS, RegionPlaced(0, 0, 8)], RegionSwappedIn(0, 0, 8), "sequence 0 is on the device"),
        ([REGIONS, RegionPlaced(0, 0, 8)], RegionSwappedOut(0, 16, 8), "slots 16 to 23 are not all in the pool"),
        ([REGIONS, RegionPlaced(0, 0, 8), RegionSwappedOut(0, 0, 8)], RegionPlaced(0, 0, 16), "0 is on the host"),
        ([REGIONS], RegionSwappedOut(0, 0, 8), "0"),
    ],
)
def test_replay_stops_at_the_event_that_contradicts_what_came_before(
    log: list[Event], bad: Event, message: str
) -> None:
    passed_over = [TokenSampled(0, 1)]  # the engine's events count, though they change no memory
    replay([*passed_over, *log])
    number = len(log) + 2
    place = f"^event {number}, {type(bad).__name__}, does not fit what came before: .*{message}"
    with pytest.raises(ValueError, match=place):
        replay([*passed_over, *log, bad, TokenSampled(0, 2)])


def random_log(seed: int) -> tuple[list[Event], PagedManager]:
    """A small paged life with everything in it."""
    rng = random.Random(seed)
    events: list[Event] = []
    manager = PagedManager(8, 2, num_host_blocks=4, prefix_cache=True, log=events.append)
    tokens: dict[int, list[int]] = {}
    for step in range(60):
        seq_id = rng.choice(list(tokens)) if tokens else -1
        on_host = bool(tokens) and manager.tables[seq_id].on_host
        choice = rng.random()
        try:
            if choice < 0.3 or not tokens:
                prompt = [rng.randrange(2) for _ in range(rng.randrange(1, 6))]
                known = manager.admit(step, prompt, 20)
                tokens[step] = prompt
                manager.append([(step, len(prompt) - known)])
                manager.commit(step, prompt, len(prompt))
            elif choice < 0.5 and not on_host:
                manager.append([(seq_id, 1)])
                tokens[seq_id].append(rng.randrange(2))
            elif choice < 0.65 and not on_host:
                manager.fork(seq_id, step)
                tokens[step] = tokens[seq_id].copy()
            elif choice < 0.85:
                (manager.swap_in if on_host else manager.swap_out)([seq_id])
            else:
                manager.free(seq_id)
                del tokens[seq_id]
        except OutOfBlocks:
            pass
    return events, manager


@pytest.mark.parametrize("seed", range(5))
def test_every_event_is_needed_and_few_can_be_lost_or_told_twice_unnoticed(seed: int) -> None:
    """A lost append inside a block, of a sequence that is freed later, cannot be noticed; most can."""
    events, manager = random_log(seed)
    assert replay(events) == state_of(manager)
    stopped = 0
    for i, event in enumerate(events):
        if not (isinstance(event, TokensAppended) and event.count == 0):
            assert replay(events[:i]) != replay(events[: i + 1])
        for changed in (events[:i] + events[i + 1 :], events[: i + 1] + events[i:]):
            try:
                replay(changed)
            except ValueError:
                stopped += 1
    assert stopped > len(events)
