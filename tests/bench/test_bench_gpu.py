"""The GPU benchmarks without a GPU: what they choose, check, compute and print, with a clock that makes times up."""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paged_ref.bench import batch, gpu_kernels, model, shapes
from paged_ref.bench.gpu_clock import GpuClock, Library, Timing
from paged_ref.bench.gpu_kernels import bench, report, run
from paged_ref.bench.shapes import BATCHES, BLOCK_SIZES, KEYS, MODELS, Shape, gpu_shapes
from paged_ref.cli import main
from paged_ref.core.device import on_gpu
from paged_ref.core.model.config import ModelConfig
from paged_ref.kernels import paged_attention
from paged_ref.views.common.console import Console

pytestmark = pytest.mark.skipif(on_gpu, reason="a GPU is in use: the benchmark itself can run")
TOY = "toy"


class FakeClock(GpuClock):
    """Makes each call once, and says that the first took 10 us, the next 20, and so on."""

    l2_bytes = 100_000

    def __init__(self) -> None:
        self.timed = count(1)

    def free_bytes(self) -> int:
        return 10_000_000

    def time(self, calls: Sequence[Callable[[], Any]], library: Library = "cupy", rounds: int = 15) -> Timing:
        for call in calls:
            call()
        number = next(self.timed)
        return Timing(number * 1e-5, 3e-6, graph=number != 3)

    def copy_bandwidth(self) -> float:
        return 1e9


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(shapes.HEADS, TOY, (4, 2, 32))


def test_the_shapes_are_all_that_was_asked_for_and_the_targets_come_first() -> None:
    found = list(gpu_shapes())
    assert len(found) == len(set(found))
    for name in ("Llama-3-8B", "Llama-2-7B", "Qwen2.5-0.5B", "Llama-3-70B, one of 8"):
        assert {Shape(name, batch, keys, block) for batch in BATCHES for keys in KEYS for block in BLOCK_SIZES} <= {
            *found
        }
        for dtype in ("float16", "bfloat16"):
            assert {Shape(name, batch, keys, 16, dtype, True) for batch in BATCHES for keys in KEYS} <= {*found}
    first = found[: 5 * len(MODELS)]
    assert {(s.batch, s.keys, s.block_size, s.dtype) for s in first} == {
        (1, 65536, 16, "float16"), *((batch, keys, 16, "float16") for batch in (64, 256) for keys in (4096, 16384)),
    }  # fmt: skip


def test_bytes_are_those_of_the_keys() -> None:
    shape = Shape("Llama-3-8B", 64, 4096)
    assert shape.bytes_read == shape.bytes_held == 64 * 4096 * 2 * 8 * 128 * 2
    ragged = Shape("Llama-3-8B", 64, 4000, 64, ragged=True)
    assert ragged.bytes_held == 64 * 4032 * 4096
    assert ragged.bytes_read == int(ragged.seq_lens().sum()) * 4096
    assert ragged.seq_lens().min() >= 500
    assert ragged.seq_lens().max() == 4000


@pytest.mark.parametrize("shape", [Shape(TOY, 3, 100), Shape(TOY, 2, 128, 128, "bfloat16"),
                                   Shape(TOY, 4, 90, 8, "float16", ragged=True)], ids=str)  # fmt: skip
def test_a_shape_is_checked_timed_and_put_in_proportion(shape: Shape) -> None:
    record, failures = bench(shape, FakeClock(), "cpu-simd", None)
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
    record, failures = bench(Shape(TOY, 2, 256, 128), FakeClock(), "cpu-simd", None)
    assert failures == []
    assert {"torch SDPA, enable_gqa", "torch SDPA, grouped", "FlexAttention"} <= record["timings"].keys()
    assert record["speed_over"]["torch SDPA"] == pytest.approx(3)  # 30 us, the better of its two, over 10
    assert record["speed_over"]["FlexAttention"] == pytest.approx(5)
    assert "5.00" in rendered([record], [])


def test_a_wrong_answer_stops_it(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = paged_attention

    def wrong(*args: Any, backend: str, **more: Any) -> Any:
        out = plain(*args, backend=backend, **more)
        if backend == "cpu-simd":
            out[0] += 1
        return out

    monkeypatch.setattr(batch, "paged_attention", wrong)
    with pytest.raises(RuntimeError, match=r"cpu-simd is off from the reference by 1.* on toy: 2 x 50 keys"):
        bench(Shape(TOY, 2, 50), FakeClock(), "cpu-simd", None)
    saved: list[int] = []
    records, notes, failed = run(
        [Shape(TOY, 2, 50), Shape(TOY, 1, 20)], FakeClock(), "cpu-simd", None, 5, lambda r, n: saved.append(len(n))
    )
    assert (records, failed, saved) == ([], 2, [1, 2])
    assert notes[1].startswith("toy: 1 x 20 keys, blocks of 16, float16 failed: RuntimeError: cpu-simd is off from")


def test_what_does_not_fit_and_what_comes_too_late_is_said() -> None:
    large = Shape(TOY, 1000, 4096)
    records, notes, _ = run([Shape(TOY, 1, 20), large, large], FakeClock(), "cpu-simd", None, minutes=5)
    assert len(records) == 1
    assert notes == [f"2 shapes need more memory than is free, such as {large}"]
    records, notes, _ = run([Shape(TOY, 1, 20), large], FakeClock(), "cpu-simd", None, minutes=1e-9)
    assert records == []
    assert notes == ["2 shapes were left out: the 1e-09 minutes were spent (--minutes)"]
    assert "left out" in rendered([], notes)


def test_the_command_writes_what_it_prints(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_kernels, "TUNED", "cpu-simd")
    monkeypatch.setattr(gpu_kernels, "GpuClock", FakeClock)
    monkeypatch.setattr(gpu_kernels, "gpu_shapes", lambda: iter([Shape(TOY, 2, 50), Shape(TOY, 1, 20, 8)]))
    args = argparse.Namespace(shape=["blocks of 8"], minutes=5, json=tmp_path / "k.json")
    assert gpu_kernels.main(args) == 0
    written = json.loads((tmp_path / "k.json").read_text(encoding="utf-8"))
    assert {"device", "date", "versions", "python", "backend", "notes"} <= written.keys()
    assert [record["shape"]["block_size"] for record in written["records"]] == [8]
    assert "copy bandwidth 1 GB/s" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--shape is nothing; no shape has these words, such as: toy: 2 x 50 keys"):
        gpu_kernels.main(argparse.Namespace(shape=["nothing"], minutes=5, json=None))


TOY_MODEL = ModelConfig(
    vocab_size=300, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2, head_size=8,
    max_position_embeddings=64, tie_word_embeddings=True,
)  # fmt: skip


def test_a_model_is_decoded_and_put_in_proportion() -> None:
    args = argparse.Namespace(batch=3, prompt_tokens=10, new_tokens=8)
    result = model.decode_speed(TOY_MODEL, "float32", args, 1e9)
    assert result["steps"] == 6  # 8 tokens: one from the prompt, and the first step of decoding is not counted
    parameters = 300 * 32 + 32 + 2 * (2 * 32 + 32 * 32 + 2 * 16 * 32 + 32 * 32 + 3 * 32 * 48)
    assert result["weights_bytes"] == 4 * parameters
    assert result["kv_bytes"] == 3 * 14 * 2 * 2 * 16 * 4
    bound = (result["weights_bytes"] + result["kv_bytes"]) / 1e9
    assert result["share_of_bound"] == pytest.approx(bound / result["seconds_per_step"])
    console = Console(file=io.StringIO(), width=80)
    whole, near, far = (model.Agreement(*these) for these in ((64, 0.0), (20, 0.0009), (3, 0.5)))
    model.report(console, [whole, whole], result, 1e9)
    model.report(console, [whole, near, far], result, 1e9)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "2 of 2 continuations" in text
    flowing = " ".join(text.split())
    assert "prompt 2: token 21 differs; two logits 0.0009 apart: too near for float16" in flowing
    assert "prompt 3: token 4 differs; two logits 0.5000 apart: float16 should tell them apart" in flowing
    assert max(map(len, text.splitlines())) <= 80


def test_a_token_that_differs_is_weighed_by_its_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The exit status asks whether float16 could tell the two tokens apart, and not whether they are the same."""
    logits = np.zeros(8, np.float32)
    logits[4], logits[3] = 2.0, 1.75
    monkeypatch.setattr(model, "greedy_run", lambda dtype: ([[1, 2, 4], [5, 6, 7]], [[logits] * 3] * 2))
    assert model.compared([[1, 2, 3], [5, 6, 7]]) == [(2, 0.25), (3, 0.0)]
    assert model.compared([[1, 2, 4], [5, 6, 7]]) == [(3, 0.0), (3, 0.0)]


def test_the_weights_of_a_table_that_is_not_the_head_are_not_read() -> None:
    tied = model.weights_read(TOY_MODEL)
    apart = model.weights_read(replace(TOY_MODEL, tie_word_embeddings=False))
    assert tied == apart


def test_the_run_on_the_cpu_gives_tokens() -> None:
    tokens = model.cpu_tokens()
    assert [len(ids) for ids in tokens] == [model.NEW_TOKENS] * len(model.PROMPTS)
    assert tokens == model.greedy_run("float32")[0]


def test_the_benchmark_of_the_model_says_that_it_needs_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "model"]) == 2
    assert "this benchmark needs a GPU: " in capsys.readouterr().err


def rendered(records: list[dict[str, Any]], notes: list[str]) -> str:
    console = Console(file=io.StringIO(), width=80)
    report(console, records, notes, "cpu")
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, text.splitlines())) <= 80
    return text
