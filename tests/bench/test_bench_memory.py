"""`paged-ref bench memory`, at a size at which its figures mean nothing: rows and JSON, no timings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from paged_ref.cli import main

SMALL = ["bench", "memory", "--sequences", "4", "--steps", "3", "--prompt-tokens", "100", "--rounds", "2"]


def test_prints_its_rows_and_writes_json(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "memory.json"
    assert main([*SMALL, "--pools", "12", "50", "--json", str(file)]) == 0
    results = json.loads(file.read_text(encoding="utf-8"))["results"]
    shown = capsys.readouterr().out
    for result in results:
        assert result["name"] in shown
        assert result["measured"] > 0 or result["name"].startswith("  of this")  # a difference of two timings
        assert result["met"] is (None if result["target"] is None else result["measured"] < result["target"])
    targets = {result["name"]: result["target"] for result in results if result["target"] is not None}
    assert targets == {
        "scheduling step, paged": 300,
        "  of this, recording the events": 150,
        "  the largest pool, times the smallest": 1.2,
        "admitting a known prompt of 100 tokens": 20,
    }
    assert {"appended token, pool of 12 blocks", "appended token, pool of 50 blocks"} < {r["name"] for r in results}


@pytest.mark.parametrize(
    ("option", "value", "reason"),
    [
        ("--steps", "0", "steps is 0; at least 1 is needed"),
        ("--pools", "11", "pools has 11; --sequences 4 asks for 12 or more"),
    ],
)
def test_refuses(option: str, value: str, reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--pools", "12", option, value]) != 0
    assert reason in capsys.readouterr().err
