"""The examples in the docstrings of what can be imported, run."""

from __future__ import annotations

import doctest
import importlib

import pytest

# And how many functions have an example at least.
MODULES = {"paged_ref.interop.kernel_api": 3, "paged_ref.interop.cache_api": 2}


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_give_what_they_say(name: str) -> None:
    module = importlib.import_module(name)
    tests = [test for test in doctest.DocTestFinder().find(module) if test.examples]
    assert len(tests) >= MODULES[name]
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    failed = [test.name for test in tests if runner.run(test).failed]
    assert failed == []
