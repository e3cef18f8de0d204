"""Lines of code that a technique runs: of which modules, and counted without prose."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType

import pytest

from paged_ref.core.attention import addressing
from paged_ref.planner.comparison import setups
from paged_ref.planner.paper import PAGED
from paged_ref.planner.source_lines import code_lines, lines_of, modules_of

SETUPS = {setup.label: setup for setup in setups(replace(PAGED, kv_tokens=4096), [16])}
PAGED_MODULES = {"core.memory.paged", "core.memory.block_pool", "extras.host_swap"}


def names(modules: set[ModuleType]) -> set[str]:
    return {module.__name__.removeprefix("paged_ref.") for module in modules}


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("standard max", {"core.memory.standard", "core.memory.regions", "extras.buddy"}),
        ("exact, first fit", {"core.memory.standard", "core.memory.regions"}),
        ("swapping", {"extras.swapping", "core.memory.regions"}),
        ("paged 16", PAGED_MODULES),
        ("paged 16 + prefix", PAGED_MODULES | {"extras.prefix_cache"}),
    ],
)
def test_the_modules_are_those_of_the_manager_and_its_parts(label: str, expected: set[str]) -> None:
    assert names(modules_of(SETUPS[label].make_manager())) == expected


def test_lines_of_code_are_counted_without_prose() -> None:
    assert code_lines(addressing) == 5  # two imports, a def, and paging in two lines


def test_the_techniques_grow_in_the_order_of_the_article() -> None:
    labels = ("exact, first fit", "swapping", "paged 16", "paged 16 + prefix")
    counts = [sum(lines_of(SETUPS[label])) for label in labels]
    assert counts == sorted(set(counts))
    (_, contiguous), (_, paged) = lines_of(SETUPS["swapping"]), lines_of(SETUPS["paged 16"])
    assert contiguous < paged <= contiguous + 10  # the kernels differ in how they find a slot
