"""Events as JSON lines: every event comes back, and what is wrong with a line is said, with its number."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paged_ref.timeline.events import (
    KINDS,
    Event,
    Pairs,
    PoolOpened,
    StepPlanned,
    SwappedOut,
    TokenSampled,
    TokensAppended,
    from_json,
    to_json,
    write_events,
)
from paged_ref.timeline.following import Follower

NAMES = sorted(KINDS)
ints = st.integers(-(2**63), 2**63 - 1)
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "int": ints,
    "str": st.text(),
    "tuple[int, ...]": st.lists(ints, max_size=5).map(tuple),
    "Pairs": st.lists(st.tuples(ints, ints), max_size=5).map(tuple),
}
VALUES["version"] = st.just(1)
EXAMPLES: dict[str, Any] = {"int": 7, "str": "x", "tuple[int, ...]": (1, 2), "Pairs": ((1, 2), (3, 4)), "version": 1}
WRONG: dict[str, list[Any]] = {
    "int": ["1", 1.0, True, None, [1], {}],
    "version": ["1", 1.0, True, None, [1], {}],
    "str": [1, None, ["x"], False],
    "tuple[int, ...]": [1, "12", None, {}, ["1"], [1, True], [1.5], [[1]], [None]],
    "Pairs": [1, None, [1, 2], [[1]], [[1, 2, 3]], [[1, "2"]], [[1, 2], [3, None]], [[[1, 2], 3]], "12", [{}]],
}


def types_of(name: str) -> dict[str, str]:
    """The fields of a kind of event, and the type of each as it is written there."""
    written = {int: "int", str: "str", tuple[int, ...]: "tuple[int, ...]", Pairs: "Pairs"}
    fields = msgspec.structs.fields(KINDS[name])
    return {field.name: field.name if field.name == "version" else written[field.type] for field in fields}


def example(name: str) -> Event:
    return KINDS[name](**{field: EXAMPLES[kind] for field, kind in types_of(name).items()})


def events_of(name: str) -> st.SearchStrategy[Event]:
    return st.builds(KINDS[name], **{field: VALUES[kind] for field, kind in types_of(name).items()})


# --- there and back ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
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


@given(st.lists(st.sampled_from(NAMES).flatmap(events_of), max_size=20))
@settings(max_examples=50, deadline=None, derandomize=True, database=None)
def test_a_file_of_events_comes_back_in_order(events: list[Event]) -> None:
    file = io.StringIO()
    write_events(events, file)
    assert file.getvalue().count("\n") == len(events)
    file.seek(0)
    assert list(map(from_json, file)) == events


# A line of each event, as logs hold it that were written before: names and fields never change.
OLD_LINES = [
    r'{"event":"PoolOpened","manager":"\u00b7x","num_blocks":7,"block_size":7,"num_host_blocks":7,"free_order":[1,2]}',
    r'{"event":"SequenceAdmitted","seq_id":7,"blocks":[1,2],"length":7}',
    r'{"event":"TokensAppended","seq_id":7,"count":7,"new_blocks":[1,2],"copied":[1,2],"evicted":[1,2]}',
    r'{"event":"SequenceTruncated","seq_id":7,"length":7}',
    r'{"event":"SequenceForked","parent_id":7,"child_id":7}',
    r'{"event":"BlockCached","block_id":7,"digest":"\u00b7x"}',
    r'{"event":"SwappedOut","seq_ids":[1,2],"blocks":[[1,2],[3,4]]}',
    r'{"event":"SwappedIn","seq_ids":[1,2],"blocks":[[1,2],[3,4]],"evicted":[1,2]}',
    r'{"event":"SequenceFreed","seq_id":7}',
    r'{"event":"PoolCleared","free_order":[1,2]}',
    r'{"event":"RegionPlaced","seq_id":7,"start":7,"size":7}',
    r'{"event":"RegionSwappedOut","seq_id":7,"start":7,"size":7}',
    r'{"event":"RegionSwappedIn","seq_id":7,"start":7,"size":7}',
    r'{"event":"ResidencyOpened","num_device_blocks":7,"num_host_blocks":7}',
    r'{"event":"PagesPlaced","pages":[1,2],"device_blocks":[1,2],"host_blocks":[1,2]}',
    r'{"event":"PagesFreed","pages":[1,2]}',
    r'{"event":"PagesNamed","seq_id":7,"layer":7,"head":7,"pages":[1,2]}',
    r'{"event":"ModelOpened","model":"\u00b7x","kv_bytes_per_token":7}',
    r'{"event":"RanksOpened","heads":[[1,2],[3,4]],"kv_heads":[[1,2],[3,4]]}',
    r'{"event":"TokenNamed","token_id":7,"text":"\u00b7x"}',
    r'{"event":"RequestArrived","request_id":7,"seq_ids":[1,2],"prompt":[1,2]}',
    r'{"event":"StepPlanned","step":7,"chunks":[[1,2],[3,4]],"preempted":[1,2],"waiting":[1,2]}',
    r'{"event":"PagesAttended","seq_id":7,"layer":7,"head":7,"chosen":[1,2],"resident":[1,2],"mass":[1,2]}',
    r'{"event":"TokenSampled","seq_id":7,"token_id":7}',
    r'{"event":"StepTimed","step":7,"microseconds":7}',
    r'{"event":"BeamsReordered","chosen":[[1,2],[3,4]]}',
    r'{"event":"SequenceFinished","seq_id":7,"reason":"\u00b7x"}',
]


def test_logs_that_were_written_before_still_open() -> None:
    assert {json.loads(line)["event"] for line in OLD_LINES} == set(KINDS)
    for line in OLD_LINES:
        event = from_json(line)
        written = json.loads(to_json(event))
        assert written.pop("version", 1) == 1  # which logs of before there were versions do not say
        assert written == json.loads(line)
        assert {1, "\u00b7x", 7, (1, 2), ((1, 2), (3, 4))}.issuperset(msgspec.structs.astuple(event))


def test_fields_with_a_default_may_be_left_out() -> None:
    assert from_json('{"event":"TokensAppended","seq_id":3,"count":2}') == TokensAppended(3, 2)
    assert from_json('{"event":"StepPlanned","step":0,"chunks":[[1,2]]}') == StepPlanned(0, ((1, 2),))


def test_an_event_cannot_be_changed() -> None:
    event = TokenSampled(1, 2)
    with pytest.raises(AttributeError):
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
        (
            '{"event":"SequenceFreed","seq_id":1' + "0" * 400 + "}",
            "not JSON: a number that needs more than 64 bits at ",
        ),
        ('{"event":"SequenceFreed","seq_id":' + "[" * 1000 + "]" * 1000 + "}", "not JSON: nested more than 100 deep"),
        ("[" * 1000 + "]" * 1000, "not JSON: nested more than 100 deep at column 101"),
        ('{"a":' * 100_000, "not JSON: nested more than 100 deep at column 501"),
        (
            '{"event":"PoolOpened","manager":"paged","version":2,"colour":1}',
            "the log has version 2; this program reads 1",
        ),
        (OLD_LINES[0].replace("}", ',"version":99}'), "the log has version 99; this program reads 1"),
        ('{"event":"SequenceFreed","seq_id":"3"}', "seq_id of SequenceFreed is '3'; int is needed"),
    ],
)
def test_a_bad_line_is_refused_with_its_number_and_what_is_wrong(line: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        from_json(line)
    first, good, log = (
        to_json(PoolOpened("paged", 4, 4, 0, (0, 1, 2, 3))),
        to_json(TokenSampled(1, 2)),
        tmp_path / "log",
    )
    log.write_text(f"{first}\n{good}\n{line}\n{good}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=f"log, line 3: .*({message})"):
        Follower(log).poll()


@pytest.mark.parametrize("name", NAMES)
def test_a_field_of_the_wrong_type_is_refused_at_any_depth(name: str) -> None:
    good = json.loads(to_json(example(name)))
    assert from_json(json.dumps(good)) == example(name)
    for field, kind in types_of(name).items():
        for wrong in WRONG[kind]:
            with pytest.raises(ValueError, match=f"{field} of {name} is .* is needed"):
                from_json(json.dumps({**good, field: wrong}))


@pytest.mark.parametrize("name", NAMES)
def test_every_missing_and_every_unknown_field_is_named(name: str) -> None:
    good = json.loads(to_json(example(name)))
    optional = {field.name: field.default for field in msgspec.structs.fields(KINDS[name]) if not field.required}
    for field in types_of(name):
        line = json.dumps({key: value for key, value in good.items() if key != field})
        if field in optional:
            assert from_json(line) == msgspec.structs.replace(example(name), **{field: optional[field]})
        else:
            with pytest.raises(ValueError, match=f"{name}: .*missing.*'{field}'"):
                from_json(line)
    with pytest.raises(ValueError, match=f"{name} has no field 'colour'"):
        from_json(json.dumps({**good, "colour": 1}))


def test_a_file_that_was_cut_off_is_read_up_to_there(tmp_path: Path) -> None:
    events = [PoolOpened("paged", 4, 4, 0, (0, 1, 2, 3)), SwappedOut((1, 2), ((0, 3), (1, 4)))]
    text, log = "".join(to_json(event) + "\n" for event in events), tmp_path / "log"
    last = text.index("\n") + 1
    for cut in range(last, len(text) + 1):
        log.write_text(text[:cut], encoding="utf-8")
        follower = Follower(log)
        whole = cut >= len(text) - 1  # the lost line break alone takes nothing away
        assert list(follower.to_the_end()) == events[: 1 + whole]
        assert follower.in_partial_line == (last < cut and not whole)
