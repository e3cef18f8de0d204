"""`paged-ref paper` as a user meets it: the figures, JSON, bad input."""

from __future__ import annotations

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from paged_ref.cli import main
from paged_ref.views.common.plots import Range, ranges_svg


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


@pytest.mark.usefixtures("narrow")
def test_paper_prints_ours_beside_the_papers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, table, picture = (tmp_path / name for name in ("p.json", "p.csv", "p.svg"))
    files = ["--json", str(file), "--csv", str(table), "--svg", str(picture)]
    assert main(["paper", "2", "12", "--jobs", "1", *files]) == 0
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
    drawn = ElementTree.fromstring(picture.read_text(encoding="utf-8"))
    judged = [each for each in findings if each["met"] is not None and each["paper"] != 0]
    assert len(list(drawn.iter("{http://www.w3.org/2000/svg}circle"))) == len(judged)


def test_a_value_stands_in_its_band_or_outside_of_it() -> None:
    ranges = [Range("in", 2.0, 1.0, 4.0), Range("above", 8.0, None, 2.0), Range("nothing", 0.0, 0.5, None)]
    drawn = ElementTree.fromstring(ranges_svg("title", [("group", ranges)], "times"))
    space = "{http://www.w3.org/2000/svg}"
    bands = [
        (float(each.get("x") or 0), float(each.get("width") or 0)) for each in list(drawn.iter(f"{space}rect"))[1:]
    ]
    values = [(float(each.get("cx") or 0), each.get("fill")) for each in drawn.iter(f"{space}circle")]
    assert bands == [(520.0, 220.0), (300.0, 330.0), (410.0, 330.0)]  # 1 is at 520, 4 at 740, a quarter at 300
    assert [x for x, _ in values] == [630.0, 740.0, 300.0]
    assert values[0][1] != values[1][1] == values[2][1]


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
