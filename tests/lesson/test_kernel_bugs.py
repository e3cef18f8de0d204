"""Bugs in copies of the teaching kernels: the place of each is there, exactly once."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from paged_ref.core.attention import naive, paged
from paged_ref.lesson import plant
from paged_ref.lesson.kernel_bugs import KERNEL_BUGS

KERNELS = {
    "no barrier after the largest score is read": (naive.attention_kernel, paged.attention_kernel),
    "the first sequence's block table for all": (paged.attention_kernel,),
}
CASES = [(bug, kernel) for bug, kernels in KERNELS.items() for kernel in kernels]


def test_each_bug_has_its_kernels_here() -> None:
    assert set(KERNELS) == set(KERNEL_BUGS)


@pytest.mark.parametrize(("bug", "kernel"), CASES, ids=[f"{kernel.__module__}-{bug}" for bug, kernel in CASES])
def test_the_place_of_a_bug_is_in_its_kernel_once(bug: str, kernel: Any) -> None:
    source = inspect.getsource(kernel.py_func)
    fragment, replacement = KERNEL_BUGS[bug]
    assert source.count(fragment) == 1
    assert source.count("@cuda.jit\n") == 1
    assert source.replace(fragment, replacement) != source
    assert plant(kernel, bug).__name__ == kernel.__name__


def test_what_is_no_bug_of_this_kernel_is_refused() -> None:
    with pytest.raises(ValueError, match="the bug is 'a typing error'; known are 'no barrier"):
        plant(naive.attention_kernel, "a typing error")
    with pytest.raises(ValueError, match=r"'block_tables\[seq\]' is 0 times in .*naive.attention_kernel, not once"):
        plant(naive.attention_kernel, "the first sequence's block table for all")
