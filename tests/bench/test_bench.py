"""`paged-ref bench` as a whole: one benchmark is imported, and its threads sleep while they wait."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

from paged_ref.bench import BENCHMARKS
from paged_ref.cli import main


def test_only_the_benchmark_that_runs_is_imported_and_no_thread_spins() -> None:
    code = (
        "import os, sys; from paged_ref.cli import main; main(['bench', 'sass', '--kernel', 'no such kernel']);"
        "names = {'paged_ref.bench.' + name for name in ('engine', 'kernels', 'long', 'memory', 'sass')};"
        "print(names & {*sys.modules}, os.environ['OMP_WAIT_POLICY'])"
    )
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
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
