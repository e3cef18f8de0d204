"""The GPU benchmarks without a GPU: what they choose, check, compute and print, with a clock that makes times up."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from itertools import count
from typing import Any

import pytest
from rich.console import Console

from paged_ref.bench import gpu_kernels, gpu_shapes
from paged_ref.bench.gpu_clock import Timing
from paged_ref.bench.gpu_kernels import bench, report, run
from paged_ref.bench.gpu_shapes import BATCHES, BLOCK_SIZES, KEYS, MODELS, GpuShape, shapes
from paged_ref.device import on_gpu

pytestmark = pytest.mark.skipif(on_gpu, reason="a GPU is in use: the benchmark itself can run")
TOY = "toy"


class FakeClock:
    """Makes each call once, and says that the first took 10 us, the next 20, and so on."""

    l2_bytes = 100_000

    def __init__(self) -> None:
        self.timed = count(1)

    def free_bytes(self) -> int:
        return 10_000_000

    def time(self, calls: list[Callable[[], Any]], library: str = "cupy") -> Timing:
        for call in calls:
            call()
        number = next(self.timed)
        return Timing(number * 1e-5, 3e-6, graph=number != 3)

    def copy_bandwidth(self) -> float:
        return 1e9


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gpu_shapes.MODELS, TOY, (4, 2, 16))


def test_the_shapes_are_all_that_was_asked_for_and_the_targets_come_first() -> None:
    found = [shape for shape in shapes() if shape.model != TOY]
    assert len(found) == len(set(found))
    for model in ("Llama-3-8B", "Llama-2-7B", "Qwen2.5-0.5B", "Llama-3-70B, one of 8"):
        assert {GpuShape(model, batch, keys, block) for batch in BATCHES for keys in KEYS for block in BLOCK_SIZES} <= {
            *found
        }
        for dtype in ("float16", "bfloat16"):
            assert {GpuShape(model, batch, keys, 16, dtype, True) for batch in BATCHES for keys in KEYS} <= {*found}
    first = found[: 5 * (len(MODELS) - 1)]
    assert {(s.batch, s.keys, s.block_size, s.dtype) for s in first} == {
        (1, 65536, 16, "float16"), *((batch, keys, 16, "float16") for batch in (64, 256) for keys in (4096, 16384)),
    }  # fmt: skip


def test_bytes_are_those_of_the_keys() -> None:
    shape = GpuShape("Llama-3-8B", 64, 4096)
    assert shape.bytes_read == shape.bytes_held == 64 * 4096 * 2 * 8 * 128 * 2
    ragged = GpuShape("Llama-3-8B", 64, 4000, 64, ragged=True)
    assert ragged.bytes_held == 64 * 4032 * 4096
    assert ragged.bytes_read == int(ragged.seq_lens().sum()) * 4096
    assert ragged.seq_lens().min() >= 500
    assert ragged.seq_lens().max() == 4000


@pytest.mark.parametrize("shape", [GpuShape(TOY, 3, 100), GpuShape(TOY, 2, 128, 128, "bfloat16"),
                                   GpuShape(TOY, 4, 90, 8, "float16", ragged=True)], ids=str)  # fmt: skip
def test_a_shape_is_checked_timed_and_put_in_proportion(shape: GpuShape) -> None:
    record, failures = bench(shape, FakeClock(), "cpu", None)
    assert failures == []
    assert record["share_of_copy"] == pytest.approx(shape.bytes_read / 1e-5 / 1e9)
    assert record["times_contiguous"] == pytest.approx(0.5)
    assert record["shape"]["sets"] == -(-400_000 // shape.bytes_held)
    json.dumps(record)
    text = rendered([record], ["a note"])
    assert f"{shape.batch}" in text
    assert "0.500" in text
    assert "- a note" in text


@pytest.mark.compare
def test_peers_take_part(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    record, failures = bench(GpuShape(TOY, 2, 256, 128), FakeClock(), "cpu", None)
    assert failures == []
    assert {"torch SDPA, enable_gqa", "torch SDPA, grouped", "FlexAttention"} <= record["timings"].keys()
    assert record["speed_over"]["torch SDPA"] == pytest.approx(3)  # 30 us, the better of its two, over 10
    assert record["speed_over"]["FlexAttention"] == pytest.approx(5)
    assert "5.00" in rendered([record], [])


def test_a_wrong_answer_stops_it(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = gpu_kernels.paged_attention

    def wrong(*args: Any, backend: str, **more: Any) -> Any:
        out = plain(*args, backend=backend, **more)
        if backend == "cpu":
            out[0] += 1
        return out

    monkeypatch.setattr(gpu_kernels, "paged_attention", wrong)
    with pytest.raises(RuntimeError, match=r"cpu is off from the reference by 1.* on toy: 2 x 50 keys"):
        bench(GpuShape(TOY, 2, 50), FakeClock(), "cpu", None)


def test_what_does_not_fit_and_what_comes_too_late_is_said() -> None:
    large = GpuShape(TOY, 1000, 4096)
    records, notes = run([GpuShape(TOY, 1, 20), large, large], FakeClock(), "cpu", None, minutes=5)
    assert len(records) == 1
    assert notes == [f"2 shapes need more memory than is free, such as {large}"]
    records, notes = run([GpuShape(TOY, 1, 20), large], FakeClock(), "cpu", None, minutes=1e-9)
    assert records == []
    assert notes == ["2 shapes were left out: the 1e-09 minutes were spent (--minutes)"]
    assert "left out" in rendered([], notes)


def rendered(records: list[dict[str, Any]], notes: list[str]) -> str:
    console = Console(file=io.StringIO(), width=80)
    report(console, records, notes, "cpu")
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, text.splitlines())) <= 80
    return text
