"""Arrays of other libraries: taken without a copy, given back in the caller's kind, refused in one sentence."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from paged_ref.interop.dlpack import adopt, like_caller


class Foreign:
    """An array of another library, which speaks DLPack and nothing else."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.array.__dlpack_device__()


def test_numpy_arrays_are_taken_as_they_are() -> None:
    array = np.ones((2, 3), np.float32)
    assert adopt(array, "query") is array
    assert like_caller(array, np.zeros(1)) is array


def test_a_foreign_array_shares_its_memory() -> None:
    array = np.arange(6, dtype=np.float32)
    taken = adopt(Foreign(array), "query")
    assert isinstance(taken, np.ndarray)
    array[3] = 99
    assert taken[3] == 99


@pytest.mark.parametrize("value", [[1.0], 1.0, None, "text"])
def test_what_is_no_array_is_refused_with_the_arguments_name(value: Any) -> None:
    message = f"key_cache is a {type(value).__name__}; an array is expected (NumPy, CuPy or DLPack)"
    with pytest.raises(ValueError, match=re.escape(message)):
        adopt(value, "key_cache")


def test_an_array_that_cannot_be_exported_is_refused_with_the_reason() -> None:
    class Locked(Foreign):
        def __dlpack__(self, **options: Any) -> Any:
            raise BufferError("it has a gradient")

    with pytest.raises(ValueError, match="query cannot be read through DLPack: it has a gradient"):
        adopt(Locked(np.ones(2)), "query")


def test_the_answer_is_in_the_callers_kind() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed: no DLPack partner")
    caller = torch.ones(2)
    taken = adopt(caller, "query")
    taken[0] = 7
    assert caller[0] == 7
    assert isinstance(like_caller(taken, caller), torch.Tensor)
    for dtype, bits in ((torch.bfloat16, np.uint16), (torch.float8_e4m3fn, np.uint8)):
        caller = torch.ones(2).to(dtype)
        taken = adopt(caller, "query")
        assert taken.dtype == bits
        back = like_caller(taken, caller)
        assert back.dtype == dtype
        assert torch.equal(back.float(), caller.float())
