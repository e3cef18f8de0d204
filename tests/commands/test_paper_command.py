"""`paged-ref paper` as a user meets it: the figures, JSON, bad input."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from paged_ref.cli import main


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


@pytest.mark.usefixtures("narrow")
def test_paper_prints_ours_beside_the_papers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, table = tmp_path / "p.json", tmp_path / "p.csv"
    assert main(["paper", "2", "12", "--jobs", "1", "--json", str(file), "--csv", str(table)]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    findings = json.loads(file.read_text(encoding="utf-8"))
    assert {finding["figure"] for finding in findings} == {"2", "12"}
    for finding in findings:
        line = next(line for line in shown.splitlines() if line.startswith(f" {finding['what']} "))
        assert f"{finding['ours']:.1f}" in line or f"{finding['ours']:.2f}" in line
        assert (" NO " in line) == (finding["met"] is False)
    assert table.read_text(encoding="utf-8").splitlines()[0] == "figure,what,ours,paper,unit,low,high,met"
    assert len(table.read_text(encoding="utf-8").splitlines()) == 1 + len(findings)
    assert re.search(r"\d+ of \d+ numbers are in their bands", shown)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["paper", "99"], "figure is '99'; known are 2, 12, 13, 15, 18b, 19, prefix"),
        (["paper", "2", "--jobs", "0"], "jobs is 0"),
        (["paper", "2", "--jobs", "99999999999"], "--jobs is 99999999999; 1 to "),
        (["paper", "2", "--json", "no/such/place.json"], "cannot be written"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("paged-ref: error: ")
    assert message in printed.err
    assert printed.err.count("\n") == 1
