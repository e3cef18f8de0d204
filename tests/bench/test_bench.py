"""`paged-ref bench` as a whole: one benchmark is imported, and its threads sleep while they wait."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

from paged_ref.bench import BENCHMARKS, conditions, kernels
from paged_ref.bench.shapes import Shape
from paged_ref.cli import main


def test_only_the_benchmark_that_runs_is_imported_and_no_thread_spins() -> None:
    code = (
        "import os, sys; from paged_ref.cli import main; main(['bench', 'sass', '--kernel', 'no such kernel']);"
        "names = {'paged_ref.bench.' + name for name in ('engine', 'kernels', 'long', 'memory', 'sass')};"
        "print(names & {*sys.modules}, os.environ['OMP_WAIT_POLICY'])"
    )
    environment = {**os.environ, "OMP_WAIT_POLICY": "active"}  # what was wanted elsewhere does not count here
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == "{'paged_ref.bench.sass'} passive\n"


@pytest.mark.parametrize("name", BENCHMARKS)
def test_each_benchmark_lists_its_options(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["bench", name, "--help"])
    assert stopped.value.code == 0
    assert "--json FILE" in capsys.readouterr().out


@pytest.mark.parametrize("gone", ["numba_cuda", "cuda"])
def test_bench_sass_without_the_extra_says_so(
    gone: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one sentence, and not by a TypeError of Numba's own compiler."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == gone else find_spec(name))
    assert main(["bench", "sass"]) == 2
    printed = capsys.readouterr().err
    assert "not installed here; pip install 'paged_ref[ptx]' brings all of it" in printed
    assert {"numba_cuda": "numba-cuda", "cuda": "cuda-bindings"}[gone] in printed
    assert printed.count("\n") == 1


def test_the_closing_line_names_the_processor_and_says_when_the_machine_was_busy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(conditions, "_spreads", [])
    quiet = conditions.closing_line(0.1)
    cpu = conditions.describe_cpu()
    assert quiet.startswith(f"{cpu['cpu']}, {cpu['vectors']}, {cpu['cores']} cores, {cpu['threads']} threads; load")
    assert "BUSY" not in quiet
    assert "BUSY" in conditions.closing_line(2.0)
    conditions.record_rounds([1.0, 1.0, 1.0, 1.01, 1.02])
    assert "spreads by 2%" in conditions.closing_line(None)
    assert "BUSY" not in conditions.closing_line(None)
    monkeypatch.setattr(conditions, "_spreads", [])
    conditions.record_rounds([1.0, 2.0, 1.5, 1.0, 3.0])
    assert "BUSY" in conditions.closing_line(None)


def test_kernels_takes_the_faster_read_and_runs_contiguous_twice() -> None:
    shape = Shape("embedded", 2, 64, dtype="float32")
    records = {record["contender"]: record for record in kernels.bench(shape, rounds=3, threads=1)}
    assert list(records)[:4] == [kernels.STREAM, kernels.PAGED, kernels.CONTIGUOUS, kernels.REFERENCE]
    assert records[kernels.CONTIGUOUS]["again_times_first"] > 0
    assert records[kernels.STREAM]["share_of_streaming_read"] == 1
    seconds = {f"{kernels.STREAM}, all": 2.0, f"{kernels.STREAM}, lines": 1.5, kernels.PAGED: 3.0}
    kernels.fastest(seconds, kernels.STREAM)
    assert seconds == {kernels.PAGED: 3.0, kernels.STREAM: 1.5}
