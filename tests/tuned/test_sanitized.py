"""What `make gpu` runs is right programs: they run here, too; and a part that fails or comes too late says so."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from support import gpu_smoke, sanitized
from support.gpu_smoke import Check, run_all

from paged_ref.core.device import on_gpu


@pytest.mark.slow
@pytest.mark.skipif(on_gpu, reason="a GPU is in use: make gpu runs it")
def test_the_dozen_variants_run(tmp_path: Path) -> None:
    assert run_all(tmp_path, math.inf, sanitized.checks()) == 0
    lines = [json.loads(line) for line in (tmp_path / "smoke.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(lines) == 10  # and two of the teaching kernels on a GPU
    assert [line["ok"] for line in lines] == [True] * len(lines)
    assert lines[0]["found"] == " fathers brought forth"


@pytest.mark.skipif(on_gpu, reason="a GPU is in use")
def test_without_a_gpu_the_smoke_says_why(tmp_path: Path) -> None:
    assert run_all(tmp_path, 1000, gpu_smoke.CHECKS[:2]) == 2
    first, second = map(json.loads, (tmp_path / "smoke.jsonl").read_text(encoding="utf-8").splitlines())
    assert (first["check"], first["ok"]) == ("versions", False)
    assert "AssertionError" in first["found"]
    assert second["ok"] is False


def test_a_check_that_fails_ends_nothing_and_one_without_time_is_left_out(tmp_path: Path) -> None:
    def fails() -> None:
        raise ValueError("a reason")

    checks = [Check("one", 0, fails), Check("two", 0, lambda: {"off by": 0.5}), Check("three", 1e6, fails)]
    assert run_all(tmp_path, 10, checks) == 1
    one, two, three = map(json.loads, (tmp_path / "smoke.jsonl").read_text(encoding="utf-8").splitlines())
    assert (one["ok"], one["found"]) == (False, "ValueError: a reason")
    assert one["at"][-1].startswith("test_sanitized.py:")
    assert (two["ok"], two["found"]) == (True, {"off by": 0.5})
    assert (three["ok"], three["found"][:9]) == (None, "left out:")
