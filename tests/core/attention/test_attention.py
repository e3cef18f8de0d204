"""The addresses of a step and their check, and the registry of backends: order, refusals, and which ones run."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from support.plain_calls import plain_call

from paged_ref.core.attention import attention
from paged_ref.core.attention.attention import Addresses, attend, backends, by_slot, known_backends, register, why_not

# --- addresses -------------------------------------------------------------------------------------------


def ints(*values: Any) -> np.ndarray:
    return np.array(values, np.int32)


PAGED = Addresses(ints(5, 12), ints(0, 1, 3), block_tables=ints([0, 1, -1], [3, 4, 5]), slot_mapping=ints(4, 21, 22))
CONTIGUOUS = Addresses(ints(5, 12), ints(0, 1, 3), starts=ints(0, 12), slot_mapping=ints(4, 22, 23))


def test_the_right_addresses_are_right() -> None:
    PAGED.check(3, num_blocks=6, block_size=4)
    CONTIGUOUS.check(3, num_blocks=24, block_size=1)
    CONTIGUOUS.check(3, num_blocks=6, block_size=4)
    Addresses(ints(), ints(0), block_tables=np.zeros((0, 0), np.int32)).check(0, 0, 4)
    Addresses(ints(0), ints(0, 0), starts=ints(-5)).check(0, 6, 4)  # a region without keys may start anywhere


@pytest.mark.parametrize(
    ("good", "wrong", "message"),
    [
        (PAGED, {"seq_lens": ints(5, -1)}, "seq_lens[1] is -1; at least 0 is needed"),
        (PAGED, {"seq_lens": ints(5, 13)}, "seq_lens[1] is 13; its block table holds 3 blocks of 4 = 12 tokens"),
        (PAGED, {"query_start_loc": ints(0, 1, 2)}, "must rise from 0 to 3, the length of query; it is [0, 1, 2]"),
        (PAGED, {"query_start_loc": ints(1, 1, 3)}, "query_start_loc must rise from 0 to 3, the length of query"),
        (PAGED, {"query_start_loc": ints(0, 4, 3)}, "query_start_loc must rise from 0 to 3, the length of query"),
        (PAGED, {"query_start_loc": ints(0, *range(9))}, "it is [0, 0, 1, 2, 3, 4, 5, 6, ...]"),
        (PAGED, {"block_tables": ints([0, 6, 0], [3, 4, 5])}, "block_tables[0, 1] is 6; the cache has blocks 0 to 5"),
        (PAGED, {"block_tables": ints([0, 1, 0], [3, -7, 5])}, "block_tables[1, 1] is -7; the cache has blocks 0 to 5"),
        (PAGED, {"slot_mapping": ints(4, 24, 22)}, "slot_mapping holds 24; the cache has slots 0 to 23"),
        (PAGED, {"slot_mapping": ints(4, -1, 22)}, "slot_mapping holds -1; the cache has slots 0 to 23"),
        (CONTIGUOUS, {"starts": ints(0, -1)}, "starts[1] is -1; with seq_lens 12 the region leaves the slots 0 to 23"),
        (CONTIGUOUS, {"starts": ints(20, 0)}, "starts[0] is 20; with seq_lens 5 the region leaves the slots 0 to 23"),
        (
            CONTIGUOUS,
            {"seq_lens": ints(5, 13)},
            "starts[1] is 12; with seq_lens 13 the region leaves the slots",
        ),
        (CONTIGUOUS, {"starts": ints(0, 2**31 - 5)}, "starts[1] is 2147483643; with seq_lens 12 the region leaves"),
    ],
)
def test_an_address_outside_the_cache_is_refused(good: Addresses, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        replace(good, **wrong).check(3, num_blocks=6, block_size=4)


def test_rows_of_slots_are_the_memory_of_the_blocks() -> None:
    cache = np.zeros((6, 4, 2, 8), np.float32)
    rows = by_slot(cache)
    rows[9] = 1
    assert rows.shape == (24, 2, 8)
    assert cache[2, 1].all()
    assert cache.sum() == 16


# --- backends --------------------------------------------------------------------------------------------


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """A registry of the test's own."""
    monkeypatch.setattr(attention, "_backends", {})
    for cached in (attention._load, attention._automatic):
        cached.cache_clear()
    yield attention._backends
    monkeypatch.undo()
    for cached in (attention._load, attention._automatic):
        cached.cache_clear()


def backend(
    monkeypatch: pytest.MonkeyPatch, name: str, rank: int | None, *, here: str | None = None, call: str | None = None
) -> list[str]:
    """Register a backend made of a module that writes down its calls."""
    calls: list[str] = []
    module: Any = ModuleType(f"backend_{name}_{id(calls)}")
    module.unavailable = lambda: here
    module.unsupported = lambda given: call
    module.attend = lambda given: calls.append(name)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    register(name, f"what {name} is", module.__name__, rank)
    return calls


def test_auto_takes_the_lowest_rank_that_can(registry: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = {
        "slow": backend(monkeypatch, "slow", 30),
        "never": backend(monkeypatch, "never", None),
        "absent": backend(monkeypatch, "absent", 0, here="no such machine"),
        "picky": backend(monkeypatch, "picky", 10, call="it has no softcap"),
        "fast": backend(monkeypatch, "fast", 20),
    }
    assert list(known_backends()) == ["absent", "picky", "fast", "slow", "never"]
    assert known_backends()["slow"] == "what slow is"
    assert backends() == ("picky", "fast", "slow", "never")
    assert (why_not("absent"), why_not("fast")) == ("no such machine", None)
    attend(plain_call([3]).call)
    attend(plain_call([3]).call, "never")
    assert {name: calls for name, calls in made.items() if calls} == {"fast": ["fast"], "never": ["never"]}


def test_a_name_that_is_registered_again_stands_for_the_new_module(
    registry: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = backend(monkeypatch, "reference", 40)
    attend(plain_call([3]).call)
    attend(plain_call([3]).call, "reference")
    new = backend(monkeypatch, "reference", 40)
    attend(plain_call([3]).call)
    attend(plain_call([3]).call, "reference")
    assert (len(old), len(new)) == (2, 2)
    assert list(known_backends()) == ["reference"]


def test_a_backend_that_cannot_says_why_and_who_can(registry: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    backend(monkeypatch, "picky", 10, call="it has no softcap")
    backend(monkeypatch, "absent", 0, here="no such machine")
    for name, reason in (("picky", "it has no softcap"), ("absent", "no such machine")):
        with pytest.raises(ValueError, match=f"^backend '{name}' cannot run this call: {reason}; none can$"):
            attend(plain_call([3]).call, name)
    with pytest.raises(ValueError, match="backend 'auto' cannot run this call: none of the fast ones supports it"):
        attend(plain_call([3]).call)
    backend(monkeypatch, "one", 30)
    backend(monkeypatch, "two", 20)
    with pytest.raises(ValueError, match=r"^backend 'picky' cannot run this call: it has no softcap; two, one can$"):
        attend(plain_call([3]).call, "picky")


def test_an_unknown_backend_is_refused_with_those_that_are_known(
    registry: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend(monkeypatch, "one", 30)
    with pytest.raises(ValueError, match="backend is 'gpu'; known are auto, one"):
        attend(plain_call([3]).call, "gpu")
    with pytest.raises(ValueError, match="backend is 'gpu'; known are auto, one"):
        why_not("gpu")


def test_a_missing_package_is_a_reason(registry: Any) -> None:
    register("broken", "it imports what is not there", "no_such_package.backend", 0)
    assert why_not("broken") == "it cannot start: No module named 'no_such_package'"
    assert backends() == ()
    with pytest.raises(ValueError, match="it cannot start: No module named 'no_such_package'; none can"):
        attend(plain_call([3]).call, "broken")


def test_the_core_has_three_backends() -> None:
    assert {"cuda", "cpu", "reference"} <= set(known_backends())
    assert {"cpu", "reference"} <= set(backends())
