"""What the stand-in refuses, as CuPy and CUDA refuse it. It is not put in the place of CuPy here."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from strict_gpu import memory, modules, order
from strict_gpu.arrays import CUPY
from strict_gpu.functions import FUNCTIONS
from strict_gpu.order import CUDARuntimeError, Event, Stream, StreamRace

cupy: Any = modules.CUPY_MODULE
host = np.arange(6, dtype=np.float32).reshape(2, 3)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    yield
    order.forget()


REFUSED: dict[str, tuple[Callable[[Any], Any], type[Exception]]] = {
    "an array becomes NumPy's by itself": (np.asarray, TypeError),
    "NumPy writes it": (lambda a: np.copyto(host.copy(), a), TypeError),
    "an operator with a NumPy array": (lambda a: a + host, TypeError),
    "an operator of a NumPy array": (lambda a: host * a, TypeError),
    "an operator with a list": (lambda a: a * [1, 2, 3], TypeError),
    "a NumPy function with a NumPy array": (lambda a: np.maximum(a, host), TypeError),
    "matmul with a NumPy array": (lambda a: a @ host.T, TypeError),
    "where with a NumPy array": (lambda a: cupy.where(a > 0, a, host), TypeError),
    "where of a NumPy condition": (lambda a: cupy.where(host > 0, a, a), TypeError),
    "stack of NumPy arrays": (lambda a: cupy.stack([host, host]), TypeError),
    "a list of both": (lambda a: cupy.asarray([a[0], host[0]]), TypeError),
    "assignment of a NumPy array": (lambda a: a.__setitem__(slice(None), host), ValueError),
    "set of another dtype": (lambda a: a.set(host.astype(np.float64)), TypeError),
    "set of another shape": (lambda a: a.set(host.T.copy()), ValueError),
    "get to another dtype": (lambda a: a.get(out=np.empty((2, 3))), TypeError),
    "set of a strided array": (lambda a: a.T.set(host.T.copy()), RuntimeError),
    "a dtype that CuPy lacks": (lambda a: cupy.empty(2, "datetime64[s]"), ValueError),
    "text": (lambda a: cupy.asarray(["a"]), ValueError),
    "a view of a strided last axis": (lambda a: a[:, ::2].view(np.uint16), ValueError),
    "an index by numbers with fractions": (lambda a: a[cupy.asarray([0.5])], IndexError),
    "a 0-d array as an index of a list": (lambda a: [1, 2][cupy.asarray(1)], TypeError),
    "the truth of two numbers": (bool, ValueError),
    "flags.writeable": (lambda a: a.flags.writeable, AttributeError),
    "setting a flag": (lambda a: setattr(a.flags, "c_contiguous", True), AttributeError),
    "a keyword that CuPy's functions lack": (lambda a: cupy.exp(a, where=a > 0), TypeError),
    "another one": (lambda a: a.max(initial=0), TypeError),
    "output to NumPy": (lambda a: cupy.exp(a, out=host.copy()), TypeError),
    "output of too small a kind": (lambda a: cupy.exp(a, out=cupy.empty((2, 3), np.int32)), TypeError),
    "repeat by an array": (lambda a: a.repeat(np.array([1, 2]), axis=0), TypeError),
    "a name that CuPy lacks": (lambda a: cupy.memmap, AttributeError),
    "a method that CuPy lacks": (lambda a: a.setflags, AttributeError),
    "a name that the stand-in lacks": (lambda a: cupy.linspace, NotImplementedError),
    "a view past the end of its memory": (lambda a: cupy.ndarray((7,), np.uint8, memptr=a.data + 510), TypeError),
    "a stream that is no number": (lambda a: modules.memcpy_2d_async(0, 1, 0, 1, 1, 1, 1, None), TypeError),
    "an address of plain host memory": (
        lambda a: modules.memcpy_async(a.data.ptr, host.ctypes.data, 8, 1, 0),
        ValueError,
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused(name: str) -> None:
    action, error = REFUSED[name]
    with pytest.raises(error):
        action(cupy.asarray(host))


def test_what_is_allowed_gives_numpys_numbers() -> None:
    a = cupy.asarray(host)
    assert (a * 2 + np.float32(1))[:, 1:].sum(axis=0).tolist() == (host * 2 + 1)[:, 1:].sum(axis=0).tolist()
    b = a.copy()
    b[cupy.asarray([1, 0])] = a
    b[a == 5] = -1
    assert b.tolist() == [[3, 4, 5], [0, 1, -1]]
    assert a[[5]].tolist() == [[3, 4, 5]]  # CuPy looks at no bound: indices wrap around
    assert np.exp(a).dtype == np.float32
    assert a.T.reshape(-1).get().tolist() == host.T.reshape(-1).tolist()


def test_new_memory_is_nan() -> None:
    assert np.isnan(cupy.empty(5, np.float16).get()).all()
    used = cupy.ones(500, np.float32)
    del used
    assert np.isnan(cupy.empty(500, np.float32).get()).all()


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name in CUPY["functions"]])
def test_its_functions_take_no_parameter_that_cupys_lack(name: str) -> None:
    theirs = CUPY["functions"][name].replace("*", "").split()
    if theirs == ["?"] or "kwargs" in theirs or "args" in theirs:
        pytest.skip("CuPy does not name the parameters of this function")
    ours = [p.name for p in inspect.signature(FUNCTIONS[name]).parameters.values() if p.kind in (0, 1, 3)]
    assert set(ours) <= set(theirs)


# --- launches --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grid", "block", "args", "error"),
    [
        ((1, 65536), (32,), (), CUDARuntimeError),
        ((2**31,), (32,), (), CUDARuntimeError),
        ((1,), (1056,), (), CUDARuntimeError),
        ([1], (32,), (), TypeError),
        ((1,), (32,), (host,), TypeError),
        ((1,), (32,), ("text",), TypeError),
    ],
)
def test_a_launch_is_refused(grid: Any, block: Any, args: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        modules.Function(lambda *launch: None)(grid, block, args)


# --- order -----------------------------------------------------------------------------------------------------------


def test_two_streams_need_an_event() -> None:
    side = Stream(non_blocking=True)
    a = cupy.ones(4)
    with side, pytest.raises(StreamRace, match="nothing orders it after fill on <Stream 0>"):
        a += 1
    event = Stream.null.record(Event())
    side.wait_event(event)
    with side:
        b = a * 2  # two streams may read
    _ = a * 3
    with pytest.raises(StreamRace, match="writes device memory"):
        a[:] = 0  # the side stream may still read it
    side.synchronize()
    assert b.shape == a.shape


def test_a_blocking_stream_waits_for_the_default_stream() -> None:
    a = cupy.ones(4)
    with Stream():
        a += 1
    a += 1
    assert a.tolist() == [3] * 4


def test_bytes_that_are_not_shared_need_no_order() -> None:
    a = cupy.ones(8)
    side = Stream(non_blocking=True)
    side.wait_event(Stream.null.record())
    with side:
        a[:4] += 1
    a[4:] += 1
    with pytest.raises(StreamRace):
        a[3:5] += 1


def test_the_host_waits_before_it_reads_page_locked_memory() -> None:
    pinned, side = memory.empty_pinned(4, np.float32), Stream(non_blocking=True)
    with side:
        cupy.ones(4, np.float32).get(stream=side, out=pinned, blocking=False)
    with pytest.raises(StreamRace, match=r"the host at .*test_stand_in.py:.* reads page-locked host memory"):
        _ = pinned + 1
    side.synchronize()
    assert (pinned == 1).all()


def test_the_host_does_not_write_what_a_copy_reads() -> None:
    pinned, device = memory.empty_pinned(4, np.float32), cupy.empty(4, np.float32)
    pinned.fill(7)
    device.set(pinned)
    with pytest.raises(StreamRace, match="writes page-locked host memory"):
        pinned[0] = 8
    assert device.tolist() == [7] * 4  # that waits
    pinned[0] = 8


def test_a_test_that_is_over_orders_all() -> None:
    a = cupy.ones(4)
    order.forget()
    with Stream(non_blocking=True):
        a += 1


# --- captures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "action",
    [
        lambda a, stream: a.get(),
        lambda a, stream: a[a > 0],
        lambda a, stream: cupy.asarray([1, 2]),
        lambda a, stream: a @ a,
        lambda a, stream: stream.synchronize(),
        lambda a, stream: modules.Device().synchronize(),
    ],
    ids=["copy to host", "index by booleans", "copy to device", "cuBLAS", "wait for the stream", "wait for the device"],
)
def test_a_capture_ends_with_an_error_after_what_cuda_forbids(action: Callable[[Any, Any], Any]) -> None:
    stream = Stream(non_blocking=True)
    with stream:
        a = cupy.ones((2, 2))
        stream.begin_capture()
        with pytest.raises((RuntimeError, NotImplementedError)):
            action(a, stream)
        with pytest.raises(CUDARuntimeError, match="Invalidated"):
            stream.end_capture()


def test_a_capture_runs_when_it_is_launched() -> None:
    stream = Stream(non_blocking=True)
    with stream:
        a = cupy.ones(2)
        stream.begin_capture()
        a += 1
        graph = stream.end_capture()
        assert a.tolist() == [1, 1]
        graph.launch()
        graph.launch()
        assert a.tolist() == [3, 3]
    with pytest.raises(RuntimeError, match="default"):
        Stream.null.begin_capture()
